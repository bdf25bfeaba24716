"""`kvsluice keys`: keys for clients."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from ..errors import InvalidRequest

keys = typer.Typer(no_args_is_help=True, help="Make keys for the clients of a service.")


@keys.command()
def new(
    tenant: Annotated[str, typer.Argument(help="whose key it is", metavar="TENANT")],
    role: Annotated[str, typer.Option(help="client, monitor or admin")] = "client",
) -> None:
    """Make a key, and the line for the file that --api-keys-file names. The key is shown once and stored nowhere."""
    from .keys import TENANT, digest, new_key

    if not re.fullmatch(TENANT, tenant):
        raise InvalidRequest("TENANT", f"got {tenant[:64]!r}", "1 to 64 of A-Z, a-z, 0-9, dot, dash and underscore")
    if role not in ("client", "monitor", "admin"):
        raise InvalidRequest("--role", f"got {role[:64]!r}", "client, monitor, admin")
    key = new_key()
    suffix = "" if role == "client" else f", role: {role}"
    print(f"key for the client: {key}")
    print(f"line below `keys:`: - {{tenant: {tenant}, sha256: {digest(key).hex()}{suffix}}}")


def register(app: typer.Typer) -> None:
    """Add `keys` to the command."""
    app.add_typer(keys, name="keys")
