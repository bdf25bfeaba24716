"""What keeps every call of a remote store bounded: time, attempts, operations and bytes in flight, and a breaker.

A call waits for a place and for room, then tries, and tries again after what may pass, until its deadline. An attempt
may be repeated because every operation of a store may be (`store.py`). When attempt after attempt fails, the breaker
opens: calls then fail at once instead of each waiting for its own timeout, and from time to time one of them tries
whether the store is back.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_random_exponential

from ..errors import StoreUnavailable

T = TypeVar("T")

RETRY_WAIT_S = 0.02
"""Waits between attempts are drawn from 0 to this, doubled each time."""
RETRY_WAIT_MAX_S = 0.5


class Cause(Enum):
    """Why an attempt failed: what the public message says, whether it may pass soon, whether the server looks dead."""

    UNREACHABLE = ("the store cannot be reached", True, True)
    TIMEOUT = ("the store did not answer in time", True, True)
    LOADING = ("the store is loading its data", True, False)
    MAX_CLIENTS = ("the store takes no more connections", True, False)
    READ_ONLY = ("the store is a read-only replica", True, False)
    CLUSTER_DOWN = ("the store's cluster is down", True, False)
    MOVED = ("the store's cluster is moving keys", True, False)
    FULL = ("the store is full", False, False)
    AUTH = ("the store refuses the credentials", False, False)
    DENIED = ("the store does not allow this user a command that is needed", False, False)
    TLS = ("the store's TLS handshake failed", False, True)
    WRONG_KIND = ("the store is of another kind than its URL says", False, False)
    GARBLED = ("the store's answer makes no sense", True, False)
    REFUSED = ("the store refused a command", False, False)
    TOO_LONG = ("the value is longer than the store takes", False, False)
    BUSY = ("the store has no room for another operation in time", False, False)
    OPEN = ("the store has failed several times in a row; it is tried again shortly", False, False)
    CLOSED = ("the store is closed", False, False)

    def __init__(self, message: str, transient: bool, looks_dead: bool) -> None:
        self.message = message
        self.transient = transient
        self.looks_dead = looks_dead


class Trouble(StoreUnavailable):
    """A `StoreUnavailable` that says why. Its message is one of a closed set."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause.message)
        self.cause = cause


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a call may cost.

    Attributes:
        attempt_timeout_s: one attempt, connecting included.
        total_timeout_s: a call, with waiting for its turn and all attempts.
        max_attempts: of a call.
        max_operations: calls in flight.
        max_bytes_in_flight: of values that those calls read and write.
        breaker_failures: attempts in a row that find no living server, until the breaker opens.
        breaker_pause_s: how long it stays open before one call tries again; twice as long each time, up to 16 times.
    """

    attempt_timeout_s: float
    total_timeout_s: float
    max_attempts: int
    max_operations: int
    max_bytes_in_flight: int
    breaker_failures: int
    breaker_pause_s: float


@dataclass
class StoreCounters:
    """What has happened so far; only goes up, but for what is in flight."""

    calls: int = 0
    attempts: int = 0
    retries: int = 0
    breaker_openings: int = 0
    failed_attempts: Counter[Cause] = field(default_factory=Counter)
    failed_calls: Counter[Cause] = field(default_factory=Counter)
    operations_in_flight: int = 0
    bytes_in_flight: int = 0
    peak_operations: int = 0
    peak_bytes: int = 0


class Budget:
    """Room that is handed out in the order of asking."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, amount: int) -> None:
        """Wait until there is room; `amount` must not be above the capacity."""
        assert 0 <= amount <= self.capacity, "this can never be given"
        if not self._waiters and self.used + amount <= self.capacity:
            self.used += amount
            return
        place = (amount, asyncio.get_running_loop().create_future())
        self._waiters.append(place)
        try:
            await place[1]
        except asyncio.CancelledError:
            if place in self._waiters:
                self._waiters.remove(place)
                self._serve()  # a smaller one behind it may fit
            elif not place[1].cancelled():
                self.give(amount)
            raise

    def give(self, amount: int) -> None:
        self.used -= amount
        self._serve()

    def _serve(self) -> None:
        while self._waiters and self.used + self._waiters[0][0] <= self.capacity:
            amount, future = self._waiters.popleft()
            if not future.cancelled():
                self.used += amount
                future.set_result(None)


class Admission(Enum):
    """What a breaker says to an attempt that wants to start."""

    FREE = "free"
    TRIAL = "trial"
    REFUSED = "refused"


class Breaker:
    """Opens after several dead attempts in a row; then lets one attempt through after each pause."""

    MAX_DOUBLINGS = 4

    def __init__(self, failures: int, pause_s: float, clock: Callable[[], float]) -> None:
        self.openings = 0
        self._limit = failures
        self._pause_s = pause_s
        self._clock = clock
        self._failures = 0
        self._closed_again_at: float | None = None
        self._doublings = 0
        self._trying = False

    @property
    def is_open(self) -> bool:
        return self._closed_again_at is not None

    def admit(self) -> Admission:
        """Whether an attempt may start; each one that may is followed by `alive`, `dead` or `unknown`."""
        if self._closed_again_at is None:
            return Admission.FREE
        if self._trying or self._clock() < self._closed_again_at:
            return Admission.REFUSED
        self._trying = True
        return Admission.TRIAL

    def alive(self) -> None:
        """The server answered, whatever it said."""
        self._failures = self._doublings = 0
        self._closed_again_at = None
        self._trying = False

    def dead(self, admission: Admission) -> None:
        """No living server was found."""
        self._failures += 1
        if admission is Admission.TRIAL and self.is_open:
            self._trying = False
            self._doublings = min(self._doublings + 1, self.MAX_DOUBLINGS)
        elif self.is_open or self._failures < self._limit:
            return  # attempts that began before the breaker opened say nothing new
        self.openings += 1
        self._closed_again_at = self._clock() + self._pause_s * 2**self._doublings

    def unknown(self, admission: Admission) -> None:
        """The attempt was cancelled before it told anything."""
        if admission is Admission.TRIAL:
            self._trying = False


class Guard:
    """Runs the calls of one store within its bounds."""

    def __init__(self, bounds: Bounds) -> None:
        self.counters = StoreCounters()
        self._bounds = bounds
        self._operations = Budget(bounds.max_operations)
        self._bytes = Budget(bounds.max_bytes_in_flight)
        self._breakers: dict[Hashable, Breaker] = {}
        self._scopes: set[asyncio.Timeout] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False

    async def close(self) -> None:
        """Refuse every call from now on, end those in flight, and wait for that."""
        self._closed = True
        now = asyncio.get_running_loop().time()
        for scope in self._scopes:
            scope.reschedule(now)
        await self._idle.wait()

    async def run(
        self, attempt: Callable[[], Awaitable[T]], num_bytes: int, server: Callable[[], Hashable] = lambda: None
    ) -> T:
        """The result of the first attempt that succeeds.

        Args:
            attempt: one whole operation; raises `Trouble` where the store is at fault, and releases what it holds
                when it is cancelled.
            num_bytes: what it reads and writes at most; not above `max_bytes_in_flight`.
            server: which one an attempt would go to now; each has a breaker of its own, so that one dead server of
                several does not stop the work with the others.

        Raises:
            Trouble: with the cause of the last attempt, or of there being none.
        """
        self.counters.calls += 1
        deadline = asyncio.get_running_loop().time() + self._bounds.total_timeout_s
        try:
            async with self._place(num_bytes, deadline):
                return await self._tries(attempt, deadline, server)
        except Trouble as exc:
            self.counters.failed_calls[exc.cause] += 1
            raise

    def check_integrity(self) -> None:
        """Raise AssertionError where the accounts contradict each other."""
        counters = self.counters
        assert self._operations.used == counters.operations_in_flight, "places in use do not add up"
        assert self._bytes.used == counters.bytes_in_flight, "bytes in flight do not add up"
        assert counters.peak_operations <= self._bounds.max_operations, "more operations than allowed"
        assert counters.peak_bytes <= self._bounds.max_bytes_in_flight, "more bytes in flight than allowed"

    @asynccontextmanager
    async def _place(self, num_bytes: int, deadline: float) -> AsyncIterator[None]:
        """A place among the operations and room for the bytes, until the end of the block."""
        held = 0, 0
        try:
            self._check_admission()
            try:
                async with self._until(deadline):
                    await self._operations.take(1)
                    held = 1, 0
                    await self._bytes.take(num_bytes)
                    held = 1, num_bytes
            except TimeoutError:
                raise Trouble(Cause.CLOSED if self._closed else Cause.BUSY) from None
            self._account(1, num_bytes)
            try:
                yield
            finally:
                self._account(-1, -num_bytes)
        finally:
            self._bytes.give(held[1])
            self._operations.give(held[0])

    @asynccontextmanager
    async def _until(self, when: float) -> AsyncIterator[None]:
        """Ends the block with TimeoutError at that time, or when the store is closed."""
        async with asyncio.timeout_at(when) as scope:
            self._scopes.add(scope)
            try:
                yield
            finally:
                self._scopes.discard(scope)

    def _account(self, operations: int, num_bytes: int) -> None:
        counters = self.counters
        counters.operations_in_flight += operations
        counters.bytes_in_flight += num_bytes
        (self._idle.clear if counters.operations_in_flight else self._idle.set)()
        counters.peak_operations = max(counters.peak_operations, counters.operations_in_flight)
        counters.peak_bytes = max(counters.peak_bytes, counters.bytes_in_flight)

    def _check_admission(self) -> None:
        if self._closed:
            raise Trouble(Cause.CLOSED)

    async def _tries(self, attempt: Callable[[], Awaitable[T]], deadline: float, server: Callable[[], Hashable]) -> T:
        """The first attempt, and what follows where it failed."""
        try:
            return await self._try(attempt, deadline, self._breaker(server()))
        except Trouble as exc:
            failed: Trouble | None = exc
        loop = asyncio.get_running_loop()

        def used_up(state: RetryCallState) -> bool:
            return state.attempt_number >= self._bounds.max_attempts or loop.time() + state.upcoming_sleep >= deadline

        retrying = AsyncRetrying(
            stop=used_up,
            wait=wait_random_exponential(multiplier=RETRY_WAIT_S, max=RETRY_WAIT_MAX_S),
            retry=retry_if_exception(lambda exc: isinstance(exc, Trouble) and exc.cause.transient),
            reraise=True,
        )
        async for trial in retrying:
            with trial:
                if failed is not None:  # it counts as the first one here; most calls need no second and none of this
                    first, failed = failed, None
                    raise first
                self.counters.retries += 1
                return await self._try(attempt, deadline, self._breaker(server()))
        raise AssertionError("the last attempt returns or raises")

    def _breaker(self, server: Hashable) -> Breaker:
        if server not in self._breakers:
            clock = asyncio.get_running_loop().time
            self._breakers[server] = Breaker(self._bounds.breaker_failures, self._bounds.breaker_pause_s, clock)
        return self._breakers[server]

    async def _try(self, attempt: Callable[[], Awaitable[T]], deadline: float, breaker: Breaker) -> T:
        """One attempt, told to the breaker and to the counters."""
        loop = asyncio.get_running_loop()
        self._check_admission()
        admission = breaker.admit()
        if admission is Admission.REFUSED:
            raise Trouble(Cause.OPEN)
        self.counters.attempts += 1
        cause: Cause | None = None
        heard = False
        try:
            async with self._until(min(deadline, loop.time() + self._bounds.attempt_timeout_s)):
                result = await attempt()
            heard = True
            return result
        except (Trouble, TimeoutError) as exc:
            cause = exc.cause if isinstance(exc, Trouble) else Cause.CLOSED if self._closed else Cause.TIMEOUT
            heard = not cause.looks_dead
            self.counters.failed_attempts[cause] += 1
            raise Trouble(cause) from exc
        except Exception:
            heard = True  # the server answered; what it holds is wrong
            raise
        finally:
            if heard:
                breaker.alive()
            elif cause is not None:
                breaker.dead(admission)
            else:
                breaker.unknown(admission)
            self.counters.breaker_openings = sum(each.openings for each in self._breakers.values())
