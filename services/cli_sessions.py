"""`kvsluice sessions`: the conversations that a running service keeps."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .cli_options import Service, connecting

sessions = typer.Typer(no_args_is_help=True, help="List and delete the conversations that a running service keeps.")

_Tenant = Annotated[
    str, typer.Option(help="whose; default: the key's own, others' need a key with the role admin", show_default=False)
]


@sessions.command("list")
@connecting()
def list_sessions(
    service: Service,
    tenant: _Tenant = "",
    json: Annotated[bool, typer.Option("--json", help="one JSON object a line")] = False,
) -> None:
    """Show them, those used last first."""
    from .terminal import print_sessions

    print_sessions(service, json, tenant)


@sessions.command()
@connecting()
def delete(
    service: Service,
    session_ids: Annotated[list[str], typer.Argument(help="ids of sessions", metavar="ID...")],
    tenant: _Tenant = "",
) -> None:
    """Delete conversations, with all that is stored of them."""
    from .terminal import delete_sessions

    sys.exit(delete_sessions(service, session_ids, tenant))


def register(app: typer.Typer) -> None:
    """Add `sessions` to the command."""
    app.add_typer(sessions, name="sessions")
