"""The prefill engine: one pack of work items a step, all prompts interleaved.

A step takes the items that the batcher planned (one layer, several prompts), runs the linear maps on all their rows at
once and attention prompt by prompt, and hands every layer over that became final with it. What a row is computed from
is fixed by its own prompt, so packing changes results by no more than the matrix library's rounding.

Memory: c x max_pack_tokens for the pack, and for every started prompt of N rows N x (hidden row + position + one
layer's keys after RoPE and values + keys before RoPE where the recipe packs those): no more than hidden, Q, K and V
rows and a position. On a GPU, where a layer is encoded beside the next one, that is two layers' keys and values, see
`encoding.py`. An encoded layer takes no room beside that: rows that are kept as they are get handed over, keys go
before values are packed, and encoding works in blocks of rows, which count as part of c. Scoring adds a few floats a
row and query head; attention's explicit mask on CPU, for each row, up to 5 bytes x chunk_tokens. Recipes that factor
layers together hold the rows of one group of layers. Recipes with recall send the hidden rows that go no further with
the layer that selects: packed, a half or a quarter of what they take in bfloat16, and gone with that layer. See
`state.py`; `benchmarks/prefill_memory.py` measures it. What prompts share lies in host memory of a fixed size
(`prefix_memory.py`); on the device it takes a chunk's rows.

A pack that fails is run again prompt by prompt, so that only those fail which fail alone; the others lose nothing but
time, for rows are computed from their own prompt. What an error's traceback refers to is let go of with its prompt.

In the last layer only the last row goes on, so only that row's attention and MLP are computed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from ...errors import DuplicateRequest, InternalError, InvalidRequest, KvsluiceError, RequestCancelled
from ...models.model import Model
from ...models.sampling import PromptIds, SamplerState
from ..metrics.figures import PrefillFigures
from ..model_shape import model_shape
from ..telemetry import about, where
from .batcher import Batcher, WorkItem
from .encoding import Encoder, make_encoder
from .flops import FlopCount, head_flops, item_flops, layer_flops
from .job import PrefillJob, let_go
from .pace import make_pace
from .pack import Outcome, run_pack
from .parallel import Lead
from .prefix_memory import PrefixMemory
from .prefixes import PromptPrefix, make_prefix_cache
from .state import PrefillSink, Prompt, sample_first

__all__ = ["PrefillEngine", "PrefillJob", "PrefillSink"]

logger = logging.getLogger(__name__)


@dataclass
class _Running:
    job: PrefillJob
    sink: PrefillSink
    samplers: list[SamplerState]
    prefix: PromptPrefix | None
    on_found: Callable[[int], None]
    count: FlopCount
    prompt: Prompt | None = None  # made when its first item runs

    def first_row(self, layer: int) -> int:
        """The first row that runs in a layer."""
        return 0 if self.prefix is None or layer >= self.prefix.kept.layers else self.prefix.num_rows


class PrefillEngine:
    """Runs prompts. All methods are called from one thread.

    Args:
        chunk_tokens: rows of a work item.
        max_pack_tokens: rows of a step.
        max_active_tokens: prompt rows that may hold memory at once (a longer prompt runs alone).
        patience: how much a prompt may be overtaken, see `batcher.py`.
        encoder: where layers are encoded; None = by the device, see `encoding.py`.
        prefix_memory: for what prompts share, see `prefixes.py`; None = they share nothing.

    Attributes:
        figures: what has been done so far.
        prefixes: what prompts share.
    """

    def __init__(
        self,
        model: Model,
        chunk_tokens: int = 512,
        max_pack_tokens: int = 2048,
        max_active_tokens: int = 262_144,
        patience: float = 1.0,
        encoder: Encoder | None = None,
        prefix_memory: PrefixMemory | None = None,
    ) -> None:
        self.model = model
        self._encoder = encoder or make_encoder(model.device)
        self._pace = make_pace(model.device)
        self._lead = None if model.ranks is None else Lead(model.ranks)
        self.shape = model_shape(model.whole)
        self._batcher = Batcher(model.config.num_layers, chunk_tokens, max_pack_tokens, max_active_tokens, patience)
        self._running: dict[str, _Running] = {}
        self.prefixes = make_prefix_cache(model, self.shape, chunk_tokens, prefix_memory)
        self.figures = PrefillFigures()

    @property
    def num_pending_tokens(self) -> int:
        """Work left, in prompt tokens through the whole model."""
        return self._batcher.num_pending_tokens

    @property
    def num_requests(self) -> int:
        """Prompts that are queued or running."""
        return len(self._running)

    def submit(
        self,
        job: PrefillJob,
        sink: PrefillSink,
        on_found: Callable[[int], None] = lambda num_tokens: None,
        count: FlopCount | None = None,
    ) -> None:
        """Queue a prompt; from now on its sink gets exactly one `on_done` or `on_error`.

        Args:
            on_found: told, before the first call of the sink, how many of the prompt's tokens are not run because an
                earlier prompt began with them.
            count: is told what the prompt takes, all of it by the sink's last call.

        Raises:
            DuplicateRequest: a prompt of this request is here already.
            InvalidRequest: the prompt is empty, an id in the prompt or in the sampling parameters is outside the
                vocabulary, or the recipe is not resolved.
        """
        if job.request_id in self._running:
            raise DuplicateRequest(f"request {job.request_id} is already running")
        if not job.prompt_ids:
            raise InvalidRequest("prompt", "is empty", "at least one token")
        config, params = self.model.config, job.sampling
        vocab_size = config.vocab_size
        if min(job.prompt_ids) < 0 or max(job.prompt_ids) >= vocab_size:
            raise InvalidRequest("prompt", "holds a token id outside the vocabulary", f"0 to {vocab_size - 1}")
        job.recipe.check_resolved()
        prompt = PromptIds(job.prompt_ids)
        samplers = [
            SamplerState(params, choice, prompt, vocab_size, config.eos_token_ids) for choice in range(params.n)
        ]
        shared = self.prefixes
        prefix = None if shared is None else shared.open(job.tenant, job.prompt_ids, job.recipe)
        running = _Running(job, sink, samplers, prefix, on_found, count or FlopCount())
        self._batcher.add(job.request_id, len(job.prompt_ids))
        self._running[job.request_id] = running
        self._found(running)

    def stop(self) -> None:
        """Have the other ranks end, if there are any."""
        if self._lead is not None:
            self._lead.stop()

    def cancel(self, request_id: str, sink: PrefillSink | None = None) -> bool:
        """End a prompt before its next item. False when it is not here (any more), or runs for another `sink`."""
        running = self._running.get(request_id)
        if running is None or (sink is not None and running.sink is not sink):
            return False
        self._fail(request_id, RequestCancelled(f"request {request_id} was cancelled"))
        return True

    @torch.no_grad()
    def step(self) -> bool:
        """Run one pack. False when nothing can run: no prompts, or all are held back by their sinks."""
        if self._encoder.overlaps:
            self._hand_over_encoded()
        self._look_for_prefixes()
        planned = self._batcher.plan(self._is_ready)
        if not planned:
            return self._hand_over_first()
        begun_s, begun = perf_counter(), [item for item in planned if self._begin(item)]
        # a sink may have cancelled another prompt meanwhile
        done = self._run_isolated([item for item in begun if item.request_id in self._running])
        for item in done:
            self._count(item)
        if self._pace is not None:
            self._pace.launched()
        for request_id in self._batcher.advance(done):
            try:
                self._finish_layer(request_id)
            except Exception as exc:
                self._fail(request_id, exc)
        self.figures.ran(sum(item.end - item.begin for item in done), perf_counter() - begun_s)
        return True

    def _count(self, item: WorkItem) -> None:
        running = self._running[item.request_id]
        num_rows = self._prompt(item.request_id).num_rows
        recipe = running.job.recipe
        running.count.add(item_flops(self.model.whole, self.shape, recipe, item.layer, num_rows, item.begin, item.end))

    def _look_for_prefixes(self) -> None:
        """Find what came to be known since prompts were submitted. Not a part of `step`: an error that a sink keeps
        would keep that frame's prompts, too."""
        for running in self._running.values():
            if running.prefix is not None and running.prompt is None and running.prefix.look():
                self._found(running)

    def _is_ready(self, request_id: str) -> bool:
        try:
            return self._running[request_id].sink.ready()
        except Exception as exc:
            self._fail(request_id, exc)
            return False

    def _begin(self, item: WorkItem) -> bool:
        """Prepare what the first item of a layer needs. False when the prompt failed or ended over it."""
        running = self._running.get(item.request_id)
        if running is None:
            return False
        if item.begin > running.first_row(item.layer):
            return True
        try:
            if running.prompt is None:
                running.prompt = self._first_begun(running)
            running.prompt.begin_layer()
            running.sink.on_layer_start(item.layer)
        except Exception as exc:
            self._fail(item.request_id, exc)
        return item.request_id in self._running

    def _first_begun(self, running: _Running) -> Prompt:
        job, prefix = running.job, running.prefix
        if self.prefixes is not None:
            num_found = running.first_row(0)
            self.figures.looked_up(len(job.prompt_ids), num_found)
            running.on_found(num_found)
        if prefix is not None:
            prefix.start()
        prompt = Prompt(self.model, self.shape, job.prompt_ids, job.recipe, prefix)
        if self._lead is not None:
            self._lead.begin(job.request_id, job.prompt_ids, job.recipe)
        return prompt

    def _found(self, running: _Running) -> None:
        if running.prefix is not None and running.prefix.num_rows:
            self._batcher.found(running.job.request_id, running.prefix.num_rows, running.prefix.kept.layers)

    def _run(self, items: Sequence[WorkItem]) -> Outcome:
        """See `run_pack`."""
        if self._lead is not None:
            self._lead.run(items)
        return run_pack(self.model, {item.request_id: self._prompt(item.request_id) for item in items}, items)

    def _run_isolated(self, items: Sequence[WorkItem]) -> list[WorkItem]:
        """Run a pack; where it fails, each of its prompts alone. Returns the items of those that did not fail.

        Raises:
            Exception: it failed, and other ranks have waited in vain for this one's sums.
        """
        by_prompt: dict[str, list[WorkItem]] = {}
        for item in items:
            by_prompt.setdefault(item.request_id, []).append(item)
        packed = self._run_together(items) if len(by_prompt) > 1 else None
        done: list[WorkItem] = []
        for request_id, own in by_prompt.items():
            try:
                outcome = self._run(own) if packed is None else packed
                for write in outcome[request_id]:
                    write.apply()
            except Exception as exc:
                if self._lead is not None:
                    raise
                self._fail(request_id, exc)
            else:
                done += own
        return done

    def _run_together(self, items: Sequence[WorkItem]) -> Outcome | None:
        try:
            return self._run(items)
        except Exception as exc:
            if self._lead is not None:
                raise
            logger.warning("a pack failed (%s), each of its prompts runs alone now", type(exc).__name__)
            let_go(exc)
            return None

    def _finish_layer(self, request_id: str) -> None:
        running = self._running.get(request_id)
        if running is None:  # another prompt's sink has cancelled it
            return
        prompt = self._prompt(request_id)
        is_last = prompt.layer + 1 == self.model.config.num_layers
        sampled = sample_first(self.model, prompt.last_row(), running.samplers) if is_last else None
        if prompt.prefix is not None:
            prompt.prefix.settle(prompt.layer, prompt.hidden)
        if sampled is not None:
            running.count.add(head_flops(self.model.whole))
            self.figures.began(len(running.job.prompt_ids))
            running.sink.on_first_tokens(sampled)
            if request_id not in self._running:  # the sink has cancelled it
                return
            if all(token.finish_reason for token in sampled) and not running.job.resumed:
                self._end(request_id, lambda sink: sink.on_done())
                return
        self._hand_over(request_id)  # the layer before, where it was encoded beside this one
        if request_id not in self._running:
            return
        obs = prompt.release_layer()
        prompt.encode_layer(self._encoder, obs if self._lead is None else self._lead.finish(request_id, obs))
        running.count.add(layer_flops(self.shape, running.job.recipe, prompt.layer, len(running.job.prompt_ids)))
        if is_last or not self._encoder.overlaps or prompt.selects_rows:
            self._hand_over(request_id)
        if is_last:
            self._end(request_id, lambda sink: sink.on_done())
        elif request_id in self._running:  # the sink may have cancelled it
            prompt.layer += 1
            self._batcher.next_layer(request_id, prompt.num_rows)

    def _hand_over(self, request_id: str) -> None:
        """Give a prompt's sink what is being encoded for it, if anything is. Waits for that."""
        running = self._running[request_id]
        prompt = running.prompt
        if prompt is None or not prompt.is_encoding:
            return
        ready, selected = prompt.take_encoded()
        if selected is not None:
            prompt.keep_rows(selected)
            if self._lead is not None:
                self._lead.select(request_id, selected)
        for encoded in ready:
            if request_id in self._running:
                running.sink.on_layer(encoded)

    def _hand_over_encoded(self) -> None:
        """Do so for every prompt where it needs no waiting."""
        for request_id, running in list(self._running.items()):
            if request_id in self._running and running.prompt is not None and running.prompt.is_encoded:
                self._hand_over_or_fail(request_id)

    def _hand_over_first(self) -> bool:
        """Do so for one prompt, where the engine has nothing else to do. False when there is none."""
        for request_id, running in self._running.items():
            if running.prompt is not None and running.prompt.is_encoding:
                self._hand_over_or_fail(request_id)
                return True
        return False

    def _hand_over_or_fail(self, request_id: str) -> None:
        try:
            self._hand_over(request_id)
        except Exception as exc:
            self._fail(request_id, exc)

    def _prompt(self, request_id: str) -> Prompt:
        prompt = self._running[request_id].prompt
        assert prompt is not None, "made with the prompt's first item"
        return prompt

    def _fail(self, request_id: str, exc: Exception) -> None:
        if isinstance(exc, KvsluiceError):
            error = exc
        else:
            logger.error("prefill of request %s failed: %s", request_id, where(exc), extra=about(request_id))
            error = InternalError(f"prefill failed: {type(exc).__name__}")
        if request_id in self._running:
            self.figures.failed(exc)
        let_go(exc)
        self._end(request_id, lambda sink: sink.on_error(error))

    def _end(self, request_id: str, last_call: Callable[[PrefillSink], None]) -> None:
        """Forget a prompt, then make its sink's last call. Without effect when it has ended already."""
        running = self._running.pop(request_id, None)
        if running is None:
            return
        self._batcher.remove(request_id)
        if running.prefix is not None:
            running.prefix.close()
        if self._lead is not None and running.prompt is not None:
            self._lead.drop(request_id)
        try:
            last_call(running.sink)
        except Exception as exc:
            logger.error(
                "the receiver of request %s failed in its last call: %s",
                request_id,
                where(exc),
                extra=about(request_id),
            )
