"""What `kvsluice up`, `down`, `drain` and `status` do."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, WorkerLost
from .fleet.wanted import read_cluster, wanted_fleet
from .status_table import status_table

if TYPE_CHECKING:
    from .actors import Actor

EXIT_OK, EXIT_FAILED = 0, 1
POLL_S = 0.5
WATCH_S = 1.0
ANSWER_S = 30.0
PLAIN_WIDTH = 160
FINAL = ("ConfigError", "UnsupportedModel", "BrokenCheckpoint")  # trying again does not help


def bring_up(address: str, path: Path, timeout_s: float | None) -> int:
    """Have the fleet be what the file says. Returns the exit status.

    Args:
        timeout_s: how long to wait for that; None = not at all.

    Raises:
        KvsluiceError: the file is not in order, or the cluster does not let us in.
    """
    from .serve import WORKER_ENVIRONMENT

    cluster = read_cluster(path)
    fleet = wanted_fleet(cluster)
    cluster = cluster.model_copy(update={"env": WORKER_ENVIRONMENT | cluster.env})
    log_level = str(json.loads(fleet.groups[0].config_json)["log_level"])
    with _connected(address, fleet.name):
        from .cluster import get_controller

        controller = get_controller(fleet.name, lasting=True, log_level=log_level)
        _ask(controller, "apply", cluster.model_dump_json())
        if timeout_s is None:
            _say(f"the fleet {fleet.name} is told; `kvsluice status` shows how it goes on")
            return EXIT_OK
        return _follow_up(controller, timeout_s)


def take_down(address: str, name: str, grace_s: float) -> int:
    """End the fleet. Returns the exit status."""
    with _connected(address, name):
        from .cluster import end_controller

        controller = _controller(name)
        _say(f"running requests may take {grace_s:g} s more")
        try:
            _ask(controller, "shutdown", grace_s, timeout_s=grace_s + 2 * ANSWER_S)
        except WorkerLost:
            end_controller(name)  # it does not answer, or is gone; `up` has another one take over what there is
            raise
        end_controller(name)
        _say(f"the fleet {name} is gone")
        return EXIT_OK


@dataclass(frozen=True)
class Drained:
    """What is to be taken away: workers, groups, all on a node, everything."""

    workers: tuple[str, ...]
    groups: tuple[str, ...]
    node: str | None
    everything: bool


def drain_workers(address: str, name: str, chosen: Drained, grace_s: float | None, timeout_s: float | None) -> int:
    """Drain them. Returns the exit status."""
    if not (chosen.workers or chosen.groups or chosen.node or chosen.everything):
        raise ConfigError("drain: nothing is named; allowed: WORKER..., --group, --node or --all")
    with _connected(address, name):
        controller = _controller(name)
        state = _ask(controller, "status")
        workers = set(chosen.workers)
        if chosen.node is not None:
            workers |= {one["worker"] for one in state["workers"] if one.get("node") == chosen.node}
        groups = {*chosen.groups, *((one["group"] for one in state["groups"]) if chosen.everything else ())}
        gone = set(_ask(controller, "drain", sorted(workers), sorted(groups), grace_s))
        _say(f"draining: {', '.join(sorted(gone)) or 'nobody is there'}")
        if timeout_s is None:
            return EXIT_OK
        tell, left = _Teller(), gone
        for state in _states(controller, timeout_s):
            left = {one["worker"] for one in state["workers"]} & gone
            tell.ended(gone - left)
            if not left:
                return EXIT_OK
        _say(f"not ended within {timeout_s:g} s: {', '.join(sorted(left))}")
        return EXIT_FAILED


def show_status(address: str, name: str, watch: bool, as_json: bool) -> int:
    """Print the fleet's state, again and again with `watch`. Returns the exit status."""
    with _connected(address, name):
        controller = _controller(name)
        if not watch:
            state = _ask(controller, "status")
            _print_state(state, as_json)
            return EXIT_OK
        with suppress(KeyboardInterrupt):
            _watch(lambda: _ask(controller, "status"), as_json)
        return EXIT_OK


def _watch(look: Callable[[], Mapping[str, Any]], as_json: bool) -> None:
    from rich.live import Live

    if as_json:
        while True:
            print(json.dumps(look()), flush=True)
            time.sleep(WATCH_S)
    with Live(status_table(look()), auto_refresh=False) as live:
        while True:
            time.sleep(WATCH_S)
            live.update(status_table(look()), refresh=True)


def _print_state(state: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(state, indent=2))
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=PLAIN_WIDTH)  # a file has no edge
    console.print(status_table(state))


@contextmanager
def _connected(address: str, name: str) -> Iterator[None]:
    """On the cluster for the length of the block."""
    # whoever runs a cluster without tokens says so in the environment
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from .cluster import connect, disconnect

    connect(address, name)
    try:
        yield
    finally:
        disconnect()


def _controller(name: str) -> Actor:
    from .actors import CONTROLLER
    from .cluster import find_actor

    controller = find_actor(CONTROLLER, name)
    if controller is None:
        raise ConfigError(f"name: there is no fleet {name} on this cluster; `kvsluice up` starts one")
    return controller


def _ask(controller: Actor, method: str, *args: Any, timeout_s: float = ANSWER_S) -> Any:
    from .cluster import ask

    try:
        return ask(controller, method, *args).result(timeout_s)
    except TimeoutError as exc:
        raise WorkerLost("the controller does not answer; is there a node with room for it?") from exc
    except WorkerLost as exc:
        raise WorkerLost(f"the controller: {exc.message}") from exc


def _states(controller: Actor, timeout_s: float) -> Iterator[Mapping[str, Any]]:
    """The fleet's state, again and again, until the time is over. Bears that the controller is restarted meanwhile."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        try:
            yield _ask(controller, "status")
        except WorkerLost as exc:
            _say(f"{exc.message}; asked again")
        time.sleep(POLL_S)


def _follow_up(controller: Actor, timeout_s: float) -> int:
    """Wait until the fleet is as wanted, and say what happens on the way."""
    tell = _Teller()
    state: Mapping[str, Any] = {"groups": []}
    for state in _states(controller, timeout_s):
        tell.changes(state)
        wanted = {(group["group"], group["version"]) for group in state["groups"]}
        for worker in state["workers"]:
            if worker["error_type"] in FINAL and (worker["group"], worker["version"]) in wanted:
                _say("the fleet is not as wanted; `kvsluice up` with another file, or `kvsluice down`, mends it")
                return EXIT_FAILED
        if state["converged"]:
            addresses = [one["address"] for one in state["workers"] if one["role"] == "gateway"]
            print(f"kvsluice: the fleet {state['fleet']} serves on {', '.join(addresses)}", flush=True)
            return EXIT_OK
    missing = [one["group"] for one in state["groups"] if not one["converged"]]
    _say(f"not as wanted within {timeout_s:g} s: {', '.join(missing)}; it goes on, `kvsluice status` shows how")
    return EXIT_FAILED


class _Teller:
    """Prints what changes between two looks."""

    def __init__(self) -> None:
        self._last: dict[str, str] = {}

    def changes(self, state: Mapping[str, Any]) -> None:
        now = {worker["worker"]: _describe(worker) for worker in state["workers"]}
        for worker, text in now.items():
            if self._last.get(worker) != text:
                _say(f"{worker} {text}")
        self.ended(self._last.keys() - now.keys())
        self._last |= now

    def ended(self, workers: set[str]) -> None:
        for worker in sorted(workers):
            if self._last.get(worker) != "has ended":
                self._last[worker] = "has ended"
                _say(f"{worker} has ended")


def _describe(worker: Mapping[str, Any]) -> str:
    if worker["error"]:
        return f"cannot start: {worker['error']}"
    if worker["waits_for"]:
        return f"waits: {worker['waits_for']}"
    if worker["state"] == "serving":
        return f"serves on {worker['address']}"
    return {"starting": "starts", "draining": "is drained", "lost": "is lost and starts again"}.get(
        worker["state"], str(worker["state"])
    )


def _say(line: str) -> None:
    print(f"kvsluice: {line}", file=sys.stderr, flush=True)
