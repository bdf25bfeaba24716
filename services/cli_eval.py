"""`kvsluice eval`: the options of `evals.options` as the command line's library takes them."""

from __future__ import annotations

import sys
from typing import Any

import typer

from .cli_options import signature


def register(app: typer.Typer) -> None:
    """Add the command."""
    from ..evals.options import OPTIONS

    def evaluate(**given: Any) -> None:
        """Measure what answers are worth under compressed caches: suites of samples, the same for every recipe.

        Scores, bytes and 95 % intervals; docs/evaluation.md says how answers are judged and what the file holds."""
        from ..evals.options import parse_options
        from ..evals.runner import run_command

        sys.exit(run_command(parse_options(given)))

    evaluate.__signature__ = signature(OPTIONS)  # type: ignore[attr-defined]
    app.command("eval")(evaluate)
