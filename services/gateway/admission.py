"""Who runs, who waits and who is sent away. `AdmissionPolicy` decides, over numbers and a clock; `Admission` has tasks
wait for it.

    offer ──> quotas ──> predicted first token ──> room: starts │ fair queue: waits │ Overloaded, at once
"""

from __future__ import annotations

import math
import time
from asyncio import CancelledError, Future, get_running_loop
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from ...errors import Overloaded
from ...kvstore.identity import TenantId
from ..keys import UNLIMITED, TenantLimits
from ..security import NO_TENANT
from .fair_queue import FairQueue, Place
from .quotas import Quotas
from .waits import Backlog

WEIGHT = 1 / 16  # of the request that ended last in the means
FIRST_ANSWER_TOKENS = 256.0  # what an answer is taken for until some have ended
BURST_S = 10.0


@dataclass(frozen=True)
class Ask:
    """A request that wants to run.

    Attributes:
        num_choices: that it has; one with more than run together runs alone.
        prompt_tokens: as far as they are known before the prompt is tokenized.
        saved_tokens: what the prompt should cost less, as its beginning is known.
        max_tokens: of the answer, at most; None = not known.
        remaining_s: until its deadline.
    """

    num_choices: int = 1
    tenant: TenantId = NO_TENANT
    limits: TenantLimits = UNLIMITED
    prompt_tokens: int = 0
    saved_tokens: float = 0.0
    max_tokens: int | None = None
    remaining_s: float = math.inf


class AdmissionPolicy:
    """Lets a bounded number of choices run and a bounded number of requests wait, fair between tenants. Whoever would
    wait longer than it may is sent away at once, and whoever's tenant has used up what it may have.

    Args:
        max_running: choices that may run together.
        max_waiting: requests that may wait; each tenant's share of them is bounded by its weight.
        clock: monotonic seconds.
        max_ttft_s: who would get its first token later than that is sent away; None = the deadline counts alone.
        burst_s: see `Quotas`.
        backlog: of prompts that are being run, or about to be.
    """

    def __init__(
        self,
        max_running: int,
        max_waiting: int,
        clock: Callable[[], float] = time.monotonic,
        max_ttft_s: float | None = None,
        burst_s: float = BURST_S,
        backlog: Callable[[], Backlog] = Backlog,
    ) -> None:
        self._max_running, self._max_waiting = max_running, max_waiting
        self._clock = clock
        self._max_ttft_s = math.inf if max_ttft_s is None else max_ttft_s
        self._queue, self._quotas = FairQueue(), Quotas(burst_s)
        self._started_s: dict[Place, float] = {}
        self._backlog = backlog
        self._free = max_running
        self._held_s: float | None = None  # how long a request holds its room, in the mean
        self._answer_tokens = FIRST_ANSWER_TOKENS

    @property
    def num_running(self) -> int:
        """Requests."""
        return len(self._started_s)

    @property
    def num_waiting(self) -> int:
        """Requests."""
        return len(self._queue)

    def resize(self, max_running: int) -> list[Place]:
        """Another number of choices may run together from now on; those that run go on. Returns who starts."""
        self._free += max_running - self._max_running
        self._max_running = max_running
        return self._start_waiting()

    def go_on(self) -> list[Place]:
        """There may be room for more prompts. Returns who starts."""
        return self._start_waiting()

    def wait_s(self, ask: Ask) -> float:
        """How long a request that comes now would wait for room, by how long others held theirs; 0 where that is not
        known."""
        place = self._place(ask)
        ahead = self._queue.ahead(place) + place.need - self._free
        room_s = 0.0 if ahead <= 0 or self._held_s is None else ahead * self._held_s / self._max_running
        return max(room_s, self._prompts_s(place))

    def _prompts_s(self, place: Place) -> float:
        """How long a request waits until prompts that come before it have run."""
        own = place.prompt_tokens
        if not self._queue or self._queue_jumps(place):
            return 0.0
        backlog = self._backlog()
        before_s = self._queue.ahead(place, lambda one: backlog.speed.seconds(min(one.prompt_tokens, own)))
        return max(0.0, backlog.seconds(own, before_s) - backlog.seconds(own))

    def _queue_jumps(self, place: Place) -> bool:
        """Whether it would be its turn at once."""
        first = self._queue.first()
        return first is None or place.rank < first.rank

    def offer(self, ask: Ask) -> tuple[Place, bool]:
        """Take a request. Returns its place, and whether it starts now; it waits otherwise.

        Raises:
            Overloaded: it is sent away; says why, and when there may be room. InvalidRequest: there never is.
        """
        now_s, place = self._clock(), self._place(ask)
        self._quotas.check(ask.tenant, ask.limits, ask.num_choices, now_s)
        self._check_wait(ask, place)
        self._quotas.begin(ask.tenant, ask.num_choices)
        self._quotas.use(ask.tenant, ask.limits, place.tokens, now_s)
        self._queue.add(place)
        # it alone: room may have come that nobody was told of, and whom this lets start has to be woken
        starts = self._queue.first() is place and self._fits(place)
        if starts:
            self._start(place)
        return place, starts

    def runs(self, place: Place) -> bool:
        """Whether a request has started, and not ended."""
        return place in self._started_s

    def leave(self, place: Place, num_choices: int) -> list[Place]:
        """A request that waits no longer wants to. Returns who starts."""
        self._queue.remove(place)
        self._settle(place, num_choices, 0.0)
        return self._start_waiting()

    def end(self, place: Place, num_choices: int, used_tokens: float | None = None) -> list[Place]:
        """A request that ran has ended. Returns who starts.

        Args:
            used_tokens: of prompt and answers, 0 = it did nothing; None = as estimated.
        """
        held_s = self._clock() - self._started_s.pop(place)
        if used_tokens != 0:
            self._held_s = held_s if self._held_s is None else self._held_s + WEIGHT * (held_s - self._held_s)
        self._free += place.need
        self._queue.end(place, used_tokens)
        self._settle(place, num_choices, place.tokens if used_tokens is None else used_tokens)
        return self._start_waiting()

    def answered(self, num_tokens: float) -> None:
        """So many tokens had a choice of a request that ended well."""
        self._answer_tokens += WEIGHT * (num_tokens - self._answer_tokens)

    def _place(self, ask: Ask) -> Place:
        need = min(ask.num_choices, self._max_running)
        answer = min(self._answer_tokens, math.inf if ask.max_tokens is None else ask.max_tokens)
        prompt = max(0.0, ask.prompt_tokens - ask.saved_tokens)
        return Place(ask.tenant, ask.limits, need, prompt, prompt + ask.num_choices * answer)

    def _check_wait(self, ask: Ask, place: Place) -> None:
        starts = self._fits(place) and self._queue_jumps(place)
        wait_s = 0.0 if starts else self.wait_s(ask)
        if not starts and self._queue.room(ask.tenant, ask.limits, self._max_waiting) < 1:
            raise Overloaded(f"the queue is full ({len(self._queue)} requests wait already)", wait_s, "queue_full")
        ttft_s = wait_s + self._backlog().seconds(place.prompt_tokens)
        if not self._started_s or ttft_s == 0:
            return  # a guess that keeps everybody out would never be put right
        if ttft_s > ask.remaining_s:
            problem = f"some {ttft_s:.3g} s of work wait, and the deadline is in {ask.remaining_s:.3g} s"
            raise Overloaded(problem, ttft_s - ask.remaining_s, "deadline")
        if ttft_s > self._max_ttft_s:
            problem = f"the first token would come in some {ttft_s:.3g} s, and {self._max_ttft_s:g} s are allowed"
            raise Overloaded(problem, ttft_s - self._max_ttft_s, "ttft")

    def _start(self, place: Place) -> None:
        self._free -= place.need
        self._started_s[place] = self._clock()
        self._queue.start(place)

    def _fits(self, place: Place) -> bool:
        """Whether there is room. Prompts wait here, where turns are fair, rather than before a prefill worker."""
        has_room = place.need <= self._free and self._backlog().has_room(place.prompt_tokens)
        return has_room or not self._started_s

    def _start_waiting(self) -> list[Place]:
        started = []
        while (place := self._queue.first()) is not None and self._fits(place):
            self._start(place)
            started.append(place)
        return started

    def _settle(self, place: Place, num_choices: int, used_tokens: float) -> None:
        now_s = self._clock()
        self._quotas.use(place.tenant, place.limits, used_tokens - place.tokens, now_s)
        self._quotas.end(place.tenant, num_choices, now_s)


@dataclass
class Held:
    """Room that a request holds.

    Attributes:
        used_tokens: of prompt and answers; set by whoever knows. None = as estimated.
    """

    used_tokens: float | None = None


class Admission:
    """Has the tasks of requests wait for their turn. Belongs to one event loop."""

    def __init__(self, policy: AdmissionPolicy) -> None:
        self._policy = policy
        self._turns: dict[Place, Future[None]] = {}

    @property
    def num_running(self) -> int:
        """Requests."""
        return self._policy.num_running

    @property
    def num_waiting(self) -> int:
        """Requests."""
        return self._policy.num_waiting

    def wait_s(self, ask: Ask | None = None) -> float:
        """See `AdmissionPolicy`; of a request of one choice where none is given."""
        return self._policy.wait_s(ask or Ask())

    def resize(self, max_running: int) -> None:
        """See `AdmissionPolicy`."""
        self._wake(self._policy.resize(max_running))

    def go_on(self) -> None:
        """See `AdmissionPolicy`."""
        self._wake(self._policy.go_on())

    def answered(self, num_tokens: float) -> None:
        """See `AdmissionPolicy`."""
        self._policy.answered(num_tokens)

    @asynccontextmanager
    async def slot(self, ask: Ask) -> AsyncIterator[Held]:
        """Hold room for a request.

        Raises:
            Overloaded, InvalidRequest: at once, when it is sent away.
        """
        place, starts = self._policy.offer(ask)
        if not starts:
            await self._wait(place, ask.num_choices)
        held = Held()
        try:
            yield held
        finally:
            self._wake(self._policy.end(place, ask.num_choices, held.used_tokens))

    async def _wait(self, place: Place, num_choices: int) -> None:
        turn = self._turns[place] = get_running_loop().create_future()
        try:
            await turn
        except CancelledError:
            if self._policy.runs(place):  # started and cancelled in the same turn of the loop
                self._wake(self._policy.end(place, num_choices, 0.0))
            else:
                self._wake(self._policy.leave(place, num_choices))
            raise
        finally:
            del self._turns[place]

    def _wake(self, started: list[Place]) -> None:
        for place in started:
            if not self._turns[place].done():
                self._turns[place].set_result(None)
