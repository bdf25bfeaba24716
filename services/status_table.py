"""A fleet's state as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table
from rich.text import Text

STYLES = {"serving": "green", "starting": "yellow", "draining": "cyan", "lost": "red", "failed": "red"}


def status_table(state: Mapping[str, Any]) -> Group:
    """Groups, then processes, then what keeps some from serving.

    Args:
        state: of `fleet_status`.
    """
    as_wanted = "as wanted" if state["converged"] else "on its way to what is wanted"
    title = f"fleet {state['fleet']}: {as_wanted}; membership {state['generation']}"
    problems = [
        Text(f"{one['worker']}: {one['error'] or one['waits_for']}", style="red" if one["error"] else "yellow")
        for one in state["workers"]
        if one["error"] or one["waits_for"]
    ]
    return Group(Text(title), _groups(state), _workers(state), *problems)


def _groups(state: Mapping[str, Any]) -> Table:
    table = Table("group", "role", "model", "version", "serving", box=SIMPLE)
    for name in ("queue", "usage"):
        table.add_column(name, justify="right")
    for one in state["groups"]:
        count = f"{one['serving']} of {one['wanted']}"
        if one["min"] != one["max"]:
            count += f" ({one['min']}–{one['max']})"
        if one["draining"]:
            count += f", {one['draining']} draining"
        table.add_row(
            one["group"],
            one["role"],
            one["model"],
            one["version"],
            count,
            _seconds(one["queue_s"]),
            _share(one["usage"]),
        )
    return table


def _workers(state: Mapping[str, Any]) -> Table:
    table = Table("worker", "state", "version", "address", "kvsluice", box=SIMPLE)
    for name in ("starts", "running", "waiting", "prefill", "cache"):
        table.add_column(name, justify="right")
    for one in state["workers"]:
        table.add_row(
            one["worker"],
            Text(f"{one['state']} {_seconds(one['state_s'])}", style=STYLES.get(one["state"], "")),
            one["version"],
            one.get("address") or "–",
            one.get("package") or "–",
            str(one["restarts"] + 1),
            _count(one.get("running")),
            _count(one.get("waiting")),
            "–" if one["role"] in ("gateway", "decode") else _count(one.get("pending_tokens")),
            "–" if one["role"] in ("gateway", "prefill") else _share(one.get("cache_usage")),
        )
    return table


def _count(value: int | None) -> str:
    return "–" if value is None else str(value)


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f} s" if value < 60 else f"{value / 60:.0f} min" if value < 3600 else f"{value / 3600:.1f} h"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"
