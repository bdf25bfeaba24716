"""`kvsluice bench`: the parts and options of `benchmarks.options` as the command line's library takes them."""

from __future__ import annotations

import sys
from typing import Any

import typer

from .cli_options import signature


def register(app: typer.Typer) -> None:
    """Add the command and a sub-command for each part."""
    from ..benchmarks.options import PARTS

    bench = typer.Typer(
        no_args_is_help=True,
        help="Measure speed and memory beside what the device allows; docs/benchmarks.md says how.",
    )
    for name in PARTS:
        _add(bench, name)
    app.add_typer(bench, name="bench")


def _add(bench: typer.Typer, name: str) -> None:
    from ..benchmarks.options import PARTS

    def measure(**given: Any) -> None:
        from ..benchmarks.options import parse_options
        from ..benchmarks.runner import run_command

        sys.exit(run_command(parse_options(name, given)))

    measure.__signature__ = signature(PARTS[name].options)  # type: ignore[attr-defined]
    bench.command(name, help=PARTS[name].summary)(measure)
