"""The commands that README.md, CONTRIBUTING.md and docs/ tell people to type.

They stand in blocks of `sh` or `bash`. A block that cannot run in the tests says why on a line of its own before it:

    <!-- needs: gpu -->        a GPU
    <!-- needs: cluster -->    Kubernetes, or a Ray cluster
    <!-- needs: docker -->     a builder of images
    <!-- needs: packages -->   a registry of packages or models
    <!-- needs: servers -->    servers that the tests do not start
    <!-- needs: minutes -->    more time than the suite has; `make acceptance` does the same
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDS = ("gpu", "cluster", "docker", "packages", "servers", "minutes")
# What tests/integration/services/test_pages.py runs as it stands there, against the session's service where it is to
RUN = re.compile(
    r"kvsluice (--version|recipes|models|plan .*)$|kvsluice generate (?!.*--(durability|session|api-key-file))|curl "
)
_BLOCK = re.compile(r"(?:<!-- needs: (?P<needs>[^>]*?) -->\n+)?^```(?:sh|bash)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Command:
    """One command line.

    Attributes:
        page: where it stands.
        text: as it is typed, with continued lines joined.
        needs: what the tests lack for it; None = nothing.
    """

    page: str
    text: str
    needs: str | None

    @property
    def words(self) -> list[str]:
        """Without comments, the environment's folder and a closing `&`."""
        words = shlex.split(self.text, comments=True)
        words = words[:-1] if words[-1:] == ["&"] else words
        return [words[0].removeprefix(".venv/bin/"), *words[1:]]

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands() -> list[Command]:
    """Every command of every page, in order."""
    found = []
    for path in pages():
        name = path.relative_to(ROOT).as_posix()
        for block in _BLOCK.finditer(path.read_text(encoding="utf-8")):
            lines = block["text"].replace("\\\n", " ").splitlines()
            found += [Command(name, line.strip(), block["needs"]) for line in lines if shlex.split(line, comments=True)]
    return found
