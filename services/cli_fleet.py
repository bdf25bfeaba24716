"""`kvsluice up`, `down`, `drain` and `status`: a fleet on a Ray cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

_Address = Annotated[
    str,
    typer.Option(
        help="the Ray cluster: auto or HOST:PORT on one of its nodes, ray://HOST:PORT from elsewhere",
        metavar="ADDRESS",
        envvar="RAY_ADDRESS",
    ),
]
_Name = Annotated[str, typer.Option(help="the fleet, as `name` in its file", metavar="NAME")]
_Grace = Annotated[
    float | None,
    typer.Option(help="how long what runs may go on; default: the fleet's drain_s", metavar="SECONDS", min=0.0),
]
_Timeout = Annotated[float, typer.Option(help="how long to wait", metavar="SECONDS", min=1.0)]
_NoWait = Annotated[bool, typer.Option("--no-wait", help="do not wait until it is done")]


def up(
    config: Annotated[Path, typer.Option(help="YAML file of the fleet, as docs/cluster.md says", metavar="FILE")],
    address: _Address = "auto",
    no_wait: _NoWait = False,
    timeout_s: _Timeout = 900.0,
) -> None:
    """Bring a fleet up on a Ray cluster, or to what its file says now, while requests go on."""
    from .fleet_commands import bring_up

    sys.exit(bring_up(address, config, None if no_wait else timeout_s))


def down(
    address: _Address = "auto",
    name: _Name = "kvsluice",
    grace_s: Annotated[float, typer.Option(help="how long running requests may take", metavar="SECONDS", min=0)] = 30.0,
) -> None:
    """Let running requests finish, and end a fleet with all its processes.

    Of fleets that `kvsluice up` has started; Ctrl-C or SIGTERM ends a service that `serve` runs.
    """
    from .fleet_commands import take_down

    sys.exit(take_down(address, name, grace_s))


def drain(
    workers: Annotated[
        list[str] | None,
        typer.Argument(
            help="workers or gateways, as `kvsluice status` names them; others take their place", metavar="WORKER..."
        ),
    ] = None,
    group: Annotated[
        list[str] | None, typer.Option(help="all of a group, which stays empty until the next `up`", metavar="GROUP")
    ] = None,
    node: Annotated[str | None, typer.Option(help="all on the node of this address", metavar="ADDRESS")] = None,
    all_groups: Annotated[bool, typer.Option("--all", help="all groups, which stay empty until the next `up`")] = False,
    address: _Address = "auto",
    name: _Name = "kvsluice",
    grace_s: _Grace = None,
    no_wait: _NoWait = False,
    timeout_s: _Timeout = 900.0,
) -> None:
    """Take workers away: they get no new requests, what runs finishes or moves on to others, then they end."""
    from .fleet_commands import Drained, drain_workers

    chosen = Drained(tuple(workers or ()), tuple(group or ()), node, all_groups)
    sys.exit(drain_workers(address, name, chosen, grace_s, None if no_wait else timeout_s))


def status(
    address: _Address = "auto",
    name: _Name = "kvsluice",
    watch: Annotated[bool, typer.Option("--watch", help="go on showing it until Ctrl-C")] = False,
    json: Annotated[bool, typer.Option("--json", help="all that is known, as one JSON object")] = False,
) -> None:
    """Show a fleet's groups and processes: state, load, cache, queue, versions.

    Of fleets that `kvsluice up` has started; `kvsluice models` and /metrics tell of a service that `serve` runs.
    """
    from .fleet_commands import show_status

    sys.exit(show_status(address, name, watch, json))


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (up, down, drain, status):
        app.command()(command)
