"""A registry of the metrics of a catalogue. The metrics library is loaded when one is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .catalog import PREFIX, Metric

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric as Family

Sample = tuple[str, Mapping[str, str], float]
"""A metric's name, its labels beside the common ones, its value."""


class Registry:
    """Metrics of one process.

    Args:
        metrics: all that may ever be exported.
        common: labels that every series carries.

    Attributes:
        prometheus: the library's registry.
    """

    def __init__(self, metrics: Sequence[Metric], common: Mapping[str, str]) -> None:
        from prometheus_client import CollectorRegistry

        self.prometheus: CollectorRegistry = CollectorRegistry()
        self._common = dict(common)
        self._known = {metric.name: metric for metric in metrics}
        self._metrics: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        """The library's metric of that name, with the common labels set where it has no others."""
        return self._metrics.get(name) or self._made(name)

    def labelled(self, name: str, **labels: str) -> Any:
        """A series of the metric of that name."""
        return self[name].labels(**self._common, **labels)

    def _made(self, name: str) -> Any:
        import prometheus_client

        metric = self._known[name]
        kinds = {"counter": "Counter", "gauge": "Gauge", "histogram": "Histogram"}
        options: dict[str, Any] = {"buckets": metric.buckets} if metric.kind == "histogram" else {}
        made = getattr(prometheus_client, kinds[metric.kind])(
            PREFIX + name, metric.text, [*self._common, *metric.labels], registry=self.prometheus, **options
        )
        self._metrics[name] = made if metric.labels else made.labels(**self._common)
        return self._metrics[name]

    def on_scrape(self, samples: Callable[[], Iterable[Sample]]) -> None:
        """Ask for gauges and counters whenever the metrics are read, on the reader's thread.

        Args:
            samples: names metrics of the catalogue that nothing else sets.
        """
        self.prometheus.register(_Asked(self._known, self._common, samples))

    def render(self) -> bytes:
        """The text that `/metrics` answers with."""
        from prometheus_client import generate_latest

        return generate_latest(self.prometheus)


class _Asked:
    """A collector of what is known elsewhere."""

    def __init__(
        self, known: Mapping[str, Metric], common: Mapping[str, str], samples: Callable[[], Iterable[Sample]]
    ) -> None:
        self._known, self._common, self._samples = known, common, samples

    def describe(self) -> list[Family]:
        """Nothing, so that registering asks for no samples."""
        return []

    def collect(self) -> Iterator[Family]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        families: dict[str, Any] = {}
        for name, labels, value in self._samples():
            metric = self._known[name]
            if name not in families:
                kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
                families[name] = kind(PREFIX + name, metric.text, labels=[*self._common, *metric.labels])
            families[name].add_metric([*self._common.values(), *(labels[label] for label in metric.labels)], value)
        yield from families.values()
