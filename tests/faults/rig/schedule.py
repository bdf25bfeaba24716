"""Faults drawn from a seed, and what does them to a fleet.

Two lanes run at once: workers are killed and frozen in one, the store and the way to it are broken in the other. In a
lane one fault heals before the next begins. What is drawn depends on the seed and the length alone.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from kvsluice.tests.faults.rig.fleet import LEASE_S, Fleet
from kvsluice.tests.faults.rig.proxy import Rules

QUIET_S = {"workers": (1.0, 5.0), "store": (0.5, 3.0)}  # between a fault's end and the next
LASTS_S = (0.3, 4.0)
FREEZES_S = (0.3, 2.5 * LEASE_S)  # some get over it, some lose their lease
FLUSH_EVERY_S = 0.05
FLIP_WITHIN_BYTES = 8000


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        begins_s: since the beginning of all.
        lasts_s: until it is healed; 0 = it is over at once.
        number: what it draws its victim and place from.
    """

    lane: str
    kind: str
    begins_s: float
    lasts_s: float
    number: int


def drawn_faults(seed: int, seconds: float) -> list[Fault]:
    """What befalls a fleet. Every kind of a lane comes once before one comes again."""
    found = []
    for lane, kinds in LANES.items():
        draw = random.Random(f"{seed} {lane}")
        now_s, deck = draw.uniform(*QUIET_S[lane]), list[str]()
        while now_s < seconds:
            if not deck:
                deck = draw.sample(sorted(kinds), len(kinds))
            kind = deck.pop()
            bounds = {"freeze": FREEZES_S, "kill": (0.0, 0.0), "restart": (0.0, 0.0)}.get(kind.split()[0], LASTS_S)
            fault = Fault(lane, kind, round(now_s, 2), round(draw.uniform(*bounds), 2), draw.randrange(1 << 16))
            found.append(fault)
            now_s = fault.begins_s + fault.lasts_s + draw.uniform(*QUIET_S[lane])
    return sorted(found, key=lambda fault: fault.begins_s)


def befall(fleet: Fleet, faults: list[Fault]) -> Counter[str]:
    """Do faults to a fleet, each at its time or as soon as the one before it in its lane is over and healed.

    The store's lane runs in the calling thread: a server ends with the thread that has started it.

    Returns:
        Faults by kind; those that found nobody to befall are left out.
    """
    done: Counter[str] = Counter()
    began_s = time.monotonic()

    def run(lane: str) -> None:
        for fault in faults:
            if fault.lane == lane:
                time.sleep(max(0.0, began_s + fault.begins_s - time.monotonic()))
                with LANES[lane][fault.kind](fleet, fault) as befell:
                    done[fault.kind] += befell
                    time.sleep(fault.lasts_s)

    with ThreadPoolExecutor(1) as thread:
        workers = thread.submit(run, "workers")
        run("store")
        workers.result()
    return done


Doing = Callable[[Fleet, Fault], contextlib.AbstractContextManager[bool]]


def _signalled(role: str, first: signal.Signals, last: signal.Signals | None) -> Doing:
    @contextmanager
    def do(fleet: Fleet, fault: Fault) -> Iterator[bool]:
        running = fleet.actors(role)
        if not running:
            yield False
            return
        victim = running[fault.number % len(running)].pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, first)
        yield True
        if last is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, last)

    return do


@contextmanager
def _restart(fleet: Fleet, fault: Fault) -> Iterator[bool]:
    fleet.redis.restart(empty=True)
    yield True


@contextmanager
def _freeze(fleet: Fleet, fault: Fault) -> Iterator[bool]:
    fleet.redis.pause()
    try:
        yield True
    finally:
        fleet.redis.resume()


@contextmanager
def _flush(fleet: Fleet, fault: Fault) -> Iterator[bool]:
    """Empty it all the time."""
    over = threading.Event()

    def flush() -> None:
        while not over.wait(FLUSH_EVERY_S):
            fleet.redis.run("FLUSHALL")

    thread = threading.Thread(target=flush)
    thread.start()
    try:
        yield True
    finally:
        over.set()
        thread.join()


@contextmanager
def _fill(fleet: Fleet, fault: Fault) -> Iterator[bool]:
    fleet.redis.leave_room(fault.number)  # a few KiB at most
    try:
        yield True
    finally:
        fleet.redis.leave_room(None)


def _ruled(make: Callable[[int], tuple[Rules, Rules]], anew: bool = False) -> Doing:
    """Rules of the proxy for requests and replies; `anew`: connections are cut first, so that positions count anew."""

    @contextmanager
    def do(fleet: Fleet, fault: Fault) -> Iterator[bool]:
        fleet.proxy.requests, fleet.proxy.replies = make(fault.number)
        if anew:
            fleet.proxy.reset_all()
        try:
            yield True
        finally:
            fleet.proxy.clear()

    return do


def _flips(number: int) -> tuple[Rules, Rules]:
    """A byte of one direction, early in every connection that is made from now on."""
    flipped, place = Rules(flip_at=number % FLIP_WITHIN_BYTES), number // FLIP_WITHIN_BYTES
    return (flipped, Rules()) if place % 2 else (Rules(), flipped)


LANES: dict[str, dict[str, Doing]] = {
    "workers": {
        "kill decode": _signalled("decode", signal.SIGKILL, None),
        "kill prefill": _signalled("prefill", signal.SIGKILL, None),
        "freeze decode": _signalled("decode", signal.SIGSTOP, signal.SIGCONT),
        "freeze prefill": _signalled("prefill", signal.SIGSTOP, signal.SIGCONT),
    },
    "store": {
        "restart store": _restart,
        "freeze store": _freeze,
        "flush store": _flush,
        "fill store": _fill,
        "cut": _ruled(lambda number: (Rules(), Rules()), anew=True),
        "partition": _ruled(lambda number: (Rules(drop=True), Rules(drop=True))),
        "lose requests": _ruled(lambda number: (Rules(drop=True), Rules())),
        "lose replies": _ruled(lambda number: (Rules(), Rules(drop=True))),
        "delay": _ruled(lambda number: (Rules(delay_s=0.02, jitter_s=0.2), Rules(delay_s=0.02, jitter_s=0.2))),
        "corrupt": _ruled(_flips, anew=True),
    },
}
