"""The decode engine: one token a step for every running choice.

    open ──> Opened ──> add_layer (each layer) ──> commit ──> step, step, … ──> Finished
                                                        any time: cancel, or a fault ──> Finished or Failed

A step has two halves: it is launched (`launch`), and it is settled, when its tokens are read and told. With lookahead
the device never waits for the host in between: the next step is launched for the choices that go on before the tokens
of the one under way are read. A choice that those turn out to have ended was then computed in vain, and it leaves no
trace.

Everything that happens to a request is told by the events that `step` returns. Every request that `open` accepted ends
in exactly one FinishedEvent or FailedEvent, and by then its memory is free. Where a caller gives the epoch that it
means, another attempt under the same request id is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from time import perf_counter

import torch

from ...compression import make_cache
from ...compression.interfaces import EncodedLayer, Rope
from ...errors import FrameMismatch, InternalError, InvalidRequest, KvsluiceError, RequestCancelled
from ...models.drawing import DrawnToken
from ...models.model import Model
from ..metrics.figures import DecodeFigures
from ..model_shape import model_shape
from ..staging import Event as DeviceEvent
from .events import Event, FailedEvent, FinishedEvent, OpenedEvent, RowsEvent, TokensEvent
from .failures import typed
from .host_pages import HostPages
from .integrity import check_memory
from .kept_sessions import KeptSession, KeptSessions, SessionTurn
from .launch import LaunchedStep, Turn, launch
from .load import EngineLoad
from .offload import StoreTier
from .pages import PagePool
from .parking import Parking
from .quality import probe_steps
from .scheduler import Choice, Demand, Phase, Scheduler
from .sequence import (
    ChoiceRun,
    DecodeRequest,
    EmittedChoice,
    KeptRows,
    RequestRun,
    add_layer,
)
from .start import check_ranks, check_start, demand_of, start_choices
from .step import StepRunner
from .tiers import TierPolicy

__all__ = [
    "DecodeEngine",
    "DecodeRequest",
    "EmittedChoice",
    "Event",
    "FailedEvent",
    "FinishedEvent",
    "KeptRows",
    "OpenedEvent",
    "RowsEvent",
    "TokensEvent",
]


class DecodeEngine(EngineLoad):
    """Decodes requests whose prompts arrive as encoded layers. All methods are called from one thread.

    Args:
        capacity_bytes: what all caches together may hold.
        max_num_seqs: choices that run in one step.
        max_waiting: requests that may wait for memory.
        host: host memory for values of prompts, where they can lie there, and for parked requests; None = no such.
        mark: a point behind all that the calling thread has given the device, for rows that are to be kept.
        lookahead: whether a step is launched before the one under way is settled; what it says then comes a call of
            `step` later. Tokens are the same. None = on a CUDA device; elsewhere nothing is gained.
        session_bytes: what ended turns of sessions may leave for the next ones; 0 = nothing.
        tiers: how more requests take turns than the device holds, the others parked in `host`; None = they do not.
        quality_sample_rate: share of the steps of which a row is redone with full attention, to compare (`quality`).

    Attributes:
        runner, figures: runs the steps; what has been done so far.
    """

    def __init__(
        self,
        model: Model,
        capacity_bytes: int,
        max_num_seqs: int = 64,
        max_waiting: int = 64,
        host: HostPages | None = None,
        lookahead: bool | None = None,
        mark: Callable[[], DeviceEvent | None] = lambda: None,
        tiers: TierPolicy | None = None,
        session_bytes: int = 0,
        quality_sample_rate: float = 0.0,
    ) -> None:
        self.model, self._mark = model, mark
        self.lookahead = model.device.type == "cuda" if lookahead is None else lookahead
        self.shape = model_shape(model.config)
        self.host = host
        on_host = None if host is None else PagePool(host.capacity_bytes)
        self.scheduler = Scheduler(PagePool(capacity_bytes), max_num_seqs, max_waiting, on_host)
        self._sessions = KeptSessions(session_bytes, self.scheduler.pool, on_host)
        self.scheduler.sessions = self._sessions
        self.runner = StepRunner(model, self.shape, max_num_seqs)
        self._runs: dict[str, RequestRun] = {}
        self._events: list[Event] = []
        self.figures = probe_steps(self.runner, quality_sample_rate, DecodeFigures())
        self._under_way: LaunchedStep | None = None
        self._broken: Exception | None = None
        self._parking: Parking | None = None
        if host is not None and tiers is not None:
            self._parking = Parking(self.scheduler, tiers, host, model.device, self._runs, self._fail)

    def use_store(self, store: StoreTier) -> None:
        """From now on parked requests may move on to a store, as far as the tiers' policy says."""
        if self._parking is not None:
            self._parking.use_store(store, self._mark)

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything or has something to tell."""
        return bool(self._events or self._under_way or self._broken) or self.scheduler.has_eligible()

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
            InvalidRequest: the prompt is empty, a number of the recipe is open, or it is not for several ranks.
        """
        check_ranks(request.recipe, self.model.ranks)
        page_nbytes = None if self.host is None else self.host.page_nbytes
        return demand_of(request, self.shape, self.model.dtype.itemsize, page_nbytes)

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
            add_layer(run, encoded, self.model.config.num_layers, self.model.device, self._parking is not None)
        except Exception as exc:
            raise self._fail(request_id, exc) from exc

    @torch.inference_mode()
    def adopt(self, request_id: str, turn: SessionTurn, epoch: int | None = None) -> bool:
        """Give a request the cache that its session's last turn has left, if it is here and of use: `commit` follows,
        and no layers. False = it is to be restored.

        Raises:
            RequestCancelled: there is no such request (any more).
        """
        run = self._receiving(request_id, epoch)
        key = run.request.session_key
        run.adopted = None if key is None else self._sessions.take(key, turn, run.demand.total_bytes)
        if run.adopted is not None:
            run.cache, run.layers = run.adopted.cache, set(range(self.model.config.num_layers))
        return run.adopted is not None

    @torch.inference_mode()
    def commit(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        emitted: Sequence[EmittedChoice],
        epoch: int | None = None,
    ) -> int:
        """Start a request whose layers are all here. A fault ends the request and is raised as well.

        Returns how many tokens are replayed, over all choices.

        Args:
            emitted: of every choice in order, the tokens sent so far. The first came from prefill; further ones are
                replayed as decode steps and not sent again, but for those whose rows were kept.

        Raises:
            RequestCancelled: there is no such request (any more).
            FrameMismatch, InvalidRequest: see `start.check_start`.
        """
        run = self._receiving(request_id, epoch)
        config, run.prompt_ids = self.model.config, prompt_ids
        try:
            check_start(run, prompt_ids, emitted, config.num_layers, config.vocab_size)
            return self._start(run, prompt_ids, emitted)
        except Exception as exc:
            raise self._fail(request_id, exc) from exc

    def lengthen(self, request_id: str, choice: int, rows: float, epoch: int | None = None) -> None:
        """Rows of a choice are kept now: it may run so many more before it waits for the next ones. Infinite = nobody
        keeps them any more."""
        if self._find(request_id, epoch) is not None:
            self.scheduler.lengthen(Choice(request_id, choice), rows)
            self._admit()  # if it is parked, it may come back for that

    def grant(self, request_id: str, tokens: int, epoch: int | None = None) -> None:
        """Allow `tokens` ≥ 0 more to be sent. Without effect on a request that is gone or has no limit."""
        if tokens < 0:
            raise InvalidRequest("credits", f"got {tokens}", "at least 0")
        if self._find(request_id, epoch) is not None:
            self.scheduler.grant(request_id, tokens)
            self._admit()

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
        """Let in what fits, run one step of the choices whose turn it is. Returns what happened since the last call.

        Raises:
            Exception: the device failed, which the call before has told; nothing can be run any more.
        """
        if self._broken is not None:
            raise self._broken
        begun_s = perf_counter()
        self.runner.join()
        in_flight = () if self._under_way is None else self._under_way.turns
        self._admit({turn.choice.request_id for turn in in_flight})
        turns = [Turn(choice, self._runs[choice.request_id]) for choice in self.scheduler.next_batch()]
        if self._parking is not None and not turns and not in_flight:
            self._parking.wait()
        launched = launch(self.runner, turns, self.scheduler.replay_more) if turns else None
        if launched is not None:
            self._events += launched.rows_events(self._mark)
        before, self._under_way = self._under_way, launched
        if before is not None:
            self._settle(before)
        if launched is not None and (launched.has_faults or not self.lookahead):
            self._under_way = None
            self._settle(launched)
        self._admit()  # what ended may have made room, and the caller may wait until there is work
        if turns:
            self.figures.ran(len(turns), perf_counter() - begun_s, self.runner.hot_counts)
        events, self._events = self._events, []
        return events

    def check_integrity(self) -> None:
        """Assert that states, ledger and the memory really held agree, whatever is under way."""
        check_memory(self.scheduler, self._runs, self.host, self._parking, self._sessions)

    def _rope(self, num_prompt_tokens: int) -> Rope:
        model = self.model  # not the engine, which holds the caches that hold this
        return lambda x, positions: model.rotate(x, positions, num_prompt_tokens)

    def _admit(self, in_flight: Collection[str] | None = None) -> None:
        """Let in what fits; where a step begins, those move who are to, but for those of the one under way."""
        admit = self.scheduler.admit
        if self._parking is not None and in_flight is not None:
            admit = partial(self._parking.move, in_flight, admit)
        for request_id in admit():
            run = self._runs[request_id]
            request = run.request
            try:
                summed, length = self.model.over_ranks, request.num_prompt_tokens
                rope = self._rope(length)
                run.cache = make_cache(request.recipe, self.shape, length, rope, self.host, summed)
            except Exception as exc:
                self._fail(request_id, exc)
            else:
                self._events.append(OpenedEvent(request_id, request.epoch))
        if self._parking is not None:
            self._parking.overflow()

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

    def _start(self, run: RequestRun, prompt_ids: Sequence[int], emitted: Sequence[EmittedChoice]) -> int:
        """Returns how many tokens are replayed."""
        request, cache, config = run.request, run.cache, self.model.config
        assert cache is not None, "made when the request was let in"
        choices, turns = start_choices(run, cache, prompt_ids, emitted, config, self.runner.like)
        run.resident_bytes = cache.nbytes()
        run.cache, run.choices, run.adopted = None, choices, None
        replayed = sum(turn.replays for turn in turns.values())
        self.scheduler.start(request.request_id, turns)
        if not choices:
            self._finish(run)
        return replayed

    def _settle(self, step: LaunchedStep) -> None:
        """Tell what came of a step, and end what has ended."""
        try:
            tokens = step.read()
        except Exception as exc:
            self._broken, tokens = exc, [None] * len(step.turns)
            for turn in step.turns:
                turn.error = exc
        for turn, token in zip(step.turns, tokens, strict=True):
            error, turn.error = turn.error, None  # its traceback holds on to caches
            if error is None and token is not None and not (token.is_finite and token.is_valid):
                error = InternalError("decoding gave logits that are not finite")
            if error is not None and turn.choice.index in turn.run.choices:
                self._fail(turn.choice.request_id, error)
        for turn, token in zip(step.turns, tokens, strict=True):
            state = turn.run.choices.get(turn.choice.index)
            if state is not None:
                state.settled(turn.bytes_read, turn.rows_recalled)
                if token is not None:
                    self._emit(turn.run, turn.choice.index, state, token)
            elif turn.samples and self._runs.get(turn.choice.request_id) is turn.run:
                # it had ended before, and the request's other choices may have what its row has cost
                self.scheduler.grant(turn.choice.request_id, 1)

    def _emit(self, run: RequestRun, index: int, state: ChoiceRun, token: DrawnToken) -> None:
        request, first_index = run.request, state.num_emitted
        state.emit(token.token_id)
        self.figures.tokens += 1
        sampled = state.sampler.sampled(token, state.num_emitted)
        self._events.append(TokensEvent(request.request_id, request.epoch, index, first_index, (sampled,)))
        if sampled.finish_reason:
            self._end_choice(run, index)

    def _end_choice(self, run: RequestRun, index: int) -> None:
        request, state = run.request, run.choices[index]
        is_here = self.scheduler.is_settled(request.request_id)
        run.drop_choice(index)
        if self.scheduler.end_choice(Choice(request.request_id, index)):
            self._finish(run)
            if request.session_key is not None and is_here:
                self._sessions.keep(request.session_key, KeptSession.of(run, state))

    def _finish(self, run: RequestRun) -> None:
        request = run.request
        self._forget(request.request_id)
        took = (run.resident_bytes, run.bytes_read, run.num_steps, run.rows_recalled)
        self._events.append(FinishedEvent(request.request_id, request.epoch, *took))

    def _forget(self, request_id: str) -> RequestRun | None:
        if self._parking is not None:
            self._parking.drop(request_id)
        return self._runs.pop(request_id, None)

    def _fail(self, request_id: str, exc: Exception) -> KvsluiceError:
        """End a request, free what it holds and tell, unless it has ended. Returns the error that `exc` stands for."""
        error = typed(exc, request_id, self.model.ranks)
        run = self._forget(request_id)
        if run is None:
            return error
        self.figures.failed(exc)
        if self.scheduler.phase(request_id) is not None:  # a fault may have come while it was ending
            self.scheduler.end_request(request_id)
        run.cache = run.adopted = None
        run.choices.clear()
        self._events.append(FailedEvent(request_id, run.request.epoch, error))
        return error
