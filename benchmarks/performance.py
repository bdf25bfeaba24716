"""Tables and a plot of what `kvsluice bench` found, for docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..evals.pages import table
from ..evals.results import TRANSFORMERS
from ..evals.svg import as_text, drawing
from ..kernels.dispatch import REFERENCE
from .bench_decode import STEP
from .bench_failover import AGAIN, FROM_STORE, NEXT_TOKEN
from .bench_prefill import BESIDE, FIRST_TOKEN
from .bench_results import BenchResults, Row
from .bench_service import BENCH, STREAMS
from .bench_tiers import BY_TURNS, LOAD, WHOLE
from .bench_tiers import WHAT as TURNS
from .goals import GOALS, GPU, MODEL
from .store_sides import LIBRARY, OURS, TOOL
from .tables import figure, seconds

NOT_MEASURED = "Not measured yet."
FINGERPRINT_DIGITS = 8
LEAST_SHARE = 0.01  # kinds of work below it are shown together
REMAINDER = "everything else"
INCHES_A_ROW, WIDTH_INCHES = 0.42, 8.4


@dataclass(frozen=True)
class File:
    """A file of results and its name without `.json`."""

    name: str
    results: BenchResults

    @property
    def gpu(self) -> str:
        return str(self.results.environment["hardware"].get("gpu", ""))


def origins(files: Sequence[File]) -> str:
    """What was measured where: one line a file."""
    lines = []
    for file in files:
        made, limits = file.results.environment, file.results.limits
        lines.append(
            f"- `benchmarks/results/{file.name}.json`: {file.results.part} on one {file.gpu or 'CPU'}, "
            f"torch {made['libraries']['torch']}, commit {made['commit']}; a copy moved "
            f"{limits.copy_bytes_per_s / 1e12:.2f} TB/s, a matrix product ran at "
            f"{limits.gemm_flops_per_s / 1e12:.0f} TFLOP/s" + _link(file)
        )
    return "\n".join(lines) or NOT_MEASURED


def _link(file: File) -> str:
    rate = file.results.limits.to_host_bytes_per_s
    return "." if rate is None else f", a copy to the host at {rate / 1e9:.1f} GB/s."


def goals_table(files: Sequence[File]) -> str:
    """What is meant and what was reached."""
    rows = [row for file in files if GPU in file.gpu for row in file.results.rows]
    lines = []
    for goal in GOALS:
        value = goal.value(rows)
        shown = "not measured" if value is None else _number(value)
        reached = "" if value is None else _reached(goal.is_met(value, goal.floor), goal.is_met(value, goal.goal))
        lines.append((goal.what, goal.known, _number(goal.floor), _number(goal.goal), shown, reached))
    header = ("what", "known", "floor", "goal", "measured", "reached")
    return table(header, lines, numbers_from=2)


def _reached(floor: bool, goal: bool) -> str:
    if goal:
        return "goal"
    return "floor" if floor else "**neither**"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def prefill_table(files: Sequence[File]) -> str:
    """Time to first token, by context and side."""
    header = ("tokens", "side", "first token", "floor", "÷ floor", "times as fast as transformers", "TFLOP/s", "peak")
    lines = []
    for row in _rows(files, FIRST_TOKEN):
        count = f"{row.batch} × {row.context:,}" if row.batch != 1 else f"{row.context:,}"
        side = _side(row) + (", copied to the host" if row.conditions.get("copy_out") else "")
        if row.time is None:
            lines.append((count, side, "not run", "", "", "", "", row.not_run or ""))
            continue
        ratio = row.ratios.get(TRANSFORMERS)
        peak = figure("peak_bytes", row.figures["peak_bytes"])
        rate = f"{row.figures['tflop_per_s']:.0f}"
        lines.append((count, side, seconds(row.time.median_s), *_floor(row), _times(ratio), rate, peak))
    beside = [
        f"A prompt of {row.conditions['tokens']:,} tokens beside one of {row.context:,} under `{row.side}` has its "
        f"first token after {seconds(row.time.median_s)}, alone after {seconds(row.figures['alone_s'])}."
        for row in _rows(files, BESIDE)
        if row.time is not None
    ]
    return "\n\n".join([_table(header, lines), *beside])


def decode_table(files: Sequence[File]) -> str:
    """Steps, by context, batch and side."""
    header = ("sequences × tokens", "side", "hit rate", "step", "floor", "÷ floor", "tokens/s", "bytes on the GPU each",
              "÷ `exact`", "fetched from the host")  # fmt: skip
    lines = []
    for row in _rows(files, STEP):
        largest = ", largest batch" if row.conditions.get("largest batch") else ""
        count, rate = f"{row.batch or '-'} × {row.context:,}{largest}", row.conditions.get("hit rate")
        hit = "" if rate is None else f"{rate}"
        if row.time is None:
            lines.append((count, _side(row), hit, "not run", "", "", "", "", "", row.not_run or ""))
            continue
        over = row.figures.get("resident_over_exact")
        fetched = row.figures.get("fetched_bytes")
        lines.append(
            (count, _side(row), hit, seconds(row.time.median_s), *_floor(row), f"{row.figures['tokens_per_s']:,.0f}",
             figure("resident_bytes", row.figures["resident_bytes"]), "" if over is None else f"{over:.3f}",
             "" if fetched is None else figure("fetched_bytes", fetched))
        )  # fmt: skip
    return _table(header, lines)


def service_table(files: Sequence[File]) -> str:
    """What clients of the whole service see."""
    header = ("streams × tokens", "side", "tokens/s", "÷ decode engine alone", "token, median", "token, p99",
              "first token, mean", "first token, last")  # fmt: skip
    lines: list[tuple[str, ...]] = []
    for row in _rows(files, STREAMS):
        count = f"{row.batch} × {row.context:,}"
        if row.time is None:
            lines.append((count, _side(row), "not run", "", "", "", "", row.not_run or ""))
            continue
        waits = [seconds(row.figures[name]) for name in ("token_p99_s", "mean_first_token_s", "last_first_token_s")]
        own = (f"{row.figures['tokens_per_s']:,.0f}", _times(row.ratios.get(BENCH)), seconds(row.time.median_s))
        lines.append((count, _side(row), *own, *waits))
    return _table(header, lines)


def tiers_table(files: Sequence[File]) -> str:
    """What it costs that more sequences run than the device holds."""
    header = ("sequences ÷ pool", "side", "sequences", "held at once", "tokens/s", "÷ those of 1 ×", f"÷ {WHOLE}",
              "moved both ways, GB/s")  # fmt: skip
    lines: list[tuple[str, ...]] = []
    for file in files:
        for row in (row for row in file.results.rows if row.what == TURNS and row.conditions["where"] == BY_TURNS):
            name = f"{_side(row)}, {row.context:,} tokens, {file.gpu or 'CPU'}"
            if row.time is None:
                lines.append((f"{row.conditions[LOAD]} ×", name, "not run", "", "", "", "", row.not_run or ""))
                continue
            ratios = [_times(row.ratios.get(f"{other}, tokens/s")) for other in ("1 ×", WHOLE)]
            moved = row.figures.get("moved_per_s_bytes", 0.0) / 1e9
            counts = (f"{row.figures['sequences']:.0f}", f"{row.batch}", f"{row.figures['tokens_per_s']:,.0f}")
            lines.append((f"{row.conditions[LOAD]} ×", name, *counts, *ratios, f"{moved:.1f}" if moved else ""))
    return _table(header, lines)


def failover_table(files: Sequence[File]) -> str:
    """How soon a stream goes on behind a lost decode worker."""
    header = ("tokens", "side", "from the store", "prompt run again", "times as soon", "tokens run again")
    lines: list[tuple[str, ...]] = []
    for file in files:
        rows = [row for row in file.results.rows if row.what == NEXT_TOKEN and row.time is not None]
        for row in (row for row in rows if row.side == FROM_STORE):
            alike = (row.context, row.recipe_fingerprint)
            again = next((o for o in rows if o.side == AGAIN and (o.context, o.recipe_fingerprint) == alike), None)
            if row.time is None or again is None or again.time is None:
                continue
            name = f"{row.conditions['recipe']} ({row.model}), {file.gpu or 'CPU'}"
            own = (seconds(row.time.median_s), seconds(again.time.median_s), _times(row.ratios.get(AGAIN)))
            lines.append((f"{row.context:,}", name, *own, f"{row.figures['recomputed_tokens']:.0f}"))
    return _table(header, lines)


def store_table(files: Sequence[File]) -> str:
    """How fast values of requests are written and read, and what other clients take for the same."""
    header = ("what", "bytes", "at once", "an operation", "99th of 100", "GB/s", f"÷ {LIBRARY}", f"÷ {TOOL}")
    lines: list[tuple[str, ...]] = []
    for row in (row for file in files if file.results.part == "store" for row in file.results.rows):
        if row.side != OURS or row.time is None:
            continue
        size, rate = row.figures.get("value_bytes"), row.figures.get("bytes_per_s")
        value = ("", "") if size is None or rate is None else (figure("value_bytes", size), f"{rate / 1e9:.2f}")
        times = (seconds(row.time.median_s), seconds(row.figures["latency_p99_s"]))
        ratios = [_times(row.ratios.get(other)) for other in (LIBRARY, TOOL)]
        lines.append((row.what.removeprefix("store: "), value[0], f"{row.batch}", *times, value[1], *ratios))
    return _table(header, lines)


def kernels_table(files: Sequence[File]) -> str:
    """Every operation at every shape: what runs on the GPU, against its floor and its torch reference."""
    header = ("operation", "model", "rows", "time", "floor", "share of the limit", "bound by", "times as fast as torch")
    lines = []
    for row in (row for file in files if file.results.part == "kernels" for row in file.results.rows):
        if row.side == REFERENCE or row.time is None or row.floor is None:
            continue
        share = f"{row.floor.floor_s / row.time.median_s:.2f}"
        rows = "" if row.context is None else f"{row.context:,}"
        ratio = _times(row.ratios.get(REFERENCE))
        name = row.what.removeprefix("kernel: ")
        own = (seconds(row.time.median_s), seconds(row.floor.floor_s), share, row.floor.bound, ratio)
        lines.append((f"`{name}`", row.model, rows, *own))
    return _table(header, lines)


def parts_plot(files: Sequence[File], what: str) -> str:
    """Where the time of a step, or of a prompt, goes: one bar a row that has it recorded; "" where none has."""
    rows = [row for row in _rows(files, what) if row.parts]
    if not rows:
        return ""
    from matplotlib.figure import Figure

    kinds = _kinds(rows)
    with drawing():
        drawn = Figure(figsize=(WIDTH_INCHES, 1.5 + INCHES_A_ROW * len(rows)), layout="constrained")
        axes = drawn.subplots()
        for place, row in enumerate(rows):
            left = 0.0
            for number, (kind, part_s) in enumerate(_shown(row, kinds).items()):
                label = kind if place == 0 else None
                axes.barh(place, 1e3 * part_s, left=left, color=f"C{number % 10}", label=label,
                          hatch="//" if number >= 10 else None)  # fmt: skip
                left += 1e3 * part_s
        axes.set_yticks(range(len(rows)), [_bar_name(row) for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds")
        drawn.legend(loc="outside upper center", ncols=4, frameon=False)
        return as_text(drawn)


def _kinds(rows: Sequence[Row]) -> list[str]:
    """Kinds of work that some row spends a share on that can be seen, the longest first."""
    most: dict[str, float] = {}
    for row in rows:
        total_s = sum(row.parts.values())
        for kind, part_s in row.parts.items():
            most[kind] = max(most.get(kind, 0.0), part_s / total_s)
    return [kind for kind, share in sorted(most.items(), key=lambda item: -item[1]) if share >= LEAST_SHARE]


def _shown(row: Row, kinds: Sequence[str]) -> dict[str, float]:
    own = {kind: row.parts.get(kind, 0.0) for kind in kinds}
    return own | {REMAINDER: sum(row.parts.values()) - sum(own.values())}


def _bar_name(row: Row) -> str:
    rate = row.conditions.get("hit rate")
    return f"{row.side}, {row.batch} × {row.context:,}" + ("" if rate is None else f", {rate} hits")


def _rows(files: Sequence[File], what: str) -> Iterator[Row]:
    return (row for file in files for row in file.results.rows if row.what == what)


def _side(row: Row) -> str:
    name = row.side if row.model == MODEL else f"{row.side} ({row.model})"
    digits = "" if row.recipe_fingerprint is None else f" `{row.recipe_fingerprint[:FINGERPRINT_DIGITS]}`"
    return f"{name}{digits}"


def _floor(row: Row) -> tuple[str, str]:
    assert row.time is not None
    if row.floor is None:
        return ("", "")
    return seconds(row.floor.floor_s), f"{row.time.median_s / row.floor.floor_s:.2f}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return table(header, lines, numbers_from=2) if lines else NOT_MEASURED
