"""The speed that is meant: floors to reach and goals beyond them, and where a run's rows answer for them.

All are for the llama-3.1-8b shape with random weights, in bfloat16 on one H100 with 80 GB. `known` are figures of
others for the same shape on the same kind of GPU: vLLM 0.24.0 as measured there, and what papers claim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .bench_decode import STEP
from .bench_prefill import BESIDE, COPY_OUT, FIRST_TOKEN
from .bench_results import Row
from .bench_service import BENCH, STREAMS

MODEL, GPU = "llama-3.1-8b", "H100"
LONG, HUNDRED_K, MIDDLE, SHORT = 130_000, 124_928, 32_768, 8192
TOLD_HIT_RATE = 0.6

Value = Callable[[Sequence[Row]], float | None]


@dataclass(frozen=True)
class Goal:
    """One line of the table.

    Attributes:
        what: what is measured, with its unit.
        known: what others reach, "" where nothing is known.
        floor: what has to be reached.
        goal: what is meant.
        value: the figure out of all rows, None where it was not measured.
        more_is_better: else less is.
    """

    what: str
    known: str
    floor: float
    goal: float
    value: Value
    more_is_better: bool = False

    def is_met(self, value: float, wanted: float) -> bool:
        return value >= wanted if self.more_is_better else value <= wanted


@dataclass(frozen=True)
class Place:
    """Which row is meant.

    Attributes:
        batch: None = the largest that fits.
        conditions: that it has to have; None = that it must not have.
    """

    what: str
    side: str
    context: int
    batch: int | None = 1
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def find(self, rows: Iterable[Row]) -> Row | None:
        """The row, if it ran."""
        return next((row for row in rows if self._is(row) and row.time is not None), None)

    def _is(self, row: Row) -> bool:
        if (row.model, row.what, row.side, row.context) != (MODEL, self.what, self.side, self.context):
            return False
        is_largest = bool(row.conditions.get("largest batch"))
        if is_largest if self.batch is not None else not is_largest:
            return False
        if self.batch is not None and row.batch != self.batch:
            return False
        return all(row.conditions.get(name) == value for name, value in self.conditions.items())


def _time(place: Place, unit_s: float = 1.0) -> Value:
    def value(rows: Sequence[Row]) -> float | None:
        row = place.find(rows)
        return None if row is None or row.time is None else row.time.median_s / unit_s

    return value


def _figure(place: Place, name: str) -> Value:
    def value(rows: Sequence[Row]) -> float | None:
        row = place.find(rows)
        return None if row is None else row.figures.get(name)

    return value


def _over_floor(place: Place) -> Value:
    def value(rows: Sequence[Row]) -> float | None:
        row = place.find(rows)
        return None if row is None or row.time is None or row.floor is None else row.time.median_s / row.floor.floor_s

    return value


def _longer(place: Place, than: Place) -> Value:
    def value(rows: Sequence[Row]) -> float | None:
        longer, shorter = _time(place)(rows), _time(than)(rows)
        return None if longer is None or shorter is None else longer / shorter - 1

    return value


def _first(side: str, context: int, batch: int = 1, copy_out: bool | None = None) -> Place:
    return Place(FIRST_TOKEN, side, context, batch, {COPY_OUT: copy_out})


def _step(side: str, context: int, batch: int | None = 1, hit_rate: float | None = None) -> Place:
    conditions = {} if hit_rate is None else {"hit rate": hit_rate}
    return Place(STEP, side, context, batch, conditions)


def _rate(side: str, context: int, hit_rate: float | None = None) -> Value:
    return _figure(_step(side, context, None, hit_rate), "tokens_per_s")


def _through_service(rows: Sequence[Row]) -> float | None:
    """The least share of the decode engine's own rate that a service kept."""
    found = [row.ratios[BENCH] for row in rows if row.what == STREAMS and row.model == MODEL and BENCH in row.ratios]
    return min(found, default=None)


MS = 1e-3
GOALS: tuple[Goal, ...] = (
    Goal("first token of 130,000 tokens, `exact`, s", "vLLM 10.06", 10.8, 10.3, _time(_first("exact", LONG))),
    Goal("the same, `fastkv`, s", "FastKV claims 1.82 times as fast", 6.0, 5.7, _time(_first("fastkv", LONG))),
    Goal("the same, `sluice`, s", "", 6.0, 5.7, _time(_first("sluice", LONG))),
    Goal("first token of 32,768 tokens, `exact`, s", "vLLM 1.178", 1.30, 1.18, _time(_first("exact", MIDDLE))),
    Goal("the same, `sluice`, s", "", 0.85, 0.72, _time(_first("sluice", MIDDLE))),
    Goal("first token of 8,192 tokens, `exact`, s", "vLLM 0.207", 0.23, 0.21, _time(_first("exact", SHORT))),
    Goal("last first token of 16 × 2,048 tokens, `exact`, s", "", 0.85, 0.75, _time(_first("exact", 2048, 16))),
    Goal(
        "packing and copying out, share of the first token of 130,000 tokens (`sluice-full` over `exact`)",
        "",
        0.08,
        0.03,
        _longer(_first("sluice-full", LONG, copy_out=True), _first("exact", LONG)),
    ),
    Goal("decode step at 124,928 tokens, `exact`, ms", "vLLM 12.07", 14, 12.1, _time(_step("exact", HUNDRED_K), MS)),
    Goal("the same, `sluice`, ms", "", 9.5, 7, _time(_step("sluice", HUNDRED_K, hit_rate=TOLD_HIT_RATE), MS)),
    Goal(
        "tokens/s at 124,928, largest batch, `sluice`",
        "vLLM 130; ShadowKV claims 3.04, RetroInfer 4.4 times as many as full attention",
        650,
        1300,
        _rate("sluice", HUNDRED_K, TOLD_HIT_RATE),
        more_is_better=True,
    ),
    Goal("the same at 32,768", "vLLM 524", 1800, 4000, _rate("sluice", MIDDLE, TOLD_HIT_RATE), more_is_better=True),
    Goal("tokens/s at 124,928, largest batch, `exact`", "vLLM 130", 115, 130, _rate("exact", HUNDRED_K),
         more_is_better=True),
    Goal("the same at 32,768", "vLLM 524", 460, 524, _rate("exact", MIDDLE), more_is_better=True),
    Goal("tokens/s at 124,928, largest batch, `shadowkv`", "", 250, 390, _rate("shadowkv", HUNDRED_K, TOLD_HIT_RATE),
         more_is_better=True),
    Goal(
        "bytes on the GPU for a sequence of 124,928 tokens, `sluice` over `exact`",
        "",
        1 / 6,
        1 / 12,
        _figure(_step("sluice", HUNDRED_K, None, TOLD_HIT_RATE), "resident_over_exact"),
    ),
    Goal("decode step of 32 × 4,096, `exact`, over its floor", "", 1.4, 1.2, _over_floor(_step("exact", 4096, 32))),
    Goal(
        "first token of 1,024 tokens beside 131,072, over alone (`sluice`)",
        "",
        5,
        2,
        _figure(Place(BESIDE, "sluice", 131_072, 1, {"tokens": 1024}), "beside_over_alone"),
    ),
    Goal("tokens/s through gRPC over the decode engine's own", "", 0.9, 0.95, _through_service, more_is_better=True),
)  # fmt: skip
