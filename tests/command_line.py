"""Whether a `kvsluice …` that stands somewhere, in a page or in a pod, is one that the command line takes; its help."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer
from typer.testing import CliRunner

from kvsluice.services import cli

USAGE_ERROR: Any = typer.BadParameter.__base__  # the library has its own copy of click's, without a public name


def refusal(words: Sequence[str]) -> str | None:
    """Why the command line would not take `kvsluice WORDS…`; None where it would. Runs nothing."""
    command: Any = typer.main.get_command(cli.app)
    rest = list(words)
    path = "kvsluice"
    while hasattr(command, "commands"):
        if rest and rest[0] in ("--version", "--help"):
            return None
        if not rest or rest[0] not in command.commands:
            if command.invoke_without_command:
                break
            return f"{path} has no command {rest[:1]}; there are {', '.join(command.commands)}"
        path = f"{path} {rest[0]}"
        command = command.commands[rest.pop(0)]
    if "--help" in rest:
        return None
    try:
        command.make_context(path, rest)
    except USAGE_ERROR as exc:
        return f"{path}: {exc.format_message()}"
    return None


def help_options(*words: str) -> dict[str, str]:
    """What the help of `kvsluice WORDS…` says of each option, in a terminal of 80 columns: values, then text."""
    shown = CliRunner(env={"COLUMNS": "80", "TERM": "dumb"}).invoke(cli.app, [*words, "--help"])
    assert shown.exit_code == 0
    found: dict[str, list[str]] = {}
    said: list[str] = []
    for line in shown.stdout.partition("Options:")[2].splitlines():
        parts = line.split()
        if line.startswith("  -"):
            long = next(i for i, part in enumerate(parts) if part.startswith("--"))
            said = found.setdefault(parts[long], [])
            parts = parts[long + 1 :]
        said += parts
    return {name: " ".join(said) for name, said in found.items()}
