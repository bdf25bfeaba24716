"""The steps from what there is to what is wanted. Pure policy: no clock, no transport.

A group whose version has changed is *rolled*: up to `max_surge` processes beyond the wanted number start, and one of
the old version is drained for each that serves, so that never more than `max_unavailable` are missing. Groups of one
model that change together wait for each other: prefill and decode of two versions may not fit together, so nobody of
the old version goes before somebody of the new one serves in each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

State = Literal["starting", "serving", "failed", "lost", "draining"]


@dataclass(frozen=True)
class Target:
    """What is wanted of a group.

    Attributes:
        count: of processes, now.
    """

    name: str
    model: str
    version: str
    count: int
    max_surge: int = 1
    max_unavailable: int = 0


@dataclass(frozen=True)
class Existing:
    """A process that there is.

    Attributes:
        number: counts the group's processes; a later one is younger.
        busy: the more of this, the later it is chosen to go.
    """

    worker_id: str
    group: str
    version: str
    state: State
    number: int = 0
    busy: float = 0.0


@dataclass(frozen=True)
class Start:
    """Start one more of the group, of the wanted version."""

    group: str


@dataclass(frozen=True)
class Drain:
    """Let it finish, and end it."""

    worker_id: str


Step = Start | Drain


def plan(targets: Sequence[Target], there: Sequence[Existing]) -> list[Step]:
    """The steps that may be taken now; taking them and calling this again when something has changed leads to the
    targets. Empty where nothing is to be done or all that is left has to wait."""
    staying = [one for one in there if one.state != "draining"]
    steps: list[Step] = []
    names = {target.name for target in targets}
    if all(_serves_new(target, staying) for target in targets):
        steps += [Drain(one.worker_id) for one in staying if one.group not in names]
    for target in targets:
        own = [one for one in staying if one.group == target.name]
        steps += _of_group(target, own, _may_roll(target, targets, staying))
    return steps


def _of_group(target: Target, own: Sequence[Existing], may_roll: bool) -> list[Step]:
    new = [one for one in own if one.version == target.version]
    old = [one for one in own if one.version != target.version]
    room = target.count + (target.max_surge if old else 0) - len(own)
    steps: list[Step] = [Start(target.name) for _ in range(min(target.count - len(new), room))]
    # whoever does not serve leaves no gap
    steps += _drains(one for one in old if one.state != "serving")
    old = [one for one in old if one.state == "serving"]
    num_serving = len(old) + sum(one.state == "serving" for one in new)
    spare = num_serving - max(0, target.count - target.max_unavailable)
    if may_roll and old and spare > 0:
        steps += _drains(sorted(old, key=_least_missed)[:spare])
    too_many = len(new) - target.count
    if too_many > 0:
        steps += _drains(sorted(new, key=_least_missed)[:too_many])
    return steps


def _drains(those: Iterable[Existing]) -> list[Step]:
    return [Drain(one.worker_id) for one in those]


def _least_missed(one: Existing) -> tuple[bool, float, int]:
    """Those that do not serve, then those with the least to do, then the youngest."""
    return (one.state == "serving", one.busy, -one.number)


def _may_roll(target: Target, targets: Sequence[Target], staying: Sequence[Existing]) -> bool:
    if target.max_surge == 0:
        return True  # no room for both versions: the old one has to go first
    rolled = {one.group for other in targets for one in staying if one.group == other.name and _is_old(one, other)}
    beside = [other for other in targets if other.model == target.model and other.name in rolled and other.max_surge]
    return all(_serves_new(other, staying) for other in beside)


def _is_old(one: Existing, target: Target) -> bool:
    return one.version != target.version


def _serves_new(target: Target, staying: Sequence[Existing]) -> bool:
    return target.count == 0 or any(
        one.group == target.name and one.version == target.version and one.state == "serving" for one in staying
    )
