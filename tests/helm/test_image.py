"""What the Dockerfile does, as far as its text shows: an image is built nowhere in the tests."""

from __future__ import annotations

import fnmatch
import json
import re
import tomllib

import pytest

from kvsluice import __version__

from .conftest import ROOT, chart

STAGES = re.compile(r"^FROM ", re.MULTILINE)


@pytest.fixture(scope="module")
def instructions() -> list[list[tuple[str, str]]]:
    """Name and rest of every instruction, stage by stage."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    stages: list[list[tuple[str, str]]] = [[]]
    for name, rest in lines:
        if name == "FROM":
            stages.append([])
        stages[-1].append((name, rest))
    return stages[1:]


def test_the_wheel_and_the_pins_are_all_that_is_copied(instructions):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    copied = [rest.split() for stage in instructions for name, rest in stage if name in ("COPY", "ADD")]
    wheel = f"dist/{project['name']}-{project['version']}-py3-none-any.whl"
    assert copied == [["constraints.txt", wheel, "/wheels/"], ["--from=build", "/install", "/usr/local"]]
    assert (ROOT / "constraints.txt").is_file() and project["version"] == __version__


def test_nothing_else_reaches_the_builder():
    """.dockerignore leaves out everything, then lets those in: the last pattern that fits decides."""
    patterns = [x for x in (ROOT / ".dockerignore").read_text().splitlines() if x and not x.startswith("#")]
    assert patterns[0] == "**"

    def enters(path: str) -> bool:
        fits = [x for x in patterns if fnmatch.fnmatch(path, x.removeprefix("!"))]
        return fits[-1].startswith("!")

    assert enters("constraints.txt") and enters(f"dist/kvsluice-{__version__}-py3-none-any.whl")
    for path in ("services/cli.py", ".git/config", ".venv/bin/python", "dist/other-1.whl", "pyproject.toml"):
        assert not enters(path)


def test_the_final_stage_is_small_and_unprivileged(instructions):
    build, final = instructions
    user = chart().values["podSecurityContext"]
    assert [rest for name, rest in final if name == "USER"] == [f"{user['runAsUser']}:{user['runAsGroup']}"]
    ran = " ".join(rest for name, rest in final if name == "RUN")
    compilers = re.findall(r"\bgcc\b|\bg\+\+|build-essential|\bmake\b|\bgit\b|\bpip\b", ran)
    assert compilers == ["gcc"] and ran.index('if [ "$VARIANT" = cuda ]') < ran.index("gcc") < ran.index("fi;")
    assert not any(name in ("ADD", "HEALTHCHECK") for name, _ in build + final)
    assert not re.search("TOKEN|PASSWORD|SECRET", " ".join(rest for _, rest in build + final))


def test_packages_are_the_pinned_ones(instructions):
    """Every installation is under the constraints; torch comes first, from the index of its variant."""
    (run,) = [rest for name, rest in instructions[0] if name == "RUN"]
    installs = [part for part in run.split(";") if "pip install" in part]
    assert len(installs) == 3
    assert all("--constraint /wheels/constraints.txt" in part for part in installs)
    assert installs[0].split()[-1] == "torch" and '"$index"' in installs[0]


def test_it_starts_the_command_and_names_its_doors(instructions):
    final = dict(instructions[1])
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert json.loads(final["ENTRYPOINT"]) == list(scripts)
    service = chart().values["service"]
    assert final["EXPOSE"].split() == [str(service["grpcPort"]), str(service["httpPort"])]
