"""The tables of docs/metrics.md are the catalogue of metrics."""

from __future__ import annotations

import runpy

from kvsluice.services.metrics.catalog import TABLES


def test_the_page_lists_every_metric_and_no_other(root):
    page = (root / "docs" / "metrics.md").read_text()
    updated = runpy.run_path(str(root / "scripts" / "generate_metrics_table.py"))["updated"]
    assert updated(page) == page, "run scripts/generate_metrics_table.py"


def test_no_metric_is_in_the_catalogue_twice():
    names = [metric.name for metrics in TABLES.values() for metric in metrics]
    assert len(set(names)) == len(names)


def test_histograms_have_ascending_buckets_and_others_none():
    for metrics in TABLES.values():
        for metric in metrics:
            assert bool(metric.buckets) == (metric.kind == "histogram"), metric.name
            assert list(metric.buckets) == sorted(set(metric.buckets)), metric.name


def test_meanings_are_in_ascii_as_rays_monitoring_takes_nothing_else() -> None:
    wrong = [metric.name for metrics in TABLES.values() for metric in metrics if not metric.text.isascii()]
    assert not wrong
