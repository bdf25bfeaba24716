"""The package's sources, parsed once."""

from __future__ import annotations

import ast
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = ("tests", "scripts", "docs", "helm", ".ci")


@dataclass(frozen=True)
class Source:
    """One Python file of the package.

    Attributes:
        path: relative to the repository root, with slashes.
        module: dotted name inside the package, without `kvsluice.`; the root package itself is "".
        tree: its syntax tree.
        num_lines: lines in the file.
    """

    path: str
    module: str
    tree: ast.Module
    num_lines: int

    @property
    def is_package(self) -> bool:
        return self.path.endswith("__init__.py")

    @property
    def is_generated(self) -> bool:
        return self.path.endswith(("_pb2.py", "_pb2_grpc.py"))


def tree_files() -> list[str]:
    """Files that git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return sorted(name for name in listing.split("\0") if name and (ROOT / name).is_file())


def read_source(path: str) -> Source:
    text = (ROOT / path).read_text()
    parts = Path(path).with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return Source(path, module, ast.parse(text, path), len(text.splitlines()))


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def files() -> list[str]:
    return tree_files()


@pytest.fixture(scope="session")
def sources(files: list[str]) -> list[Source]:
    """Every Python file that belongs to the package."""
    return [read_source(name) for name in files if name.endswith(".py") and Path(name).parts[0] not in OUTSIDE]


@pytest.fixture(scope="session")
def written_sources(sources: list[Source]) -> list[Source]:
    """The same without the files that protoc wrote."""
    return [source for source in sources if not source.is_generated]
