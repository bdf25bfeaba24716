"""The decode engine: one token a step for every running choice.

    open ──> Opened ──> add_layer (each layer) ──> commit ──> step, step, … ──> Finished
                                                        any time: cancel, or a fault ──> Finished or Failed

Everything that happens to a request is told by the events that `step` returns. Every request that `open` accepted ends
in exactly one FinishedEvent or FailedEvent, and by then its memory is free. Where a caller gives the epoch that it
means, another attempt under the same request id is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...compression import bound_nbytes, host_pages, make_cache
from ...compression.interfaces import EncodedLayer, Rope
from ...errors import FrameMismatch, InternalError, InvalidRequest, KvsluiceError, RequestCancelled
from ...models.model import Model
from ...models.sampling import PromptIds, Sampled, SamplerState, sample_rows
from ..model_shape import model_shape
from .events import Event, FailedEvent, FinishedEvent, OpenedEvent, TokensEvent
from .host_pages import HostPages
from .pages import PagePool
from .scheduler import Choice, Demand, Phase, Scheduler
from .sequence import ChoiceRun, DecodeRequest, EmittedChoice, RequestRun, add_layer, check_start, typed
from .step import StepRunner

__all__ = [
    "DecodeEngine",
    "DecodeRequest",
    "EmittedChoice",
    "Event",
    "FailedEvent",
    "FinishedEvent",
    "OpenedEvent",
    "TokensEvent",
]


class DecodeEngine:
    """Decodes requests whose prompts arrive as encoded layers. All methods are called from one thread.

    Args:
        capacity_bytes: what all caches together may hold.
        max_num_seqs: choices that run in one step.
        max_waiting: requests that may wait for memory.
        host: host memory that values of prompts lie in where they can; None = all lie on the device.

    Attributes:
        runner: runs the steps.
    """

    def __init__(
        self,
        model: Model,
        capacity_bytes: int,
        max_num_seqs: int = 64,
        max_waiting: int = 64,
        host: HostPages | None = None,
    ) -> None:
        self.model = model
        self.shape = model_shape(model.config)
        self.host = host
        on_host = None if host is None else PagePool(host.capacity_bytes)
        self.scheduler = Scheduler(PagePool(capacity_bytes), max_num_seqs, max_waiting, on_host)
        self.runner = StepRunner(model, self.shape)
        self._runs: dict[str, RequestRun] = {}
        self._events: list[Event] = []

    @property
    def num_running(self) -> int:
        """Choices that have started and not ended."""
        return self.scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that wait for memory."""
        return self.scheduler.num_waiting

    @property
    def capacity_bytes(self) -> int:
        return self.scheduler.pool.capacity_bytes

    @property
    def free_bytes(self) -> int:
        return self.scheduler.pool.free_bytes

    @property
    def host_capacity_bytes(self) -> int:
        """Host memory that values may lie in."""
        return 0 if self.scheduler.host is None else self.scheduler.host.capacity_bytes

    @property
    def host_free_bytes(self) -> int:
        return 0 if self.scheduler.host is None else self.scheduler.host.free_bytes

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything or has something to tell."""
        return bool(self._events) or self.scheduler.has_eligible()

    def open(self, request: DecodeRequest) -> None:
        """Reserve what a request may need, now or as soon as it is free; an OpenedEvent tells when.

        Raises:
            DuplicateRequest: a request of this id is here already.
            InvalidRequest: it could never fit, a number is out of range, or the recipe is not resolved.
            Overloaded: it would have to wait and the queue is full.
        """
        if request.credits is not None and request.credits < 0:
            raise InvalidRequest("credits", f"got {request.credits}", "at least 0")
        demand = self.demand(request)
        self.scheduler.enqueue(request.request_id, demand, request.credits)
        self._runs[request.request_id] = RequestRun(request, demand)
        self._admit()

    def demand(self, request: DecodeRequest) -> Demand:
        """What admission reserves for a request.

        Raises:
            InvalidRequest: the prompt is empty, or a number of the recipe is open.
        """
        if request.num_prompt_tokens < 1:
            raise InvalidRequest("num_prompt_tokens", f"got {request.num_prompt_tokens}", "at least 1")
        request.recipe.check_resolved()
        sampling, itemsize = request.sampling, self.model.dtype.itemsize
        recipe, num_tokens = request.recipe, request.num_prompt_tokens
        page_nbytes = None if self.host is None else self.host.page_nbytes
        one, two = (
            bound_nbytes(recipe, self.shape, num_tokens, sampling.max_tokens, num_choices, itemsize, page_nbytes)
            for num_choices in (1, 2)
        )
        tail_bytes, host_bytes = two - one, 0
        if page_nbytes is not None:
            host_bytes = page_nbytes * host_pages(recipe, self.shape, num_tokens, itemsize, page_nbytes)
        return Demand(one - tail_bytes, tail_bytes, sampling.n, host_bytes)

    @torch.inference_mode()
    def add_layer(
        self, request_id: str, encoded: EncodedLayer, epoch: int | None = None, wait: Callable[[], None] | None = None
    ) -> None:
        """Place an arrived layer. A fault ends the request and is raised as well.

        Args:
            wait: has the device wait for the layer's tensors, where they are still on their way to it.

        Raises:
            RequestCancelled: there is no such request (any more).
            FrameMismatch: the layer does not fit; see `sequence.add_layer`.
        """
        run = self._receiving(request_id, epoch)
        try:
            if wait is not None:
                wait()
            add_layer(run, encoded, self.model.config.num_layers, self.model.device)
        except Exception as exc:
            raise self._fail(request_id, exc) from exc

    @torch.inference_mode()
    def commit(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        emitted: Sequence[EmittedChoice],
        epoch: int | None = None,
    ) -> None:
        """Start a request whose layers are all here. A fault ends the request and is raised as well.

        Args:
            emitted: of every choice in order, the tokens sent so far. The first came from prefill; further ones are
                replayed as decode steps and not sent again.

        Raises:
            RequestCancelled: there is no such request (any more).
            FrameMismatch, InvalidRequest: see `sequence.check_start`.
        """
        run = self._receiving(request_id, epoch)
        config = self.model.config
        try:
            check_start(run, prompt_ids, emitted, config.num_layers, config.vocab_size)
            self._start(run, prompt_ids, emitted)
        except Exception as exc:
            raise self._fail(request_id, exc) from exc

    def grant(self, request_id: str, tokens: int, epoch: int | None = None) -> None:
        """Allow `tokens` ≥ 0 more to be sent. Without effect on a request that is gone or has no limit."""
        if tokens < 0:
            raise InvalidRequest("credits", f"got {tokens}", "at least 0")
        if self._find(request_id, epoch) is not None:
            self.scheduler.grant(request_id, tokens)

    def cancel(self, request_id: str, choice: int | None = None, epoch: int | None = None) -> bool:
        """End a request with a FailedEvent, or one choice of it as if it had finished. False when it is not here."""
        run = self._find(request_id, epoch)
        if run is None or (choice is not None and not 0 <= choice < run.request.sampling.n):
            return False
        if choice is None:
            self._fail(request_id, RequestCancelled(f"request {request_id} was cancelled"))
        elif choice in run.choices:
            self._end_choice(run, choice)
        elif self.scheduler.phase(request_id) is not Phase.RUNNING:
            run.cancelled.add(choice)
        else:
            return False
        self._admit()
        return True

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Let in what fits, run one step of the choices whose turn it is. Returns what happened since the last call."""
        self._admit()
        self.runner.join()
        turns = self._prepare(self.scheduler.next_batch())
        if turns:
            try:
                logits = self._forward(turns)
            except Exception as exc:
                for request_id in dict.fromkeys(turn.choice.request_id for turn in turns):
                    self._fail(request_id, exc)
            else:
                self._advance(turns, logits)
        self._admit()  # what ended may have made room, and the caller may wait until there is work
        events, self._events = self._events, []
        return events

    def check_integrity(self) -> None:
        """Assert that states, ledger and the memory really held agree."""
        self.scheduler.check_integrity()
        sizes = self.scheduler.pool.regions()
        for request_id, run in self._runs.items():
            assert self.scheduler.phase(request_id) is not None, "every request has a state"
            assert set(run.choices) == set(self.scheduler.live_choices(request_id)), "every choice has a turn"
            reserved = sum(size for region, size in sizes.items() if region.request_id == request_id)
            assert run.held_bytes() <= reserved, f"{request_id} holds {run.held_bytes()} of {reserved} bytes"
        assert {region.request_id for region in sizes} <= set(self._runs), "no memory without a request"
        if self.host is not None:
            self.host.check_integrity()
            held = sum(run.host_bytes() for run in self._runs.values())
            taken = (self.host.num_pages - self.host.num_free) * self.host.page_nbytes
            assert held == taken, f"requests hold {held} of {taken} bytes of host memory"

    def _rope(self, num_prompt_tokens: int) -> Rope:
        model = self.model  # not the engine, which holds the caches that hold this
        return lambda x, positions: model.rotate(x, positions, num_prompt_tokens)

    def _admit(self) -> None:
        for request_id in self.scheduler.admit():
            run = self._runs[request_id]
            request = run.request
            try:
                rope = self._rope(request.num_prompt_tokens)
                run.cache = make_cache(request.recipe, self.shape, request.num_prompt_tokens, rope, self.host)
            except Exception as exc:
                self._fail(request_id, exc)
            else:
                self._events.append(OpenedEvent(request_id, request.epoch))

    def _find(self, request_id: str, epoch: int | None) -> RequestRun | None:
        run = self._runs.get(request_id)
        return run if run is not None and epoch in (None, run.request.epoch) else None

    def _receiving(self, request_id: str, epoch: int | None) -> RequestRun:
        run = self._find(request_id, epoch)
        if run is None:
            raise RequestCancelled(f"request {request_id} is not open here")
        phase = self.scheduler.phase(request_id)
        if phase is not Phase.RECEIVING:
            assert phase is not None, "every request has a state"
            raise FrameMismatch(f"request {request_id} takes no layers while it is {phase.value}")
        return run

    def _start(self, run: RequestRun, prompt_ids: Sequence[int], emitted: Sequence[EmittedChoice]) -> None:
        request, cache, config = run.request, run.cache, self.model.config
        assert cache is not None, "made when the request was let in"
        live = [i for i, c in enumerate(emitted) if not c.finish_reason and i not in run.cancelled]
        prompt, choices = PromptIds(prompt_ids), {}
        for index in live:
            sampler = SamplerState(request.sampling, index, prompt, config.vocab_size, config.eos_token_ids)
            own = cache if index == live[-1] else cache.fork()
            choices[index] = ChoiceRun(own, sampler, request.num_prompt_tokens, emitted[index].token_ids)
        run.resident_bytes = cache.nbytes()
        run.cache, run.choices = None, choices
        self.scheduler.start(request.request_id, {i: len(emitted[i].token_ids) - 1 for i in choices})
        if not choices:
            self._finish(run)

    def _prepare(self, choices: Sequence[Choice]) -> list[_Turn]:
        turns = []
        for choice in choices:
            run = self._runs.get(choice.request_id)
            if run is None:  # another choice of it failed just now
                continue
            state = run.choices[choice.index]
            try:
                turns.append(_Turn(choice, state, *state.next_row()))
            except Exception as exc:
                self._fail(choice.request_id, exc)
        return [turn for turn in turns if turn.choice.request_id in self._runs]

    def _forward(self, turns: Sequence[_Turn]) -> Tensor:
        """Run one row of each turn. Returns logits float32 [turns, V]."""
        rows = [turn.state.step_row(turn.token_id, turn.position) for turn in turns]
        logits = self.runner.logits(rows)
        self.runner.prepare(rows)
        return logits

    def _advance(self, turns: Sequence[_Turn], logits: Tensor) -> None:
        sampling = []
        for i, (turn, is_finite) in enumerate(zip(turns, torch.isfinite(logits).all(dim=1).tolist(), strict=True)):
            samples = turn.state.samples_next
            turn.state.stepped()
            error = turn.state.guarded.error
            if error is None and samples and not is_finite:
                error = InternalError("decoding gave logits that are not finite")
            if error is not None:
                self._fail(turn.choice.request_id, error)
            elif samples:
                sampling.append(i)
        # another choice of a request may have failed just now
        sampling = [i for i in sampling if turns[i].choice.request_id in self._runs]
        if sampling:
            self._sample([turns[i] for i in sampling], logits if len(sampling) == len(turns) else logits[sampling])

    def _sample(self, turns: Sequence[_Turn], logits: Tensor) -> None:
        """Draw the next token of each turn, from logits float32 [turns, V]."""
        try:
            drawn = sample_rows([turn.state.sampler for turn in turns], logits)
        except Exception as exc:
            for request_id in dict.fromkeys(turn.choice.request_id for turn in turns):
                self._fail(request_id, exc)
            return
        for turn, sampled in zip(turns, drawn, strict=True):
            run = self._runs.get(turn.choice.request_id)
            if run is None:
                continue
            if isinstance(sampled, KvsluiceError):
                self._fail(turn.choice.request_id, sampled)
            else:
                self._emit(run, turn, sampled)

    def _emit(self, run: RequestRun, turn: _Turn, sampled: Sampled) -> None:
        request, index, state = run.request, turn.choice.index, turn.state
        self._events.append(TokensEvent(request.request_id, request.epoch, index, state.num_emitted, (sampled,)))
        state.emit(sampled.token_id)
        if sampled.finish_reason:
            self._end_choice(run, index)

    def _end_choice(self, run: RequestRun, index: int) -> None:
        run.drop_choice(index)
        if self.scheduler.end_choice(Choice(run.request.request_id, index)):
            self._finish(run)

    def _finish(self, run: RequestRun) -> None:
        request = run.request
        del self._runs[request.request_id]
        self._events.append(
            FinishedEvent(request.request_id, request.epoch, run.resident_bytes, run.bytes_read, run.num_steps)
        )

    def _fail(self, request_id: str, exc: Exception) -> KvsluiceError:
        """End a request, free what it holds and tell, unless it has ended. Returns the error that `exc` stands for."""
        error = typed(exc, request_id)
        run = self._runs.pop(request_id, None)
        if run is None:
            return error
        if self.scheduler.phase(request_id) is not None:  # a fault may have come while it was ending
            self.scheduler.end_request(request_id)
        run.cache = None
        run.choices.clear()
        self._events.append(FailedEvent(request_id, run.request.epoch, error))
        return error


@dataclass(frozen=True)
class _Turn:
    """One choice's part in a step."""

    choice: Choice
    state: ChoiceRun
    token_id: int
    position: int
