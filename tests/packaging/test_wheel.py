"""The wheel holds the package, all of it and nothing else."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

SHIPPED_DATA = (".proto", ".pyi", ".json", ".safetensors", "py.typed")
NOT_SHIPPED = ("tests/", "scripts/", "docs/", "helm/", "benchmarks/results/", ".ci/", ".github/")


@pytest.fixture(scope="session")
def wheel(files, root, tmp_path_factory) -> list[str]:
    """File list of a wheel built from a copy of the tree."""
    scratch = tmp_path_factory.mktemp("wheel")
    for name in files:
        target = scratch / "src" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, target)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        "dist",
        "./src",
    ]
    subprocess.run(command, cwd=scratch, check=True, capture_output=True)
    (built,) = (scratch / "dist").glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        return archive.namelist()


def belongs(name: str) -> bool:
    if name.startswith(NOT_SHIPPED):
        return False
    return name.endswith(".py") or ("/" in name and name.endswith(SHIPPED_DATA)) or name == "py.typed"


def test_the_wheel_is_the_tree(wheel, files):
    shipped = {name.removeprefix("kvsluice/") for name in wheel if name.startswith("kvsluice/")}
    wanted = {name for name in files if belongs(name)}
    assert shipped - wanted == set(), "the wheel holds files that do not belong to the package"
    assert wanted - shipped == set(), "the package has files that the wheel lacks"


def test_the_wheel_has_one_top_level_name(wheel):
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {"kvsluice"}


def test_nothing_of_the_fault_rig_is_in_the_wheel(wheel, sources):
    """Points at which processes are killed are put in from outside; the product has no place for them."""
    assert [name for name in wheel if "sitecustomize" in name or "failpoint" in name or "/rig/" in name] == []
    assert [s.path for s in sources if re.search("failpoint|sitecustomize", ast.unparse(s.tree), re.I)] == []


def test_every_folder_with_code_is_listed(files, root):
    project = tomllib.loads((root / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    folders = {Path(name).parent for name in files if name.endswith(".py") and belongs(name)}
    assert listed == {".".join(("kvsluice", *folder.parts)) for folder in folders}
