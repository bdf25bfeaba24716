"""Options that are listed once, for a command line with and one without its library, as the library takes them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Annotated, Any, Protocol

import typer


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
