"""How many processes each group is to have now: what was asked for, what scaling makes of it, what was emptied."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from .replica import Replica
from .report import Report
from .scaling import Sample, Scaler
from .wanted import WantedFleet, WantedGroup

PERIOD_S = 1.0
BUSY_S = 10.0  # a worker's time at work is a mean over about so long
MOST_PRESSURE = 2.0  # of a worker with more requests in line than it runs


class Sizes:
    """The wanted number of each group."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._empty: set[str] = set()
        self._scalers: dict[str, Scaler] = {}
        self._busy: dict[str, float] = {}
        self._decided_s = -math.inf
        self.samples: dict[str, Sample] = {}

    def apply(self, fleet: WantedFleet) -> None:
        """Take over what a fleet asks for; groups that are scaled begin where they are."""
        self._empty.clear()
        self._make_scalers(fleet)
        self._counts = {
            group.name: min(max(self._counts.get(group.name, group.minimum), group.minimum), group.maximum)
            for group in fleet.groups
        }

    def count(self, group: WantedGroup) -> int:
        return 0 if group.name in self._empty else self._counts[group.name]

    def empty(self, name: str) -> None:
        """No processes of the group until a fleet is applied."""
        self._empty.add(name)

    def empty_all(self) -> None:
        self._empty |= self._counts.keys()

    def decide(self, fleet: WantedFleet, replicas: Iterable[Replica], now: float) -> bool:
        """Let scaling have its say, at most once in a period. Returns whether a number has changed."""
        elapsed_s = now - self._decided_s
        if elapsed_s < PERIOD_S:
            return False
        self._decided_s = now
        replicas = list(replicas)
        self._note_busy(replicas, elapsed_s)
        before = dict(self._counts)
        for name, scaler in self._scalers.items():
            group = fleet.group(name)
            if group is not None and name not in self._empty:
                sample = self.samples[name] = self._sample(group, replicas, now)
                self._counts[name] = scaler.decide(sample, self._counts[name])
        return self._counts != before

    def saved(self) -> dict[str, Any]:
        return {"counts": self._counts, "empty": sorted(self._empty)}

    def restore(self, fleet: WantedFleet, saved: dict[str, Any]) -> None:
        self._counts, self._empty = saved["counts"], set(saved["empty"])
        self._make_scalers(fleet)

    def _make_scalers(self, fleet: WantedFleet) -> None:
        self._scalers = {
            group.name: Scaler(group.minimum, group.maximum, group.scaling)
            for group in fleet.groups
            if group.scaling is not None
        }
        self.samples = {}

    def _note_busy(self, replicas: Sequence[Replica], elapsed_s: float) -> None:
        weight = 1.0 if math.isinf(elapsed_s) else 1 - math.exp(-elapsed_s / BUSY_S)
        now_busy = {one.worker_id: float(not one.report.load.idle) for one in replicas if one.report is not None}
        self._busy = {
            worker_id: self._busy.get(worker_id, busy) * (1 - weight) + busy * weight
            for worker_id, busy in now_busy.items()
        }

    def _sample(self, group: WantedGroup, replicas: Sequence[Replica], now: float) -> Sample:
        reports = [
            one.report
            for one in replicas
            if one.group == group.name and one.state == "serving" and one.report is not None
        ]
        sights = [
            one.report.sight
            for one in replicas
            if one.state == "serving" and one.model == group.model and one.report is not None and one.report.sight
        ]
        if not reports or not sights:
            return Sample(now, None, None)
        waits = [max(sight.queue_s.get(one.worker_id, 0.0) for sight in sights) for one in reports]
        queue_s = sum(waits) / len(waits)
        if group.role != "prefill":
            # requests that are not let in wait for room to decode
            queue_s += max(sight.admission_s for sight in sights)
        usage = sum(self._pressure(group, one) for one in reports) / len(reports)
        return Sample(now, queue_s, usage)

    def _pressure(self, group: WantedGroup, report: Report) -> float:
        load = report.load
        working = self._busy.get(report.worker_id, 0.0)
        if group.role == "prefill":
            return working
        share = max(load.usage, load.running / max(1, report.max_num_seqs))
        if load.waiting:
            share = max(share, min(MOST_PRESSURE, 1 + load.waiting / max(1, load.running)))
        return share
