"""Every query of the Grafana dashboard, against what `/metrics` of a running gateway and worker says.

As much of PromQL as the dashboard uses is read here, strictly: what is not understood is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from kvsluice.errors import InvalidRequest
from kvsluice.kvstore.memory import MemoryStore
from kvsluice.services.metrics.catalog import GATEWAY, GATEWAY_LABELS, WORKER, WORKER_LABELS

DASHBOARD = Path(__file__).resolve().parents[3] / "helm" / "kvsluice" / "dashboards" / "kvsluice.json"
SERIES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
# what a fleet in one process without a GPU, a remote store and faults has no series of; the catalogue has the labels
NOT_HERE = re.compile(
    r"worker_gpu_|worker_store_breaker|worker_failures|worker_store_operation_failures|requests_shed|request_migrations"
    r"|handoff_failures"
)


FUNCTIONS = {"sum", "rate", "histogram_quantile", "label_values"}
_TOKEN = re.compile(
    r"\s*(?:(?P<name>[A-Za-z_:][\w:]*)|(?P<number>\d+(?:\.\d+)?)|(?P<string>\"[^\"\\]*\")|(?P<range>\[\$__rate_interval\])"
    r"|(?P<op>=~|!~|!=|=|[-+*/(){},]))"
)


@dataclass(frozen=True)
class Selector:
    """A metric in a query.

    Attributes:
        name: as exported, `_bucket` and the like included.
        labels: those that are matched, and those that something around it groups by.
    """

    name: str
    labels: frozenset[str]


def tokens(query: str) -> list[tuple[str, str]]:
    """(kind, text) of each. Raises ValueError at what is none."""
    found, at = [], 0
    while query[at:].strip():
        match = _TOKEN.match(query, at)
        if match is None or match.lastgroup is None:
            raise ValueError(f"cannot be read from {query[at : at + 20]!r} on")
        found.append((match.lastgroup, match[match.lastgroup]))
        at = match.end()
    return found


class _Reader:
    def __init__(self, query: str) -> None:
        self._tokens = tokens(query)
        self._at = 0

    def peek(self) -> tuple[str, str]:
        return self._tokens[self._at] if self._at < len(self._tokens) else ("end", "")

    def take(self, kind: str = "", text: str = "") -> str:
        found = self.peek()
        if (kind and found[0] != kind) or (text and found[1] != text):
            raise ValueError(f"expected {text or kind}, found {found[1] or 'the end'}")
        self._at += 1
        return found[1]

    def expression(self, grouped: frozenset[str]) -> Iterator[Selector]:
        yield from self.term(grouped)
        while self.peek()[1] in ("+", "-", "*", "/"):
            self.take()
            yield from self.term(grouped)

    def term(self, grouped: frozenset[str]) -> Iterator[Selector]:
        kind, text = self.peek()
        if kind == "number":
            self.take()
        elif text == "(":
            self.take()
            yield from self.expression(grouped)
            self.take(text=")")
        elif text == "{":
            yield from self.selector("", grouped)
        else:
            name = self.take("name")
            if name in FUNCTIONS:
                yield from self.call(name, grouped)
            else:
                yield from self.selector(name, grouped)
        if self.peek()[0] == "range":
            self.take()

    def call(self, name: str, grouped: frozenset[str]) -> Iterator[Selector]:
        if name == "sum" and self.peek()[1] == "by":
            self.take()
            self.take(text="(")
            grouped |= set(self.names(")"))
        self.take(text="(")
        yield from self.expression(grouped)
        while self.peek()[1] == ",":
            self.take()
            if name == "label_values":
                self.take("name")
            else:
                yield from self.expression(grouped)
        self.take(text=")")

    def names(self, end: str) -> Iterator[str]:
        while self.peek()[1] != end:
            yield self.take("name")
            if self.peek()[1] == ",":
                self.take()
        self.take(text=end)

    def selector(self, name: str, grouped: frozenset[str]) -> Iterator[Selector]:
        self.take(text="{")  # a metric without labels is not meant: it would join models
        matched, names = set(), [name]
        while self.peek()[1] != "}":
            label = self.take("name")
            if self.take("op") not in ("=", "!=", "=~", "!~"):
                raise ValueError(f"{label} is not compared")
            value = self.take("string").strip('"')
            if label == "__name__":
                names = value.split("|")
            else:
                matched.add(label)
            if self.peek()[1] == ",":
                self.take()
        self.take(text="}")
        yield from (Selector(one, frozenset(matched) | grouped) for one in names)


def selectors(query: str) -> list[Selector]:
    """Every metric that a query reads. Raises ValueError where it cannot be understood."""
    reader = _Reader(query)
    found = list(reader.expression(frozenset()))
    reader.take("end")
    return found


def catalogued() -> dict[str, frozenset[str]]:
    """Labels of every series that may ever be exported."""
    known = {}
    for catalogue, common in ((GATEWAY, GATEWAY_LABELS), (WORKER, WORKER_LABELS)):
        for metric in catalogue:
            base = metric.exported_name.removesuffix("_total")
            for end in SERIES[metric.kind]:
                known[base + end] = frozenset({*common, *metric.labels} | ({"le"} if end == "_bucket" else set()))
    return known


def exported(*texts: bytes) -> dict[str, frozenset[str]]:
    """Labels of every series in outputs of `/metrics`."""
    return {
        sample.name: frozenset(sample.labels)
        for text in texts
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def queries() -> list[tuple[str, str]]:
    """(where, query) of every panel and variable."""
    board = json.loads(DASHBOARD.read_text())
    panels = [(panel["title"], target["expr"]) for panel in board["panels"] for target in panel.get("targets", [])]
    variables = [(v["name"], v["query"]["query"]) for v in board["templating"]["list"] if v["type"] == "query"]
    return panels + variables


async def test_every_query_reads_what_is_exported(make_real_fleet):
    fleet = await make_real_fleet(quality_sample_rate=1.0, store=MemoryStore(1 << 26))
    ids = torch.randint(2, 256, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    options = {"recipe": "sluice-full", "durability": "tokens", "max_tokens": 6, "ignore_eos": True}
    slots = {"retrieval": {"kind": "chunks", "chunk": 4, "outliers": 0, "budget_tokens": 16, "budget_rate": 0.001}}
    done = await fleet.client.generate(ids, slots=slots, **options)
    assert done.recipe.fallback_reason == ""
    with pytest.raises(InvalidRequest):
        await fleet.client.generate(ids, temperature=99.0)
    await fleet.until_idle()
    known, here = catalogued(), exported(fleet.gateway.metrics.render(), fleet.metrics.render())
    assert not {name: labels for name, labels in here.items() if known.get(name) != labels}, "not in the catalogue"
    read = {}
    for where, query in queries():
        for selector in selectors(query):
            read[selector.name] = where
            labels = known[selector.name] if NOT_HERE.search(selector.name) else here.get(selector.name)
            assert labels is not None, f"{where}: {selector.name} is not exported"
            assert selector.labels <= labels, f"{where}: {selector.name} has no {selector.labels - labels}"
    assert len(read) > 50
    assert not {name for name in read if NOT_HERE.search(name) and name in here}, "here after all"


def test_the_rows_are_there_and_every_panel_has_a_unit_and_a_name():
    board = json.loads(DASHBOARD.read_text())
    rows = [panel["title"] for panel in board["panels"] if panel["type"] == "row"]
    assert rows == ["SLO", "Throughput", "Caches and tiers", "Handoff", "Faults", "GPU"]
    charts = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in charts:
        assert panel["fieldConfig"]["defaults"]["unit"] and panel["targets"], panel["title"]
        assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]
        for legend in (target["legendFormat"] for target in panel["targets"]):
            by = set(re.findall(r"{{(\w+)}}", legend))
            assert all(by <= one.labels for t in panel["targets"][:1] for one in selectors(t["expr"])), panel["title"]


@pytest.mark.parametrize(
    "query",
    ["up", 'sum(rate(x{a="b"}[5m]))', 'max(x{a="b"})', "x{a}", 'sum by (a (x{b="c"})', 'x{a="b"} y{a="b"}'],
)
def test_what_cannot_be_read_is_an_error(query):
    with pytest.raises(ValueError, match=r"expected|cannot be read|not compared"):
        selectors(query)
