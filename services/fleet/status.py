"""A fleet's state as plain data: what `kvsluice status` shows and prints as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..gateway.membership import MembershipTable
from .replica import Replica
from .sizes import Sizes
from .wanted import WantedFleet, WantedGroup


def fleet_status(
    fleet: WantedFleet | None, sizes: Sizes, replicas: Iterable[Replica], table: MembershipTable, now: float
) -> dict[str, Any]:
    """All groups, and all processes, as JSON takes them."""
    replicas = sorted(replicas, key=lambda one: (one.group, one.number))
    groups = [_group(group, sizes, replicas) for group in (fleet.groups if fleet else ())]
    extra = {one.group for one in replicas} - {group["group"] for group in groups}
    return {
        "fleet": fleet.name if fleet else "",
        "generation": table.generation,
        "converged": fleet is not None and not extra and all(group["converged"] for group in groups),
        "groups": groups,
        "workers": [_worker(one, now) for one in replicas],
    }


def _group(group: WantedGroup, sizes: Sizes, replicas: list[Replica]) -> dict[str, Any]:
    own = [one for one in replicas if one.group == group.name]
    current = [one for one in own if one.version == group.version and one.state != "draining"]
    serving = [one for one in current if one.state == "serving"]
    wanted, sample = sizes.count(group), sizes.samples.get(group.name)
    return {
        "group": group.name,
        "role": group.role,
        "model": group.model,
        "version": group.version,
        "wanted": wanted,
        "min": group.minimum,
        "max": group.maximum,
        "serving": sum(one.state == "serving" for one in own),
        "draining": sum(one.state == "draining" for one in own),
        "queue_s": sample.queue_s if sample else None,
        "usage": sample.usage if sample else None,
        "converged": len(serving) == wanted and len(own) == wanted and all(map(_is_ready, serving)),
    }


def _is_ready(replica: Replica) -> bool:
    sight = replica.report.sight if replica.report else None
    return sight is None or sight.ready


def _worker(one: Replica, now: float) -> dict[str, Any]:
    report = one.report
    shown: dict[str, Any] = {
        "worker": one.worker_id,
        "group": one.group,
        "role": one.role,
        "model": one.model,
        "version": one.version,
        "state": one.state,
        "state_s": round(now - one.since_s, 1),
        "restarts": one.restarts,
        "waits_for": one.waits_for,
        "error": one.error or None,
        "error_type": one.error_type or None,
    }
    if report is None:
        return shown
    shown |= {
        "seen_s": round(now - one.seen_s, 1),
        "address": report.address,
        "http_address": report.http_address or None,
        "node": report.node,
        "pid": report.pid,
        "package": report.package,
        "running": report.load.running,
        "waiting": report.load.waiting,
        "pending_tokens": report.load.pending_tokens,
        "cache_usage": round(report.load.usage, 4),
    }
    if report.sight is not None:
        shown["ready"] = report.sight.ready
    return shown
