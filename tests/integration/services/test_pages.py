"""Commands of the pages, typed as they stand there: against the session's service where they speak to one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvsluice.tests.pages import RUN, Command, commands

GRPC, HTTP = "127.0.0.1:8033", "http://127.0.0.1:8000"  # where the pages say that it listens
CHEAP = [command for command in commands() if command.needs is None and RUN.match(" ".join(command.words))]


def alone(command: Command) -> bool:
    return command.words[1] in ("--version", "recipes", "plan")


@pytest.mark.parametrize("command", [c for c in CHEAP if alone(c)], ids=str)
def test_a_command_that_needs_nothing(command, tmp_path):
    assert typed(command, tmp_path)


@pytest.mark.parametrize("command", [c for c in CHEAP if not alone(c)], ids=str)
def test_a_command_that_speaks_to_the_service(command, service, tmp_path):
    if command.words[0] == "curl":
        if shutil.which("curl") is None:
            pytest.skip("there is no curl")
        at = service.http_url.removesuffix("/v1")
        said = typed(command, tmp_path, *(word.replace(HTTP, at) for word in command.words))
        assert '"error"' not in said
    else:
        # answers are cut short: how long they are is not what the pages are about
        short = ("--max-tokens", "4") if command.words[1] == "generate" else ()
        assert typed(command, tmp_path, *command.words, "--address", service.address, *short)


def typed(command: Command, folder: Path, *words: str) -> str:
    """Run it; gives what it printed. Texts that the pages speak of are there."""
    for name in ("long.txt", "report.txt"):
        (folder / name).write_text("The meeting was on Monday. It was decided that Anna writes the report.\n")
    first, *rest = words or command.words
    program = [sys.executable, "-P", "-m", "kvsluice.services.cli"] if first == "kvsluice" else [first, "--fail", "-s"]
    done = subprocess.run(
        [*program, *rest], cwd=folder, env=os.environ, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
