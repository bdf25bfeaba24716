"""A registry of the metrics of a catalogue. The metrics library is loaded when one is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from math import inf
from typing import TYPE_CHECKING, Any

from .catalog import PREFIX, Metric
from .figures import Distribution

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric as Family

Sample = tuple[str, Mapping[str, str], float]
"""A metric's name, its labels beside the common ones, its value."""
Buckets = tuple[str, Mapping[str, str], Distribution]
"""The same of a histogram."""


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

    def on_scrape(
        self, samples: Callable[[], Iterable[Sample]], buckets: Callable[[], Iterable[Buckets]] = lambda: ()
    ) -> None:
        """Ask for metrics whenever they are read, on the reader's thread.

        Args:
            samples: gauges and counters of the catalogue that nothing else sets.
            buckets: its histograms, likewise.
        """
        self.prometheus.register(_Asked(self._known, self._common, samples, buckets))

    def render(self) -> bytes:
        """The text that `/metrics` answers with."""
        from prometheus_client import generate_latest

        return generate_latest(self.prometheus)


class _Asked:
    """A collector of what is known elsewhere."""

    def __init__(
        self,
        known: Mapping[str, Metric],
        common: Mapping[str, str],
        samples: Callable[[], Iterable[Sample]],
        buckets: Callable[[], Iterable[Buckets]],
    ) -> None:
        self._known, self._common, self._samples, self._buckets = known, common, samples, buckets

    def describe(self) -> list[Family]:
        """Nothing, so that registering asks for no samples."""
        return []

    def collect(self) -> Iterator[Family]:
        """See the library's `Collector`."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
        from prometheus_client.utils import floatToGoString

        kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
        families: dict[str, Any] = {}

        def family(name: str) -> Any:
            metric = self._known[name]
            if name not in families:
                families[name] = kinds[metric.kind](PREFIX + name, metric.text, labels=[*self._common, *metric.labels])
            return families[name]

        for name, labels, value in self._samples():
            family(name).add_metric(self._values(name, labels), value)
        for name, labels, seen in self._buckets():
            # copied once: the engine's thread goes on counting
            cumulative = list(accumulate(list(seen.counts)))
            bounds = [floatToGoString(bound) for bound in (*seen.bounds, inf)]  # type: ignore[no-untyped-call]
            family(name).add_metric(self._values(name, labels), list(zip(bounds, cumulative, strict=True)), seen.total)
        yield from families.values()

    def _values(self, name: str, labels: Mapping[str, str]) -> list[str]:
        """Of all labels of a series, in their order."""
        return [*self._common.values(), *(labels[label] for label in self._known[name].labels)]
