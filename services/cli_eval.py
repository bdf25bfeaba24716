"""`kvsluice eval`: the options of `evals.options` as the command line's library takes them."""

from __future__ import annotations

import inspect
import sys
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    from ..evals.options import OPTIONS, Option

    def evaluate(**given: Any) -> None:
        """Measure what answers are worth under compressed caches: suites of samples, the same for every recipe.

        Scores, bytes and 95 % intervals; docs/evaluation.md says how answers are judged and what the file holds."""
        from ..evals.options import parse_options
        from ..evals.runner import run_command

        sys.exit(run_command(parse_options(given)))

    def parameter(option: Option) -> inspect.Parameter:
        kind: Any = bool if option.flag else list[str] | None if option.several else str | None
        # values are checked in one place, and defaults are filled in there
        shown = typer.Option(
            f"--{option.name}", help=option.full_help, metavar=option.metavar or None, show_default=False
        )
        default = False if option.flag else None
        return inspect.Parameter(
            option.key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, shown]
        )

    evaluate.__signature__ = inspect.Signature([parameter(option) for option in OPTIONS])  # type: ignore[attr-defined]
    app.command("eval")(evaluate)
