"""`kvsluice calibrate`: the options of `evals.calibration.options` as the command line's library takes them."""

from __future__ import annotations

import sys
from typing import Any

import typer

from .cli_options import signature


def register(app: typer.Typer) -> None:
    """Add the command."""
    from ..evals.calibration.options import OPTIONS

    def calibrate(**given: Any) -> None:
        """Choose for a model the numbers that a recipe leaves to its profile, under budgets of operations and bytes.

        First by the error of final hidden states, then by a retrieval suite; writes a profile, which serve and eval
        take as --profile. docs/calibration.md says how it chooses, and what holds for models without a profile."""
        from ..evals.calibration.options import parse_calibration
        from ..evals.calibration.runner import run_command

        sys.exit(run_command(parse_calibration(given)))

    calibrate.__signature__ = signature(OPTIONS)  # type: ignore[attr-defined]
    app.command("calibrate")(calibrate)
