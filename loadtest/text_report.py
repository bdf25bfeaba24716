"""The closing report on the terminal, in the layout of `vllm bench serve`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .figures import percentile_key
from .goals import METRICS
from .results import RunResults

WIDTH = 50
TITLES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
    "shed": "Time until Shed",
}


def report(run: RunResults, metrics: Sequence[str] = METRICS) -> str:
    """All of it, with a line feed at the end."""
    figures = run.figures
    lines = [f"{' Serving Benchmark Result ':=^{WIDTH}}", *_counts(run), *_throughput(run)]
    for metric in (*metrics, "shed"):
        if f"mean_{metric}_ms" in figures:
            lines += _latency(figures, metric)
    lines += _recipes(run) + _client(run)
    lines.append("=" * WIDTH)
    lines += [_judged(one) for one in run.goals]
    if run.invalid:
        lines.append(f"INVALID: {run.invalid}; these figures describe the client, not the service")
    return "\n".join(lines) + "\n"


def _line(name: str, value: Any) -> str:
    shown = f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{name:<40} {shown:<10}".rstrip()


def _counts(run: RunResults) -> list[str]:
    counts = run.figures["counts"]
    lines = [_line("Successful requests:", run.figures["completed"])]
    lines += [
        _line(f"{name} requests:", counts[status])
        for name, status in (
            ("Failed", "failed"),
            ("Shed", "shed"),
            ("Past-deadline", "deadline"),
            ("Cancelled", "cancelled"),
            ("Never sent", "dropped"),
        )
        if counts[status] or status == "failed"
    ]
    lines += [_line(f"  {name}:", count) for name, count in sorted(run.figures["errors"].items())]
    if run.figures["left_out"]:
        lines.append(_line("Left out (longer than the model takes):", run.figures["left_out"]))
    if run.settings.get("max_concurrency"):
        lines.append(_line("Maximum request concurrency:", run.settings["max_concurrency"]))
    if run.figures["offered_rate"] is not None and not run.settings.get("closed_loop"):
        lines.append(_line("Request rate offered (req/s):", run.figures["offered_rate"]))
    return lines


def _throughput(run: RunResults) -> list[str]:
    names = {
        "Benchmark duration (s):": "duration",
        "Total input tokens:": "total_input_tokens",
        "Total generated tokens:": "total_output_tokens",
        "Request throughput (req/s):": "request_throughput",
        "Request goodput (req/s):": "request_goodput",
        "Output token throughput (tok/s):": "output_throughput",
        "Peak output token throughput (tok/s):": "max_output_tokens_per_s",
        "Peak concurrent requests:": "max_concurrent_requests",
        "Total token throughput (tok/s):": "total_token_throughput",
    }
    return [_line(name, run.figures[key]) for name, key in names.items() if key in run.figures]


def _latency(figures: dict[str, Any], metric: str) -> list[str]:
    name = metric.upper() if metric != "shed" else "shed"
    lines = [
        f"{TITLES[metric]:-^{WIDTH}}",
        _line(f"Mean {name} (ms):", figures[f"mean_{metric}_ms"]),
        _line(f"Median {name} (ms):", figures[f"median_{metric}_ms"]),
    ]
    percents = [float(key[1:].split("_")[0]) for key in figures if key.startswith("p") and key.endswith("_ttft_ms")]
    percents = percents or [float(k[1:].split("_")[0]) for k in figures if k[0] == "p" and k.endswith(f"_{metric}_ms")]
    return lines + [
        _line(f"P{p:g} {name} (ms):", figures[percentile_key(p, metric)])
        for p in percents
        if percentile_key(p, metric) in figures
    ]


def _recipes(run: RunResults) -> list[str]:
    if not run.recipes:
        return []
    lines = [f"{'Recipes':-^{WIDTH}}"]
    for name, figures in run.recipes.items():
        ttft, tpot = figures.get("mean_ttft_ms"), figures.get("mean_tpot_ms")
        shown = f"TTFT {ttft:.0f} ms" if ttft is not None else "no tokens"
        shown += f", TPOT {tpot:.1f} ms" if tpot is not None else ""
        lines.append(f"{name or 'default'}: {figures['completed']} served, mean {shown}")
    return lines


def _client(run: RunResults) -> list[str]:
    client = run.client
    return [
        f"{'Client':-^{WIDTH}}",
        _line(f"Sent more than {1e3 * client['late_after_s']:.0f} ms late:", client["late"]),
        _line("Latest sending (ms):", 1e3 * client["most_late_s"]),
        _line("P99 event loop lag (ms):", 1e3 * client["lag_p99_s"]),
        _line("Event loop busy (share of a core):", client["busy_share"]),
        _line("Most memory of the client (MiB):", client["max_rss_bytes"] / 2**20),
    ]


def _judged(one: dict[str, Any]) -> str:
    return f"SLO {one['name']}: {one['shown']}, wanted at most {one['wanted']}: {'met' if one['met'] else 'MISSED'}"
