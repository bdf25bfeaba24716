"""`kvsluice loadtest`: the keys of `loadtest.options` as the command line's library takes them."""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import Service, connecting, signature

_HELP = """Drive a load through a running service and say what its clients see, in the names of `vllm bench serve`.

Exit status: 0 = done and every goal of --slo met, 3 = a goal was missed, 4 = the client itself could not keep up, so
that the figures are worth nothing, 130 = interrupted. docs/loadtest.md says how it measures."""


def register(app: typer.Typer) -> None:
    """Add the command, and what is done with its results."""
    from ..loadtest.options import listed

    group = typer.Typer(help=_HELP)

    def loadtest(ctx: typer.Context, service: Service, **given: Any) -> None:
        if ctx.invoked_subcommand is not None:
            return
        from ..evals.report import environment
        from ..loadtest.options import parse_options
        from ..loadtest.runner import run_command
        from .connection import with_environment

        reached: Any = with_environment(service.connecting, os.environ)
        sys.exit(run_command(parse_options(given | {"address": service.address}), environment(), reached))

    flags = signature(one for one in listed() if one.key != "address").parameters.values()
    own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("ctx", "service")]
    own[0] = own[0].replace(annotation=typer.Context)
    loadtest.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
    group.callback(invoke_without_command=True, help=_HELP)(connecting()(loadtest))
    group.command()(compare)
    group.command()(report)
    app.add_typer(group, name="loadtest")


_File = Annotated[Path, typer.Argument(help="results that --json wrote", metavar="FILE")]


def compare(
    before: _File,
    after: _File,
    seed: Annotated[int, typer.Option(help="of the bootstrap")] = 0,
) -> None:
    """Set two runs beside each other, each difference with its 95 % bootstrap interval."""
    from ..loadtest.compare import compare_files

    print(compare_files(before, after, seed), end="")


def report(results: _File, html: Annotated[Path, typer.Argument(help="the report to write", metavar="HTML")]) -> None:
    """Make the report with plots from results."""
    from ..loadtest.html_report import write_html
    from ..loadtest.results import load

    write_html(html, load(results))
    print(f"written to {html}")
