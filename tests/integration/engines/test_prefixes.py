"""Prompts that begin alike: a hit and a miss give the same tokens and the same frames, for every recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from kvsluice.compression import slots as s
from kvsluice.compression.recipe import Recipe, get_recipe, recipe_names, resolve
from kvsluice.compression.resolve import DEFAULT_WINDOWS
from kvsluice.errors import ConfigError
from kvsluice.models.model import Model
from kvsluice.models.sampling import SamplingParams
from kvsluice.services.prefill import pack as pack_module
from kvsluice.services.prefill.engine import PrefillEngine, PrefillJob
from kvsluice.services.prefill.prefix_memory import make_prefix_memory

CHUNK, MIB = 64, 1 << 20
DOCUMENT = 9 * CHUNK + 30
# fp32 sums of at most 512 terms in another order: 512 * 2^-24 relative to values of order 1, with room for 4 layers
TOLERANCE = 2e-4
SLUICE = get_recipe("sluice")
RECALLING = replace(SLUICE, name="recalling", propagation=replace(SLUICE.propagation, recall=0.1))


@dataclass
class Run:
    """What came of a prompt.

    Attributes:
        found: tokens that did not run; None = nobody said.
    """

    sink: object
    found: list[int] = field(default_factory=list)


@dataclass
class Rig:
    """A prefill engine that shares prefixes, checked after every prompt."""

    engine: PrefillEngine
    make_sink: type
    runs: int = 0

    def submit(
        self,
        ids: Sequence[int],
        recipe: Recipe | str = "exact",
        params: SamplingParams | None = None,
        tenant: str = "",
        **job,
    ) -> Run:
        self.runs += 1
        params = params or SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
        run, name = Run(self.make_sink(f"p{self.runs}")), f"p{self.runs}"
        made = fitted(recipe, self.engine, len(ids))
        self.engine.submit(
            PrefillJob(name, 1, tuple(ids), made, params, tenant=tenant, **job), run.sink, run.found.append
        )
        return run

    def finish(self) -> None:
        while self.engine.step():
            pass
        if self.engine.prefixes is not None:
            self.engine.prefixes.tree.check_integrity()

    def run(self, ids: Sequence[int], *args, **more) -> Run:
        run = self.submit(ids, *args, **more)
        self.finish()
        assert run.sink.error is None, run.sink.error
        return run

    @property
    def tree(self):
        return self.engine.prefixes.tree


def fitted(recipe: Recipe | str, engine: PrefillEngine, num_tokens: int) -> Recipe:
    """Resolved; with retrieval of fewer rows than the prompts here have."""
    made = get_recipe(recipe) if isinstance(recipe, str) else recipe
    if isinstance(made.retrieval, s.ChunkLandmarks):
        made = replace(made, retrieval=replace(made.retrieval, budget_tokens=128))
    resolved = resolve(made, engine.shape, num_tokens, {})
    assert resolved.fallback_reason is None, resolved.fallback_reason
    return resolved.recipe


@pytest.fixture
def rig(model, sink):
    made: list[Rig] = []

    def make(num_bytes: int = 64 * MIB, model: Model = model, pack: int = 2 * CHUNK) -> Rig:
        memory = make_prefix_memory(num_bytes, torch.device("cpu")) if num_bytes else None
        made.append(Rig(PrefillEngine(model, CHUNK, pack, prefix_memory=memory), sink))
        return made[-1]

    yield make
    for one in made:
        one.finish()
        assert one.engine.num_requests == 0
        if one.engine.prefixes is not None:
            nodes = list(one.tree._nodes())
            assert not one.tree._reserved and not any(node.holders for node in nodes), "nothing is left half-made"


def tensors(run: Run) -> Iterator[tuple[str, torch.Tensor]]:
    for layer in run.sink.layers:
        for part, group in layer.tensors.items():
            for name, tensor in group.items():
                yield f"{layer.layer}:{part.name}:{name}", tensor


def same(one: Run, other: Run, exactly: bool = False) -> None:
    """The same tokens and frames, up to rounding."""
    assert one.sink.token_ids == other.sink.token_ids
    for a, b in zip(one.sink.sampled, other.sink.sampled, strict=True):
        assert a.logprob is None or a.logprob == pytest.approx(b.logprob, abs=TOLERANCE)
    left, right = dict(tensors(one)), dict(tensors(other))
    assert left.keys() == right.keys() and left
    for name, tensor in left.items():
        agree(name, tensor, right[name], exactly)


def agree(name: str, a: torch.Tensor, b: torch.Tensor, exactly: bool) -> None:
    """A value that lies between two of its dtype's may come out as either: few do, by no more than a step."""
    assert a.dtype == b.dtype and a.shape == b.shape, name
    differ = (a.float() != b.float()).float().mean().item()
    if exactly or a.dtype in (torch.int32, torch.int64):
        assert differ == 0, name
    elif not a.is_floating_point():
        assert differ < 0.005, name
    elif a.itemsize == 4:
        torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=TOLERANCE, msg=lambda text: f"{name}: {text}")
    else:
        assert differ < 0.005, name
        step = 2**-3 if a.itemsize == 1 else 2**-7
        torch.testing.assert_close(a.float(), b.float(), atol=2**-9, rtol=step, msg=lambda text: f"{name}: {text}")


def asks(prompt, question: int, length: int = 75) -> tuple[int, ...]:
    """A prompt over the common document."""
    return prompt(DOCUMENT, 1) + prompt(length, 100 + question)


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "drawn"])
@pytest.mark.parametrize("recipe", [*recipe_names(), RECALLING], ids=lambda one: getattr(one, "name", one))
def test_a_hit_gives_what_a_miss_gives(rig, prompt, recipe: str | Recipe, temperature: float) -> None:
    params = SamplingParams(max_tokens=4, temperature=temperature, seed=3, n=3, logprobs=2, ignore_eos=True)
    shared, alone = rig(), rig(0)
    missed = shared.run(asks(prompt, 0), recipe, params)
    hit = shared.run(asks(prompt, 1), recipe, params)
    assert missed.found == [0] and hit.found[0] >= 8 * CHUNK, "all but what the recipe's queries come from"
    same(missed, alone.run(asks(prompt, 0), recipe, params), exactly=True)
    same(hit, alone.run(asks(prompt, 1), recipe, params))


def test_rows_that_decode_may_call_back_are_sent_of_what_was_found_as_well(rig, prompt) -> None:
    """Hidden rows that go no further leave with the layer that selects: those of found chunks come from memory."""
    plain = get_recipe("sluice")
    recipe = replace(plain, propagation=replace(plain.propagation, recall=0.05))
    shared, alone = rig(), rig(0)
    shared.run(asks(prompt, 0), recipe)
    hit = shared.run(asks(prompt, 1), recipe)
    assert hit.found[0] >= 8 * CHUNK
    assert any(":HIDDEN:" in name for name, _ in tensors(hit))
    same(hit, alone.run(asks(prompt, 1), recipe))


@pytest.mark.parametrize("recipe", recipe_names())
def test_rows_that_were_found_do_not_run(rig, prompt, monkeypatch, recipe: str) -> None:
    shared, ran = rig(), []
    whole = pack_module.run_pack

    def watched(model, prompts, items):
        ran.extend(items)
        return whole(model, prompts, items)

    monkeypatch.setattr("kvsluice.services.prefill.engine.run_pack", watched)
    shared.run(asks(prompt, 0), recipe)
    ran.clear()
    found = shared.run(asks(prompt, 1), recipe).found[0]
    made = fitted(recipe, shared.engine, DOCUMENT + 75)
    selected_at = getattr(made.propagation, "layer", 3)
    for layer in range(4):
        assert min(item.begin for item in ran if item.layer == layer) == (found if layer <= selected_at else 0)
    figures = shared.engine.figures
    assert (figures.prefix_queries, figures.prefix_hits) == (2 * (DOCUMENT + 75), found)


@pytest.mark.parametrize("pack", [CHUNK, 16 * CHUNK])
def test_where_packs_do_not_matter_a_hit_is_a_miss_bit_by_bit(rig, prompt, pack: int) -> None:
    """A chunk a pack: then the rows that run are in the same packs either way."""
    for recipe in ("exact", "sluice", "mikv"):
        shared, alone = rig(pack=pack), rig(0, pack=pack)
        shared.run(asks(prompt, 0), recipe)
        hit, missed = shared.run(asks(prompt, 1), recipe), alone.run(asks(prompt, 1), recipe)
        same(hit, missed, exactly=pack == CHUNK)


def test_recipes_that_need_the_same_rows_share_them(rig, prompt) -> None:
    shared, alone = rig(), rig(0)
    shared.run(asks(prompt, 0), "exact")
    for recipe in ("kivi", "shadowkv", "snapkv"):
        hit = shared.run(asks(prompt, 1), recipe)
        assert hit.found[0] >= 8 * CHUNK
        same(hit, alone.run(asks(prompt, 1), recipe))
    assert shared.run(asks(prompt, 1), "sluice").found == [0], "rows behind its layer were never kept"
    assert shared.run(asks(prompt, 1), "mikv").found == [0], "what its scorer has seen was never kept"


@pytest.mark.parametrize("common", [0, 5, CHUNK - 1, CHUNK, 3 * CHUNK + 1])
def test_a_hit_ends_where_prompts_part(rig, prompt, common: int) -> None:
    shared, alone = rig(), rig(0)
    first, more = prompt(6 * CHUNK, 1), prompt(6 * CHUNK, 2)
    shared.run(first)
    ids = first[:common] + more
    hit = shared.run(ids)
    assert hit.found == [common // CHUNK * CHUNK]
    same(hit, alone.run(ids))


@pytest.mark.parametrize("length", [2 * CHUNK, 2 * CHUNK + 1, 3 * CHUNK - 1])
def test_the_same_prompt_again_leaves_a_chunk_to_run(rig, prompt, length: int) -> None:
    shared, alone, ids = rig(), rig(0), prompt(length)
    shared.run(ids)
    hit = shared.run(ids)
    assert hit.found == [(length - 1) // CHUNK * CHUNK]
    same(hit, alone.run(ids))


def test_what_is_known_is_not_kept_again(rig, prompt) -> None:
    """Also of chunks that are run because the prompt ends in them: in a full cache, others would go for it."""
    other, ids = prompt(2 * CHUNK, 5), prompt(4 * CHUNK)
    sized = rig()
    sized.run(other)
    sized.run(ids)
    full = rig(sized.tree.used_bytes)
    full.run(other)
    for _ in range(3):
        full.run(ids)
    assert full.tree.num_dropped == 0
    assert full.run(other).found == [CHUNK]


def test_rows_whose_queries_a_recipe_wants_run(rig, prompt) -> None:
    shared, ids = rig(), asks(prompt, 0, 1)
    shared.run(ids, "sluice")
    window = DEFAULT_WINDOWS["tsp"]
    assert shared.run(ids, "sluice").found == [(len(ids) - window) // CHUNK * CHUNK]


def test_a_prompt_shorter_than_a_chunk_is_not_kept(rig, prompt) -> None:
    shared = rig()
    for _ in range(2):
        assert shared.run(prompt(CHUNK - 1)).found == [0]
    assert shared.tree.used_bytes == 0


def test_tenants_find_nothing_of_each_other(rig, prompt) -> None:
    shared = rig()
    shared.run(asks(prompt, 0), tenant="a")
    assert shared.run(asks(prompt, 0), tenant="b").found == [0]
    assert shared.run(asks(prompt, 0)).found == [0]
    assert shared.run(asks(prompt, 0), tenant="a").found[0] > 0


def test_a_longer_prompt_goes_on_where_the_shorter_one_ended(rig, prompt) -> None:
    shared, alone, ids = rig(), rig(0), prompt(8 * CHUNK)
    for length, found in ((3 * CHUNK + 9, 0), (6 * CHUNK, 3), (8 * CHUNK, 6)):
        hit = shared.run(ids[:length])
        assert hit.found == [found * CHUNK]
        same(hit, alone.run(ids[:length]))


@pytest.mark.parametrize("recipe", ["exact", "sluice", "mikv"])
def test_with_too_little_memory_the_first_chunks_are_kept(rig, prompt, recipe: str) -> None:
    shared, alone = rig(), rig(0)
    shared.run(asks(prompt, 0), recipe)
    small = rig(shared.tree.used_bytes // 2)
    small.run(asks(prompt, 0), recipe)
    hit = small.run(asks(prompt, 1), recipe)
    assert 0 < hit.found[0] < 8 * CHUNK
    same(hit, alone.run(asks(prompt, 1), recipe))
    small.run(prompt(4 * CHUNK, 77), "exact")
    assert small.tree.num_dropped > 0, "what was used longest ago has made room"
    same(small.run(asks(prompt, 2), recipe), alone.run(asks(prompt, 2), recipe))


def test_chunks_that_make_room_while_a_prompt_uses_others_change_nothing(rig, prompt) -> None:
    shared, alone = rig(), rig(0)
    shared.run(asks(prompt, 0))
    small = rig(shared.tree.used_bytes + 2 * CHUNK * 1024)
    small.run(asks(prompt, 0))
    hit, others = small.submit(asks(prompt, 1)), [small.submit(prompt(4 * CHUNK, 50 + i)) for i in range(3)]
    small.finish()
    same(hit, alone.run(asks(prompt, 1)))
    for i, other in enumerate(others):
        same(other, alone.run(prompt(4 * CHUNK, 50 + i)))


@pytest.mark.parametrize("recipe", ["exact", "sluice"])
def test_two_at_once_over_a_new_document_are_both_right(rig, prompt, recipe: str) -> None:
    shared, alone = rig(pack=4 * CHUNK), rig(0)
    runs = [shared.submit(asks(prompt, i), recipe) for i in range(2)]
    shared.finish()
    assert [run.found for run in runs] == [[0], [0]]
    for i, run in enumerate(runs):
        same(run, alone.run(asks(prompt, i), recipe))
    used = shared.tree.used_bytes
    assert shared.run(asks(prompt, 0), recipe).found[0] >= 8 * CHUNK
    assert shared.tree.used_bytes == used, "chunks are kept once"


def test_a_prompt_that_waits_finds_what_is_kept_meanwhile(rig, prompt, sink) -> None:
    shared = rig()
    shared.engine._batcher.max_active_tokens = 1  # one prompt after the other
    runs = [shared.submit(asks(prompt, i)) for i in range(2)]
    pending = shared.engine.num_pending_tokens
    assert pending == 2 * (DOCUMENT + 75)
    shared.finish()
    assert [run.found[0] > 0 for run in runs] == [False, True]


@pytest.mark.parametrize("steps", [0, 1, 7, 12, 17])
@pytest.mark.parametrize("recipe", ["exact", "sluice"])
def test_a_prompt_that_is_cancelled_leaves_whole_chunks_or_none(rig, prompt, recipe: str, steps: int) -> None:
    shared, alone = rig(), rig(0)
    shared.submit(asks(prompt, 0), recipe)
    for _ in range(steps):
        assert shared.engine.step() or steps == 17, "the last number is behind the end of shorter runs"
    shared.engine.cancel("p1")
    shared.tree.check_integrity()
    assert not shared.tree._reserved
    same(shared.run(asks(prompt, 1), recipe), alone.run(asks(prompt, 1), recipe))
    same(shared.run(asks(prompt, 2), recipe), alone.run(asks(prompt, 2), recipe))


@pytest.mark.parametrize("call", [2, 11, 30])
def test_a_prompt_that_fails_leaves_nothing_half_made(rig, prompt, monkeypatch, call: int) -> None:
    shared, alone = rig(), rig(0)
    whole, calls = Model.finish_layer, 0

    def fails_once(self, layer, x, attn):
        nonlocal calls
        calls += 1
        if calls == call:
            raise torch.OutOfMemoryError("no room")
        return whole(self, layer, x, attn)

    failed = shared.submit(asks(prompt, 0))
    with monkeypatch.context() as patched:
        patched.setattr(Model, "finish_layer", fails_once)
        while shared.engine.step():
            pass
    assert failed.sink.error is not None or calls < call
    shared.tree.check_integrity()
    same(shared.run(asks(prompt, 1)), alone.run(asks(prompt, 1)))


def test_a_pack_that_runs_again_keeps_what_it_gave_the_second_time(rig, prompt, monkeypatch) -> None:
    shared, alone = rig(pack=4 * CHUNK), rig(0)
    whole, failed = pack_module.run_pack, []

    def fails_together(model, prompts, items):
        outcome = whole(model, prompts, items)
        if len({item.request_id for item in items}) > 1:
            failed.append(items)
            raise torch.OutOfMemoryError("no room for both")
        return outcome

    monkeypatch.setattr("kvsluice.services.prefill.engine.run_pack", fails_together)
    runs = [shared.submit(prompt(4 * CHUNK + 3, i), "exact") for i in range(2)]
    shared.finish()
    assert failed and all(run.sink.error is None for run in runs)
    monkeypatch.undo()
    for i in range(2):
        ids = (*prompt(4 * CHUNK + 3, i), 5, 6, 7)
        hit = shared.run(ids)
        assert hit.found == [4 * CHUNK]
        same(hit, alone.run(ids))


def test_an_attempt_that_follows_a_failed_one_finds_what_is_whole(rig, prompt) -> None:
    shared, alone = rig(), rig(0)
    shared.run(asks(prompt, 0))
    again = shared.run(asks(prompt, 0), resumed=True)
    assert again.found[0] > 0
    same(again, alone.run(asks(prompt, 0), resumed=True))


def test_a_prompt_that_ends_with_its_first_token_is_kept(rig, prompt) -> None:
    shared = rig()
    one = SamplingParams(max_tokens=1, temperature=0.0)
    shared.run(asks(prompt, 0), params=one)
    assert shared.run(asks(prompt, 1), params=one).found[0] >= 8 * CHUNK


def test_work_that_is_left_counts_without_what_was_found(rig, prompt) -> None:
    shared = rig()
    shared.run(asks(prompt, 0))
    shared.submit(asks(prompt, 1))
    assert shared.engine.num_pending_tokens == DOCUMENT + 75 - 9 * CHUNK


def test_where_rope_depends_on_the_prompts_length_nothing_is_shared(rig, make_model, prompt) -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    shared = rig(model=make_model(rope_scaling=scaling, max_position_embeddings=256))
    assert shared.engine.prefixes is None
    assert shared.run(prompt(3 * CHUNK)).found == []


def test_half_precision_rows_come_back_bit_by_bit(rig, make_model, prompt) -> None:
    model = make_model(dtype=torch.bfloat16)
    for recipe in ("exact", "sluice"):
        shared, alone = rig(model=model, pack=CHUNK), rig(0, model=model, pack=CHUNK)
        shared.run(asks(prompt, 0), recipe)
        same(shared.run(asks(prompt, 1), recipe), alone.run(asks(prompt, 1), recipe), exactly=True)


def test_memory_that_is_not_there_is_refused_by_the_settings_name(monkeypatch) -> None:
    def none(*args, **kwargs):
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(torch, "empty", none)
    with pytest.raises(ConfigError, match=r"prefix_cache_bytes: got 4096.*allowed: less, or 0"):
        make_prefix_memory(4096, torch.device("cpu"))
