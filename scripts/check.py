"""What `make check` runs: lint, formatting, types, import rules, generated files. Changes no file of the tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SITE = (
    ROOT / ".cache" / "check"
)  # git ignores it; the type checker's cache keeps its worth when the place stays the same


def run(*command: str | Path, cwd: Path = ROOT) -> tuple[bool, str]:
    """Run a command; returns whether it succeeded and all that it printed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    return done.returncode == 0, done.stdout


def source_files() -> list[str]:
    """Files of the working tree that git tracks or would track, relative to the root."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    return sorted(name for name in listing.split("\0") if name and (ROOT / name).is_file())


def plain_install() -> tuple[bool, str]:
    """Install the package from a copy of the tree into SITE, as a user gets it.

    Type checkers do not follow editable installs, and building inside the tree would leave a build folder whose
    stale files the next wheel picks up.
    """
    with tempfile.TemporaryDirectory() as scratch:
        for name in source_files():
            target = Path(scratch) / "src" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
        site = Path(scratch) / "site"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-compile"]
        done = run(
            *pip, "--disable-pip-version-check", "--root-user-action=ignore", "--target", site, Path(scratch) / "src"
        )
        if done[0]:
            shutil.rmtree(SITE / "kvsluice", ignore_errors=True)
            SITE.mkdir(parents=True, exist_ok=True)
            shutil.move(site / "kvsluice", SITE / "kvsluice")
        return done


def types() -> tuple[bool, str]:
    """mypy over a plain install and over the scripts; messages name the files of the tree."""
    ok, output = plain_install()
    if not ok:
        return ok, output
    common: list[str | Path] = [
        "--config-file",
        ROOT / "pyproject.toml",
        "--cache-dir",
        ROOT / ".mypy_cache",
        "--no-error-summary",
    ]
    package_ok, package = run(BIN / "mypy", *common, "-p", "kvsluice", cwd=SITE)
    scripts_ok, scripts = run(
        BIN / "mypy", *common, "--follow-imports=skip", *sorted((ROOT / "scripts").glob("*.py")), cwd=SITE
    )
    output = package.replace(f"kvsluice{os.sep}", "") + scripts.replace(f"..{os.sep}..{os.sep}", "")
    return package_ok and scripts_ok, output


STEPS: dict[str, Callable[[], tuple[bool, str]]] = {
    "lint": lambda: run(BIN / "ruff", "check", "--quiet", "."),
    "formatting": lambda: run(BIN / "ruff", "format", "--check", "--quiet", "."),
    "types": types,
    "import rules": lambda: run(
        BIN / "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "tests/packaging/test_import_rules.py"
    ),
    "generated code": lambda: run(sys.executable, ROOT / "scripts" / "generate_protos.py", "--check"),
    "API reference": lambda: run(sys.executable, "-P", ROOT / "scripts" / "api_reference.py", "--check"),
    "README's numbers": lambda: run(sys.executable, ROOT / "scripts" / "readme_tables.py", "--check"),
    "recipes' numbers": lambda: run(sys.executable, ROOT / "scripts" / "recipe_report.py", "--check"),
    "speeds": lambda: run(sys.executable, ROOT / "scripts" / "performance_report.py", "--check"),
    "loads": lambda: run(sys.executable, ROOT / "scripts" / "loadtest_report.py", "--check"),
    "gateway's costs": lambda: run(sys.executable, ROOT / "scripts" / "gateway_report.py", "--check"),
}


def main() -> int:
    failed = []
    for name, step in STEPS.items():
        began = time.monotonic()
        ok, output = step()
        print(f"check: {name:<17} {'ok' if ok else 'FAILED'}  ({time.monotonic() - began:.0f} s)", flush=True)
        if not ok:
            failed.append(name)
            print(output, flush=True)
    print(f"check: failed: {', '.join(failed)}" if failed else "check: ok")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
