"""What a file of results says about where it was made."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NAMED_LIBRARIES = ("torch", "transformers", "grpcio", "ray")


def commit() -> str:
    """The commit of the checkout, with `+changes` when files differ from it; "unknown" outside a checkout."""
    try:
        command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+changes", "--exclude=*"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def cpu_name() -> str:
    """The processor's name as the kernel reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Hardware, versions of the libraries that are installed, and commit."""
    found = {name: _version(name) for name in NAMED_LIBRARIES}
    return {
        "commit": commit(),
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "libraries": {name: number for name, number in found.items() if number is not None},
    }


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write results with the environment that made them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), **results}, indent=1, ensure_ascii=False) + "\n")
