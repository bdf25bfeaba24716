"""Options that several commands have, and options that are listed once, for a command line with and one without its
library, as the library takes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

if TYPE_CHECKING:
    from .connection import Connecting


class Listed(Protocol):
    """One option, such as `evals.options.Option`."""

    @property
    def name(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def full_help(self) -> str: ...
    @property
    def metavar(self) -> str: ...
    @property
    def several(self) -> bool: ...
    @property
    def flag(self) -> bool: ...


def signature(options: Iterable[Listed]) -> inspect.Signature:
    """Of a command that takes the options by key: text, lists of text, or bool; None = not given."""
    return inspect.Signature([_parameter(option) for option in options])


def _parameter(option: Listed) -> inspect.Parameter:
    kind: Any = bool if option.flag else list[str] | None if option.several else str | None
    # values are checked in one place, and defaults are filled in there
    shown = typer.Option(f"--{option.name}", help=option.full_help, metavar=option.metavar or None, show_default=False)
    default = False if option.flag else None
    return inspect.Parameter(
        option.key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, shown]
    )


_NOTHING: Connecting = {}
DEFAULT_ADDRESS = "127.0.0.1:8033"  # `connection` has it, too, which costs too much to import for `--help`


@dataclass(frozen=True)
class Service:
    """The service that a command calls.

    Attributes:
        connecting: key and TLS, as clients take them.
    """

    address: str
    connecting: Connecting = field(default_factory=lambda: _NOTHING, repr=False)


_CONNECTION: dict[str, Any] = {
    "api_key_file": Annotated[
        Path | None,
        typer.Option(help="file with the key to show; default: $KVSLUICE_API_KEY", metavar="FILE", show_default=False),
    ],
    "tls": Annotated[bool | None, typer.Option("--tls/--no-tls", help="encrypt; default: where --tls-ca is given")],
    "tls_ca": Annotated[
        str | None, typer.Option(help="PEM of the authorities to trust; default: the system's", metavar="FILE")
    ],
    "tls_cert": Annotated[
        str | None, typer.Option(help="PEM of the certificate to show; default: none", metavar="FILE")
    ],
    "tls_key": Annotated[str | None, typer.Option(help="PEM of its key; default: none", metavar="FILE")],
}


def connecting(optional: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options that say which service it calls, and how; it gets them as `service`.

    Args:
        optional: the command does without, and gets None, where no address is given.
    """
    help_text = "host:port of a running service; else one is started" if optional else "host:port of the service"
    kind: Any = str | None if optional else str
    address = Annotated[kind, typer.Option(help=help_text)]

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def connected(*args: Any, **kwargs: Any) -> None:
            from .connection import read_key

            given = {name: kwargs.pop(name, None) for name in _CONNECTION}
            where, file = kwargs.pop("address"), given.pop("api_key_file")
            options: Any = given | {"api_key": None if file is None else read_key(file)}
            command(*args, service=None if where is None else Service(where, options), **kwargs)

        named = {"address": (None if optional else DEFAULT_ADDRESS, address)}
        named |= {name: (None, annotation) for name, annotation in _CONNECTION.items()}
        parameters = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "service"]
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (default, annotation) in named.items()
        ]
        connected.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return connected

    return wrap
