"""Metrics in Ray's own monitoring, and so in its dashboard: every series of a process's registry is one of Ray's.

A series keeps its name and labels; Ray puts `ray_` before the name and labels of its own beside them. All of them are
gauges to Ray, set to what the registry holds: counters and buckets then read as they do at `/metrics`, down to their
return to 0 when a worker is restarted, which Prometheus' `rate` takes for what it is.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from ray.util.metrics import Gauge

from .telemetry import where

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

log = logging.getLogger("kvsluice.metrics")

PERIOD_S = 5.0
LIBRARY = "_created"

Series = tuple[str, tuple[tuple[str, str], ...]]


class RayMirror:
    """Keeps Ray's metrics equal to those of a registry.

    Args:
        registry: of the process.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._gauges: dict[str, Gauge] = {}
        self._shown: set[Series] = set()

    def publish(self) -> int:
        """Set all of them now; those that are gone from the registry become 0. Returns how many series there are."""
        series = {
            (sample.name, tuple(sorted(sample.labels.items()))): (sample.value, family.documentation)
            for family in self._registry.collect()
            for sample in family.samples
            if not sample.name.endswith(LIBRARY)
        }
        for key, (value, text) in series.items():
            self._set(key, value, text)
        for key in self._shown - set(series):
            self._set(key, 0.0, "")
        self._shown |= set(series)
        return len(series)

    def _set(self, key: Series, value: float, text: str) -> None:
        name, labels = key
        gauge = self._gauges.get(name)
        if gauge is None:
            gauge = self._gauges[name] = Gauge(name, text, tuple(label for label, _ in labels))
        gauge.set(value, tags=dict(labels))


def mirror(registry: CollectorRegistry) -> None:
    """Publish a registry's metrics every few seconds, on a thread of its own, as long as the process lives."""
    target = RayMirror(registry)

    def run() -> None:
        pause = threading.Event()
        while not pause.wait(PERIOD_S):
            try:
                target.publish()
            except Exception as exc:  # a service does its work without Ray's monitoring, too
                log.warning("metrics were not given to Ray: %s", where(exc))

    threading.Thread(target=run, name="ray-metrics", daemon=True).start()
