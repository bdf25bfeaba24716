"""Which requests are let in and which choices run in the next step. Pure policy, free of torch.

States of a request, and the only transitions:

               admit              start                 end_choice (the last one) / end_request
    (enqueue) ───────> RECEIVING ──────> RUNNING ─────────────────────────────────────> gone
    WAITING                │                                                             ^
       └───────────────────┴──── end_request (cancelled, failed) ─────────────────────────┘

A choice of a RUNNING request runs until `end_choice`. It is *eligible* when its request has credits left, or while it
replays tokens that were sent before (a replayed token is not sent, so it costs no credit), has not had its last turn,
and is not further ahead of who keeps its rows than its leash allows. One that is not eligible is paused: it keeps its
memory and takes no slot.

Admission is first come, first served by bytes, of the device's memory and of the host's: the head of the queue waits
until all that its caches may ever take is free, and nothing behind it is let in before it, so a large request is not
starved by small ones. A running request therefore never lacks memory. With tiers, running requests make room for others
by turns (`tiers`): those that are parked stand in the same line as those that wait to be let in.

Fairness: choices stand in one ring. A step takes the first `max_num_seqs` eligible ones and moves them to the end. An
eligible choice runs at least once in ceil(E / max_num_seqs) steps, E = the most eligible choices meanwhile.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from ...errors import ConfigError, DuplicateRequest, Overloaded
from .holdings import Holdings
from .pages import Demand as Demand
from .pages import Evictable, PagePool, Region
from .tiers import Place, Room, Tiers
from .turns import Turns


class Phase(Enum):
    """Where a request stands."""

    WAITING = "waiting"
    RECEIVING = "receiving"
    RUNNING = "running"


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the n continuations of a request."""

    request_id: str
    index: int


@dataclass
class _Request:
    demand: Demand
    credits: int | None
    since: int = 0  # stamp of its arrival
    phase: Phase = Phase.WAITING
    choices: dict[int, Turns] = field(default_factory=dict)  # live ones


class Scheduler:
    """Admission, states and turns.

    Args:
        pool: the ledger that admission reserves in.
        max_num_seqs: choices that run in one step, at least 1.
        max_waiting: requests that may wait for memory, at least 0.
        host: the ledger of host memory; None = there is none, and no demand for it.

    Attributes:
        tiers: who is parked there; None = nobody is. Set before the first request comes.
        sessions: what ended turns have left, which makes room for everybody; None = nothing is left.
    """

    def __init__(self, pool: PagePool, max_num_seqs: int, max_waiting: int, host: PagePool | None = None) -> None:
        if max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs: got {max_num_seqs}; allowed: at least 1")
        if max_waiting < 0:
            raise ConfigError(f"max_waiting: got {max_waiting}; allowed: at least 0")
        self.pool = pool
        self.host = host
        self.tiers: Tiers | None = None
        self.sessions: Evictable | None = None
        self._holdings = Holdings(pool, host)
        self.max_num_seqs = max_num_seqs
        self.max_waiting = max_waiting
        self._requests: dict[str, _Request] = {}
        self._queue: deque[str] = deque()
        self._ring: deque[Choice] = deque()

    @property
    def num_waiting(self) -> int:
        """Requests that wait for memory."""
        return len(self._queue)

    @property
    def num_running(self) -> int:
        """Choices that are started and not ended, paused ones included."""
        return len(self._ring)

    @property
    def num_started(self) -> int:
        """Requests that have a choice running."""
        return sum(request.phase is Phase.RUNNING for request in list(self._requests.values()))

    def phase(self, request_id: str) -> Phase | None:
        """The state of a request; None when it is unknown or gone."""
        request = self._requests.get(request_id)
        return None if request is None else request.phase

    def live_choices(self, request_id: str) -> tuple[int, ...]:
        """Indices of the choices that are started and not ended."""
        return tuple(self._requests[request_id].choices)

    def enqueue(self, request_id: str, demand: Demand, credits: int | None) -> None:
        """Queue a request for admission.

        Args:
            credits: tokens that may be sent before `grant`; None = without limit.

        Raises:
            DuplicateRequest: it is here already.
            InvalidRequest: it would not fit into the empty pool either.
            Overloaded: it would have to wait and the queue is full.
        """
        if request_id in self._requests:
            raise DuplicateRequest(f"request {request_id} is already running")
        self._holdings.check_fits(demand)
        must_wait = bool(self._queue) or not self._has_room(request_id, demand)
        if must_wait and len(self._queue) >= self.max_waiting:
            raise Overloaded(
                f"{len(self._queue)} requests wait for cache memory, at most {self.max_waiting} may; this one needs "
                f"{self._holdings.shortage(demand)}"
            )
        since = 0 if self.tiers is None else self.tiers.stays.stamp()
        self._requests[request_id] = _Request(demand, credits, since)
        self._queue.append(request_id)

    def admit(self) -> list[str]:
        """Reserve memory for as many requests from the head of the queue as fit now. Returns them. Parked ones come
        back, and running ones begin to leave; see `tiers`."""
        if self.tiers is not None:
            return self._admit_in_line(self.tiers)
        admitted = []
        while self._queue and self._has_room(self._queue[0], self._requests[self._queue[0]].demand):
            admitted.append(self._let_in(self._queue[0]))
        return admitted

    def _admit_in_line(self, tiers: Tiers) -> list[str]:
        """The same for those that wait and those that are parked, whoever has waited longest first."""
        parked = [r for r in tiers.at(Place.PARKED) if not self._is_paused(r)]
        line = [(tiers.since(r), r) for r in parked] + [(self._requests[r].since, r) for r in self._queue]
        admitted: list[str] = []
        claimed = num_claims = 0
        tiers.overflow.forget_wishes()
        takes_new = True
        for _, request_id in sorted(line):
            demand, is_new = self._requests[request_id].demand, request_id not in parked
            need = demand.total_bytes if is_new else self._device_bytes(request_id)
            if is_new:  # it may wait for host memory, which those that are parked need not
                takes_new = takes_new and self._takes(tiers, request_id, demand)
                if not takes_new:
                    continue
            self._make_way(request_id, claimed + need)
            if not claimed and need <= self.pool.free_bytes:
                if is_new:
                    admitted.append(self._let_in(request_id))
                else:
                    self._come(tiers, request_id)
                continue
            shortage = claimed + need - self.pool.free_bytes
            room = tiers.make_room(shortage, self._device_bytes, self._is_paused)
            if room is Room.HOST_IS_FULL:
                self._make_way(request_id, 0, sys.maxsize)
                if is_new:
                    takes_new = False
                    continue
            claimed += need
            num_claims += 1
            if room is not Room.MADE or num_claims == tiers.policy.ahead:
                break
        return admitted

    def _has_room(self, request_id: str, demand: Demand) -> bool:
        self._make_way(request_id, demand.total_bytes, demand.host_bytes)
        return self._holdings.has_room(demand)

    def _make_way(self, request_id: str, device_bytes: int, host_bytes: int = 0) -> None:
        if self.sessions is not None:
            self.sessions.make_room(request_id, device_bytes, host_bytes)

    def _takes(self, tiers: Tiers, request_id: str, demand: Demand) -> bool:
        """Whether host memory, and the store behind it, have room for one more request."""
        self._make_way(request_id, 0, demand.host_bytes)
        if not tiers.takes_more(demand.total_bytes, self._admitted_bytes()):
            self._make_way(request_id, 0, sys.maxsize)
            return False
        if not self._holdings.has_host_room(demand):
            tiers.overflow.want(demand.host_bytes)
            return False
        return True

    def _let_in(self, request_id: str) -> str:
        self._holdings.let_in(request_id, self._requests[request_id].demand)
        self._queue.remove(request_id)
        self._requests[request_id].phase = Phase.RECEIVING
        return request_id

    def _come(self, tiers: Tiers, request_id: str) -> None:
        self._holdings.enter_device(request_id, self._requests[request_id].demand, self.live_choices(request_id))
        tiers.come(request_id)

    def left(self, request_id: str, nbytes: int) -> None:
        """A request that was to leave the device lies in host memory now, in `nbytes`."""
        assert self.tiers is not None, "requests leave where there are tiers"
        self.tiers.left(request_id, nbytes)
        self._holdings.leave_device(request_id, self.live_choices(request_id))

    def spill(self) -> list[str]:
        """Parked requests that begin to go to the store now."""
        return [] if self.tiers is None else self.tiers.overflow.spill(self._has_something_to_do)

    def stored(self, request_id: str) -> bool:
        """One of them is in the store. Whether it is to stay there; its host memory is free then."""
        assert self.tiers is not None, "requests are stored where there are tiers"
        if not self.tiers.overflow.written(request_id, self._has_something_to_do(request_id)):
            return False
        self._holdings.leave_host(request_id, self._requests[request_id].demand, self.live_choices(request_id))
        return True

    def fetch(self) -> list[str]:
        """Stored requests that begin to come back to host memory now; it is reserved for them."""
        coming = [] if self.tiers is None else self.tiers.overflow.fetch(self._has_something_to_do)
        for request_id in coming:
            self._holdings.enter_host(request_id, self._requests[request_id].demand, self.live_choices(request_id))
        return coming

    def start(self, request_id: str, choices: Mapping[int, Turns]) -> None:
        """Let choices run once the prompt is complete; the tails of those not named are freed. None named = every
        choice had ended; the request is gone then."""
        request = self._requests[request_id]
        assert request.phase is Phase.RECEIVING, "a request starts once, after its admission"
        request.phase = Phase.RUNNING
        request.choices = dict(choices)
        self._ring.extend(Choice(request_id, index) for index in sorted(choices))
        self._holdings.start(request_id, request.demand, choices)
        if not choices:
            del self._requests[request_id]
        elif self.tiers is not None:
            self.tiers.start(request_id, request.demand.host_bytes)

    def grant(self, request_id: str, tokens: int) -> None:
        """Allow `tokens` more to be sent. Without effect when the request is gone or was opened without a limit."""
        request = self._requests.get(request_id)
        if request is not None and request.credits is not None:
            request.credits += tokens

    def lengthen(self, choice: Choice, turns: float) -> None:
        """Let a choice have `turns` more before it waits again. Without effect when it is gone."""
        request = self._requests.get(choice.request_id)
        if request is not None and choice.index in request.choices:
            request.choices[choice.index].leash += turns

    def has_eligible(self) -> bool:
        """Whether `next_batch` would give anything, or somebody is on the way to the device or from it."""
        is_moving = self.tiers is not None and (self.tiers.at(Place.LEAVING) or self.tiers.at(Place.COMING))
        return bool(is_moving) or any(self._eligible(choice) for choice in self._ring)

    def next_batch(self) -> list[Choice]:
        """The choices of the next step; each spends a credit, or a step of its replay."""
        batch: list[Choice] = []
        passed: deque[Choice] = deque()
        while self._ring and len(batch) < self.max_num_seqs:
            choice = self._ring.popleft()
            (batch if self._spend(choice) else passed).append(choice)
        self._ring.extendleft(reversed(passed))
        self._ring.extend(batch)
        if self.tiers is not None and batch:
            self.tiers.ran({choice.request_id for choice in batch})
        return batch

    def end_choice(self, choice: Choice) -> bool:
        """A started choice has ended: free what it alone held. True when it was the request's last one."""
        request = self._requests[choice.request_id]
        del request.choices[choice.index]
        self._ring.remove(choice)
        on_host = self.tiers is None or not self.tiers.is_stored(choice.request_id)
        on_device = self._is_on_device(choice.request_id)
        self._holdings.end_choice(choice.request_id, request.demand, choice.index, on_device, on_host)
        if request.choices:
            return False
        if self.tiers is not None:
            self.tiers.end(choice.request_id)
        del self._requests[choice.request_id]
        return True

    def end_request(self, request_id: str) -> None:
        """A request is cancelled or has failed, in whatever state: free all it held."""
        request = self._requests[request_id]
        if request.phase is Phase.RUNNING:
            for index in tuple(request.choices):
                self.end_choice(Choice(request_id, index))
            return
        if request.phase is Phase.WAITING:
            self._queue.remove(request_id)
        else:
            self._holdings.end_reception(request_id, request.demand)
        del self._requests[request_id]

    def check_integrity(self) -> None:
        """Assert that queue, ring and ledger agree."""
        self.pool.check_integrity()
        by_phase = {phase: {r for r, q in self._requests.items() if q.phase is phase} for phase in Phase}
        assert by_phase[Phase.WAITING] == set(self._queue) and len(set(self._queue)) == len(self._queue)
        running = {Choice(r, i) for r in by_phase[Phase.RUNNING] for i in self._requests[r].choices}
        assert running == set(self._ring) and len(running) == len(self._ring)
        held: dict[Region, int] = {}
        for request_id in by_phase[Phase.RECEIVING]:
            held |= self._requests[request_id].demand.regions(request_id)
        for choice in running:
            if not self._is_on_device(choice.request_id):
                continue
            demand = self._requests[choice.request_id].demand
            held[Region(choice.request_id)] = demand.prompt_bytes
            held[Region(choice.request_id, choice.index)] = demand.tail_bytes
        assert held == self.pool.regions(kept=False), "every region belongs to an admitted request"
        if self.host is not None:
            self.host.check_integrity()
            stored = [] if self.tiers is None else self.tiers.at(Place.STORED)
            demands = {
                r: q.demand for r, q in self._requests.items() if q.phase is not Phase.WAITING and r not in stored
            }
            on_host = {Region(r): demand.host_bytes for r, demand in demands.items() if demand.host_bytes}
            on_host |= {} if self.tiers is None else self.tiers.regions()
            assert on_host == self.host.regions(kept=False), "host memory belongs to admitted requests"
            if self.tiers is not None:
                self.tiers.overflow.check_integrity()

    def _device_bytes(self, request_id: str) -> int:
        """What a running request reserves there."""
        request = self._requests[request_id]
        return request.demand.prompt_bytes + request.demand.tail_bytes * len(request.choices)

    def _admitted_bytes(self) -> int:
        """What all requests that were let in would reserve if they were on the device."""
        running = sum(self._device_bytes(r) for r, q in self._requests.items() if q.phase is Phase.RUNNING)
        return running + sum(q.demand.total_bytes for q in self._requests.values() if q.phase is Phase.RECEIVING)

    def is_settled(self, request_id: str) -> bool:
        """Whether a running request is on the device, and not on its way."""
        return self.tiers is None or self.tiers.place(request_id) is Place.DEVICE

    def _is_on_device(self, request_id: str) -> bool:
        """Whether a request that was let in has memory reserved there."""
        return self.tiers is None or self.tiers.is_on_device(request_id)

    def _is_paused(self, request_id: str) -> bool:
        return not self._has_something_to_do(request_id)

    def _has_something_to_do(self, request_id: str) -> bool:
        return any(self._has_turn(Choice(request_id, index)) for index in self._requests[request_id].choices)

    def _eligible(self, choice: Choice) -> bool:
        is_here = self.tiers is None or self.tiers.place(choice.request_id) is Place.DEVICE
        return is_here and self._has_turn(choice)

    def _has_turn(self, choice: Choice) -> bool:
        """Whether a choice waits for nobody but the worker."""
        request = self._requests[choice.request_id]
        turns = request.choices[choice.index]
        if min(turns.left, turns.leash) <= 0:
            return False
        return request.credits is None or request.credits > 0 or turns.replays > 0

    def replay_more(self, choice: Choice, most: int) -> int:
        """Take further turns of a choice that has just had one, up to `most`, of those that only replay tokens. Returns
        how many."""
        turns = self._requests[choice.request_id].choices[choice.index]
        count = int(max(0, min(most, turns.replays, turns.left, turns.leash)))
        turns.spend(count, count)
        return count

    def _spend(self, choice: Choice) -> bool:
        """Take what a turn costs. False where the choice may have none."""
        if not self._eligible(choice):
            return False
        request = self._requests[choice.request_id]
        turns = request.choices[choice.index]
        is_replay = turns.replays > 0
        turns.spend(1, int(is_replay))
        if not is_replay and request.credits is not None:
            request.credits -= 1
        return True
