"""The set-up script on environments that are not what they seem."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PYTHON = """#!/bin/sh
echo "$@" >> "$LOG"
if [ "$1 $2" = "-m venv" ]; then
  mkdir "$3" || exit 1
  sleep 0.2
  mkdir "$3/bin" && cp "$0" "$3/bin/python"
fi
"""


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/setup.sh", tmp_path / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    for name, text in (("python", PYTHON), ("redis-server", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def run(checkout: Path) -> int:
    env = {"PATH": f"{checkout}:/usr/bin:/bin", "PYTHON": f"{checkout}/python", "LOG": f"{checkout}/log"}
    return subprocess.run(["sh", "scripts/setup.sh"], cwd=checkout, env=env, timeout=30).returncode


def num_made(checkout: Path) -> int:
    return (checkout / "log").read_text().count("-m venv")


def test_an_environment_whose_interpreter_is_gone_is_made_anew(checkout):
    assert run(checkout) == 0
    assert run(checkout) == 0
    assert num_made(checkout) == 1
    (checkout / ".venv/bin/python").unlink()
    (checkout / ".venv/bin/python").symlink_to("/nowhere/python")
    assert run(checkout) == 0
    assert num_made(checkout) == 2


def test_two_runs_at_once_make_one_environment(checkout):
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, [checkout] * 2)) == [0, 0]
    assert num_made(checkout) == 1
