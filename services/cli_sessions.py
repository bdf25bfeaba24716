"""`kvsluice sessions`: the conversations that a running service keeps."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

sessions = typer.Typer(no_args_is_help=True, help="List and delete the conversations that a running service keeps.")

_Address = Annotated[str, typer.Option(help="host:port of the service")]


@sessions.command("list")
def list_sessions(
    address: _Address = "127.0.0.1:8033",
    json: Annotated[bool, typer.Option("--json", help="one JSON object a line")] = False,
) -> None:
    """Show them, those used last first."""
    from .terminal import print_sessions

    print_sessions(address, json)


@sessions.command()
def delete(
    session_ids: Annotated[list[str], typer.Argument(help="ids of sessions", metavar="ID...")],
    address: _Address = "127.0.0.1:8033",
) -> None:
    """Delete conversations, with all that is stored of them."""
    from .terminal import delete_sessions

    sys.exit(delete_sessions(address, session_ids))


def register(app: typer.Typer) -> None:
    """Add `sessions` to the command."""
    app.add_typer(sessions, name="sessions")
