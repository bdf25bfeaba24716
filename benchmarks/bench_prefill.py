"""`kvsluice bench prefill`: prompts through the prefill engine, as the service drives it, against transformers.

Time runs from the moment that prompts are submitted until the last of them has its first token on the host. What is
left to encode after that (the last layer) is timed on its own. A prompt that arrives beside a long one has come just
before a step of the long one began, which is the worst moment.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..compression.interfaces import EncodedLayer
from ..compression.recipe import Recipe, resolve
from ..errors import InternalError, KvsluiceError
from ..evals.results import EXACT, TRANSFORMERS
from ..models.sampling import Sampled, SamplingParams
from ..services.prefill.engine import PrefillEngine, PrefillJob
from ..services.prefill.flops import prompt_flops
from ..services.staging import Event, HostCopies, make_host_copies
from . import baseline
from .bench_results import Floor, Row
from .prefill_memory import DiscardingSink
from .rows import compared, measured
from .step_profile import profile
from .subject import Bench, bench_ident
from .timing import peak_bytes, summarize, synchronize, time_wall

if TYPE_CHECKING:
    from ..services.framing import FramePacker

PACK_TOKENS = 2048  # of the service
MAX_LAYERS = 2  # that wait to be packed, as the service has it
HELD_BACK_S = 1e-4  # between two looks at whether a sink is ready again
COPY_OUT = "copy_out"  # a row's condition
FIRST_TOKEN, BESIDE = "time to first token", "time to first token beside a long prompt"


class CountingSink(DiscardingSink):
    """Counts what it is handed and lets go of it.

    Attributes:
        layer: the layer that has started last.
        encoded_bytes: of all layers.
        first_token_s: when the first token came, by the performance counter.
        ended: whether the prompt has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer = -1
        self.encoded_bytes = 0
        self.first_token_s: float | None = None
        self.ended = False

    def on_layer_start(self, layer: int) -> None:
        self.layer = layer

    def on_layer(self, encoded: EncodedLayer) -> None:
        self.encoded_bytes += encoded.nbytes()

    def on_first_tokens(self, sampled: list[Sampled]) -> None:
        self.first_token_s = time.perf_counter()

    def on_done(self) -> None:
        self.ended = True

    def on_error(self, error: KvsluiceError) -> None:
        super().on_error(error)
        self.ended = True

    def arrived_s(self) -> float:
        """When the first token came.

        Raises:
            KvsluiceError: prefill failed, or none came.
        """
        if self.error is not None:
            raise self.error
        if self.first_token_s is None:
            raise InternalError("prefill stands still")
        return self.first_token_s

    def finish(self) -> None:
        """Wait for what goes on after the prompt's end."""


class CopyingSink(CountingSink):
    """Also packs every layer into frames on the host while the next one computes, as the service's publisher does.

    Args:
        packer: of the prompt.
        copies: how its tensors come to the host.
        worker: the thread that packs.
    """

    def __init__(self, packer: FramePacker, copies: HostCopies, worker: ThreadPoolExecutor) -> None:
        super().__init__()
        self._packer = packer
        self._copies = copies
        self._worker = worker
        self._under_way: list[Future[None]] = []

    def ready(self) -> bool:
        self._under_way = [one for one in self._under_way if not _is_packed(one)]
        return len(self._under_way) < MAX_LAYERS

    def on_layer(self, encoded: EncodedLayer) -> None:
        super().on_layer(encoded)
        self._under_way.append(self._worker.submit(self._pack, encoded, self._copies.mark()))

    def finish(self) -> None:
        wait(self._under_way)
        self.ready()

    def _pack(self, encoded: EncodedLayer, after: Event | None) -> None:
        self._packer.add(encoded, after)  # the frames would be written to gRPC


def _is_packed(packing: Future[None]) -> bool:
    """Whether it is done. Raises what it raised."""
    return packing.done() and packing.result() is None


@dataclass
class _Passes:
    """Seconds of every repetition: until the last first token, and until all layers were handed over."""

    first_token_s: list[float] = field(default_factory=list)
    done_s: list[float] = field(default_factory=list)
    mean_first_token_s: list[float] = field(default_factory=list)
    encoded_bytes: int = 0


@dataclass
class EngineRun:
    """Prompts of one recipe through one engine.

    Attributes:
        copies_out: whether encoded layers are packed into frames on the host; they are dropped else.
    """

    bench: Bench
    recipe: Recipe
    copies_out: bool = False
    engine: PrefillEngine = field(init=False)
    passes: _Passes = field(default_factory=_Passes)

    def __post_init__(self) -> None:
        self._copies = make_host_copies(self.bench.device) if self.copies_out else None
        self._worker = ThreadPoolExecutor(1)
        self._sinks: list[CountingSink] = []
        chunk = self.bench.chunk_tokens
        pack = self.bench.options.pack_tokens or max(chunk, PACK_TOKENS)
        self.engine = PrefillEngine(self.bench.model, chunk, max(chunk, pack))

    def submit(self, name: str, prompt: tuple[int, ...]) -> CountingSink:
        """Queue a prompt of which two tokens are wanted, so that the last layer is encoded as well."""
        bench = self.bench
        recipe = resolve(self.recipe, bench.subject.shape, len(prompt), bench.subject.profile).recipe
        sink = self._make_sink(name, recipe, len(prompt))
        self._sinks.append(sink)
        sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        self.engine.submit(PrefillJob(name, 1, prompt, recipe, sampling), sink)
        return sink

    def _make_sink(self, name: str, recipe: Recipe, num_tokens: int) -> CountingSink:
        if self._copies is None:
            return CountingSink()
        from ..services.framing import FramePacker

        ident = bench_ident(name, self.bench.model.fingerprint, recipe.fingerprint)
        return CopyingSink(FramePacker(ident, num_tokens, copies=self._copies), self._copies, self._worker)

    def drain(self) -> None:
        """Run until nothing is left."""
        while not all(sink.ended for sink in self._sinks):
            self._step()
        for sink in self._sinks:
            sink.finish()
        self._sinks = []
        synchronize(self.bench.device)

    def _step(self) -> None:
        if not self.engine.step():
            time.sleep(HELD_BACK_S)

    def run(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """All prompts at once."""
        synchronize(self.bench.device)
        began_s = time.perf_counter()
        sinks = [self.submit(f"prompt-{index}", prompt) for index, prompt in enumerate(prompts)]
        self.drain()
        done_s = time.perf_counter()
        arrived = [sink.arrived_s() - began_s for sink in sinks]
        self.passes.first_token_s.append(max(arrived))
        self.passes.mean_first_token_s.append(sum(arrived) / len(arrived))
        self.passes.done_s.append(done_s - began_s)
        self.passes.encoded_bytes = sum(sink.encoded_bytes for sink in sinks)

    def beside(self, long: tuple[int, ...], short: tuple[int, ...]) -> float:
        """Seconds to the first token of a prompt that arrives when another is at a quarter of its layers."""
        synchronize(self.bench.device)
        ahead = self.submit("long", long)
        while ahead.layer < self.bench.subject.config.num_layers // 4 and not ahead.ended:
            self._step()
        came_s = time.perf_counter()
        self._step()
        sink = self.submit("short", short)
        while sink.first_token_s is None and not sink.ended:
            self._step()
        if ahead.error is not None:
            raise ahead.error
        self.engine.cancel("long")
        self.drain()
        return sink.arrived_s() - came_s


def measure(bench: Bench) -> list[Row]:
    """A row for every recipe, context and batch, and for transformers where it is asked for."""
    options, rows = bench.options, []
    sides = [*bench.subject.recipes, *([TRANSFORMERS] if options.baseline else [])]
    runs = len(sides) + (len(bench.subject.recipes) if options.copy_out else 0)
    bench.progress.expect(runs * len(options.contexts) * len(options.batches))
    if options.beside is not None:
        bench.progress.expect(len(bench.subject.recipes) * len(options.contexts))
    other = baseline.transformers_model(bench.model) if options.baseline else None
    for context in options.contexts:
        for batch in options.batches:
            assert batch is not None, "prefill takes numbers only"
            for side in sides:
                rows += _first_token_rows(bench, side, context, batch, other)
        if options.beside is not None:
            for label in bench.subject.recipes:
                bench.progress.begin(f"prefill of {options.beside} tokens beside {context}, {label}")
                rows.append(_beside_row(bench, label, context, options.beside))
    return compared(rows, (TRANSFORMERS, EXACT))


def _first_token_rows(bench: Bench, side: str, context: int, batch: int, other: Any) -> list[Row]:
    """One row; with `--copy-out` a second one for a recipe, whose layers are packed on the host meanwhile."""
    recipe = bench.subject.recipes.get(side)
    empty = Row(
        what=FIRST_TOKEN,
        side=side,
        model=bench.subject.name,
        recipe_fingerprint=None if recipe is None else recipe.fingerprint,
        context=context,
        batch=batch,
    )
    bench.progress.begin(f"prefill of {batch} × {context} tokens, {side}")
    if recipe is None:
        return [measured(bench, empty, partial(_time_transformers, bench, other))]
    rows = [measured(bench, empty, partial(_time_engine, bench, recipe))]
    if bench.options.copy_out:
        bench.progress.begin(f"prefill of {batch} × {context} tokens, {side}, copied to the host")
        rows.append(measured(bench, replace(empty, conditions={COPY_OUT: True}), partial(_time_engine, bench, recipe)))
    return rows


def _time_engine(bench: Bench, recipe: Recipe, empty: Row) -> Row:
    assert empty.context is not None and empty.batch is not None
    prompts = [bench.prompt(empty.context, index) for index in range(empty.batch)]
    run = EngineRun(bench, recipe, bool(empty.conditions.get(COPY_OUT)))
    peak = peak_bytes(bench.device, partial(run.run, prompts))
    for _ in range(max(0, bench.options.warmup - 1)):
        run.run(prompts)
    # a GPU is no slower for being looked at: a prompt of minutes need not run twice
    if bench.options.warmup or bench.device.type != "cuda":
        run.passes = _Passes()
    while len(run.passes.done_s) < bench.options.repeats:
        run.run(prompts)
    passes = run.passes
    row = replace(empty, time=summarize(passes.first_token_s))
    if bench.options.profile:
        row = replace(row, parts=profile(bench.device, partial(run.run, prompts)))
    figures = {
        "mean_first_token_s": summarize(passes.mean_first_token_s).median_s,
        "all_encoded_s": summarize(passes.done_s).median_s,
        "encoded_bytes": float(passes.encoded_bytes),
    }
    return _finished(bench, row, recipe, peak, figures if empty.batch > 1 else dict(list(figures.items())[1:]))


def _time_transformers(bench: Bench, other: Any, empty: Row) -> Row:
    assert empty.context is not None and empty.batch is not None
    prompts = [bench.prompt(empty.context, index) for index in range(empty.batch)]
    ids = torch.tensor(prompts, device=bench.device)
    action = partial(baseline.prefill, other, ids)
    peak = peak_bytes(bench.device, action)
    row = replace(empty, time=time_wall(bench.device, action, bench.options.warmup - 1, bench.options.repeats))
    return _finished(bench, row, None, peak, {})


def _finished(bench: Bench, row: Row, recipe: Recipe | None, peak: int, figures: dict[str, float]) -> Row:
    assert row.time is not None and row.context is not None and row.batch is not None
    flops = row.batch * prompt_flops(bench.subject.config, bench.subject.shape, recipe, row.context).of_model
    rate = flops / row.time.median_s
    own = {
        "tokens_per_s": row.batch * row.context / row.time.median_s,
        "peak_bytes": float(peak),
        "tflop_per_s": rate / 1e12,
        "share_of_matrix_rate": rate / bench.limits.gemm_flops_per_s,
    }
    bytes_moved = float(bench.model.weights.nbytes)
    return replace(row, floor=Floor.of(bench.limits, bytes_moved, flops), figures=own | figures)


def _beside_row(bench: Bench, label: str, context: int, num_tokens: int) -> Row:
    recipe = bench.subject.recipes[label]
    empty = Row(
        what=BESIDE,
        side=label,
        model=bench.subject.name,
        recipe_fingerprint=recipe.fingerprint,
        context=context,
        batch=1,
        conditions={"tokens": num_tokens},
    )
    return measured(bench, empty, partial(_time_beside, bench, recipe, num_tokens))


def _time_beside(bench: Bench, recipe: Recipe, num_tokens: int, empty: Row) -> Row:
    assert empty.context is not None
    long, short = bench.prompt(empty.context), bench.prompt(num_tokens, 1)
    run = EngineRun(bench, recipe)
    for _ in range(max(1, bench.options.warmup)):
        run.run([short])
    run.passes = _Passes()
    for _ in range(bench.options.repeats):
        run.run([short])
    alone = summarize(run.passes.first_token_s)
    run.beside(long, short)
    together = summarize([run.beside(long, short) for _ in range(bench.options.repeats)])
    figures = {"alone_s": alone.median_s, "beside_over_alone": together.median_s / alone.median_s}
    return replace(empty, time=together, figures=figures)
