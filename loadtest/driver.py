"""Sends requests when they are due and notes what becomes of them.

Open loop: nothing waits for an answer, and latencies count from when a request was due, not from when the client came
to send it, so that a stall of the service (or of the client) is seen by all requests that it held up (coordinated
omission). Closed loop: so many conversations at once, each followed by the next; a request is due when its turn comes.

Times are those of the event loop, so that a loop with a clock of its own runs everything in no time.
"""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import DeadlineExceeded, KvsluiceError, Overloaded
from .outcomes import CANCELLED, DEADLINE, DROPPED, FAILED, SERVED, SHED, ClientHealth, LogHistogram, Outcome, Recording
from .transport import Answer, Request, Transport
from .workload import Conversation, Turn, Workload

PULSE_S = 0.02  # between two looks at whether the event loop keeps up
GRACE_S = 5.0  # for which a service that is past a request's deadline is waited for


@dataclass(frozen=True)
class Limits:
    """Bounds of a run.

    Attributes:
        max_concurrency: requests that may be open at once; further ones wait, and their latency grows. None = any.
        closed_loop: as many conversations as `max_concurrency`, each followed by the next.
        duration_s: after which nothing new is begun, or None.
        deadline_s: of a request, from when it is sent.
        max_open: open requests from which on the client drops what is due, and the run is worth nothing.
        late_after_s: from which on a request counts as sent late.
        history: conversations send all earlier turns again, instead of naming a session.
    """

    deadline_s: float
    max_concurrency: int | None = None
    closed_loop: bool = False
    duration_s: float | None = None
    max_open: int = 10_000
    late_after_s: float = 0.05
    history: bool = False


class Observer(Protocol):
    """Watches a run go on."""

    def began(self) -> None: ...
    def tokens(self, count: int) -> None: ...
    def ended(self, outcome: Outcome) -> None: ...


class Unwatched:
    """Nobody."""

    def began(self) -> None:
        pass

    def tokens(self, count: int) -> None:
        pass

    def ended(self, outcome: Outcome) -> None:
        pass


class Driver:
    """One run. `run` may be cancelled; what there is by then is returned, marked as interrupted."""

    def __init__(self, transport: Transport, limits: Limits, observer: Observer | None = None) -> None:
        self._transport, self._limits = transport, limits
        self._observer = observer or Unwatched()
        self._recording = Recording(ClientHealth(limits.late_after_s), closed_loop=limits.closed_loop)
        self._lags = LogHistogram()
        self._slots = None if limits.max_concurrency is None else asyncio.Semaphore(limits.max_concurrency)
        self._open = 0
        self._start_s = 0.0

    async def run(self, workload: Workload) -> Recording:
        """Send the load and wait until all of it has ended."""
        self._start_s = asyncio.get_running_loop().time()
        began_busy_s = time.thread_time()
        pulse = asyncio.create_task(self._pulse())
        tasks: set[asyncio.Task[None]] = set()
        try:
            if self._limits.closed_loop:
                shared = iter(workload)
                tasks |= {asyncio.create_task(self._loop(shared)) for _ in range(self._limits.max_concurrency or 1)}
            else:
                await self._arrivals(iter(workload), tasks)
            while tasks:
                done, _ = await asyncio.wait(tasks)
                tasks -= done
                for task in done:
                    task.result()
        except asyncio.CancelledError:
            # the caller has had enough; what was measured is still worth something
            self._recording.interrupted = True
        finally:
            for task in (pulse, *tasks):
                task.cancel()
            await asyncio.gather(pulse, *tasks, return_exceptions=True)
        self._note_health(began_busy_s)
        self._recording.left_out = workload.num_left_out
        return self._recording

    def _now(self) -> float:
        """Seconds since the start of the run."""
        return asyncio.get_running_loop().time() - self._start_s

    async def _until(self, due_s: float) -> None:
        # sleeps even when it is late: whoever is under way must get on
        await asyncio.sleep(max(0.0, due_s - self._now()))

    async def _arrivals(self, conversations: Iterator[Conversation], tasks: set[asyncio.Task[None]]) -> None:
        limits = self._limits
        for conversation in conversations:
            if limits.duration_s is not None and conversation.arrival_s >= limits.duration_s:
                return
            await self._until(conversation.arrival_s)
            if len(tasks) >= limits.max_open:
                self._drop(conversation)
                continue
            task = asyncio.create_task(self._converse(conversation, conversation.arrival_s))
            tasks.add(task)
            task.add_done_callback(lambda done: None if done.cancelled() or done.exception() else tasks.discard(done))

    async def _loop(self, conversations: Iterator[Conversation]) -> None:
        for conversation in conversations:
            if self._limits.duration_s is not None and self._now() >= self._limits.duration_s:
                return
            await self._converse(conversation, self._now())

    async def _converse(self, conversation: Conversation, due_s: float) -> None:
        told: list[int] = []
        for place, turn in enumerate(conversation.turns):
            if place:
                due_s = self._now() + turn.think_s
                await self._until(due_s)
            outcome, answer = await self._ask(conversation, turn, place, due_s, told)
            if outcome.status != SERVED or answer is None:
                # a conversation cannot go on without its answer
                return
            if self._limits.history:
                told += [int(index) for index in turn.prompt if isinstance(index, int)]
                told += answer.token_ids or ()

    async def _ask(
        self, conversation: Conversation, turn: Turn, place: int, due_s: float, told: list[int]
    ) -> tuple[Outcome, Answer | None]:
        marks = _Marks(self, due_s, self._now() - due_s, conversation.warm_up)
        session_id = "" if self._limits.history else conversation.session_id
        prompt = (*told, *turn.prompt) if told and not isinstance(turn.prompt, str) else turn.prompt
        request = Request(prompt, turn.max_tokens, turn.recipe, session_id, self._limits.deadline_s)
        answer, status, error = None, FAILED, ""
        waiting: Any = nullcontext() if self._slots is None else self._slots
        async with waiting:
            marks.sent_s = self._now()
            self._open += 1
            self._recording.most_open = max(self._recording.most_open, self._open)
            self._observer.began()
            try:
                answer, status, error = await self._send(request, turn.cancel_after_s, marks)
            finally:
                self._open -= 1
        outcome = marks.outcome(turn, place, self._now(), status, error, answer)
        self._keep(outcome)
        return outcome, answer

    async def _send(
        self, request: Request, cancel_after_s: float | None, marks: _Marks
    ) -> tuple[Answer | None, str, str]:
        """The answer, or None; what became of the request; the type of the error."""
        longest_s = request.deadline_s + GRACE_S
        is_cancelled = cancel_after_s is not None and cancel_after_s < longest_s
        try:
            async with asyncio.timeout(cancel_after_s if is_cancelled else longest_s):
                return await self._transport.run(request, marks.take), SERVED, ""
        except TimeoutError:
            return None, CANCELLED if is_cancelled else DEADLINE, "" if is_cancelled else DeadlineExceeded.__name__
        except Overloaded as exc:
            return None, SHED, exc.type_name
        except DeadlineExceeded as exc:
            return None, DEADLINE, exc.type_name
        except KvsluiceError as exc:
            return None, FAILED, exc.type_name

    def _drop(self, conversation: Conversation) -> None:
        now_s = self._now()
        for place, turn in enumerate(conversation.turns):
            marks = _Marks(self, conversation.arrival_s, now_s - conversation.arrival_s, conversation.warm_up)
            self._recording.health.dropped += 1
            self._keep(marks.outcome(turn, place, now_s, DROPPED, "", None))

    def _keep(self, outcome: Outcome) -> None:
        health = self._recording.health
        health.of += 1
        health.late += outcome.late_s > health.late_after_s
        health.most_late_s = max(health.most_late_s, outcome.late_s)
        self._recording.outcomes.append(outcome)
        self._observer.ended(outcome)

    def note_tokens(self, now_s: float, count: int, gap_s: float | None) -> None:
        """Count tokens that came.

        Args:
            gap_s: since the message before, or None where it does not count.
        """
        second = int(now_s)
        self._recording.tokens[second] = self._recording.tokens.get(second, 0) + count
        if gap_s is not None:
            self._recording.itl.add(gap_s)
        self._observer.tokens(count)

    def now_s(self) -> float:
        """Seconds since the start of the run."""
        return self._now()

    async def _pulse(self) -> None:
        while True:
            due_s = self._now() + PULSE_S
            await asyncio.sleep(PULSE_S)
            self._lags.add(max(0.0, self._now() - due_s))
            self._recording.health.most_lag_s = max(self._recording.health.most_lag_s, self._now() - due_s)

    def _note_health(self, began_busy_s: float) -> None:
        health, wall_s = self._recording.health, self._now()
        health.lag_p99_s = self._lags.percentile(99) or 0.0
        health.max_rss_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        health.busy_share = (time.thread_time() - began_busy_s) / wall_s if wall_s > 0 else 0.0


class _Marks:
    """When things happened to one request."""

    def __init__(self, driver: Driver, due_s: float, late_s: float, warm_up: bool) -> None:
        self._driver, self._due_s, self._late_s, self._warm_up = driver, due_s, max(0.0, late_s), warm_up
        self.sent_s: float | None = None
        self._first_s: float | None = None
        self._last_s: float | None = None
        self._num_tokens = 0

    def take(self, count: int) -> None:
        now_s = self._driver.now_s()
        counts = self._last_s is not None and not self._warm_up
        self._driver.note_tokens(now_s, count, now_s - (self._last_s or 0.0) if counts else None)
        self._first_s = now_s if self._first_s is None else self._first_s
        self._last_s = now_s
        self._num_tokens += count

    def outcome(self, turn: Turn, place: int, end_s: float, status: str, error: str, answer: Answer | None) -> Outcome:
        return Outcome(
            index=turn.index,
            turn=place,
            recipe=turn.recipe,
            arrival_s=self._due_s,
            sent_s=self.sent_s,
            first_s=self._first_s,
            last_s=self._last_s,
            end_s=end_s,
            status=status,
            error=error,
            input_tokens=answer.input_tokens if answer else turn.input_tokens or 0,
            output_tokens=answer.output_tokens if answer else self._num_tokens,
            cached_tokens=answer.cached_tokens if answer else 0,
            late_s=self._late_s,
            warm_up=self._warm_up,
            effective=answer.effective if answer else "",
        )
