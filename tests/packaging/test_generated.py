"""The generated protobuf code is that of the .proto files, and the dependencies it names are the declared ones."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib

import pytest

GENERATOR = "scripts/generate_protos.py"


def test_generated_code_is_fresh(root):
    done = subprocess.run([sys.executable, GENERATOR, "--check"], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_api_reference_is_fresh(root):
    script = [sys.executable, "-P", "scripts/api_reference.py", "--check"]
    done = subprocess.run(script, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture
def copy(tmp_path, root):
    """A copy of the .proto files, the generated code and the generator."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / GENERATOR).write_bytes((root / GENERATOR).read_bytes())
    (tmp_path / "protos").mkdir()
    for path in (root / "protos").iterdir():
        if path.is_file():
            (tmp_path / "protos" / path.name).write_bytes(path.read_bytes())
    return tmp_path


def generate(copy, *arguments):
    command = [sys.executable, str(copy / GENERATOR), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_check_names_what_is_stale_and_changes_nothing(copy):
    proto, stale = copy / "protos" / "frame.proto", copy / "protos" / "frame_pb2.py"
    before = stale.read_bytes()
    proto.write_text(proto.read_text() + "\nmessage Later { uint32 number = 1; }\n")
    (copy / "protos" / "gone_pb2.py").write_text("")
    done = generate(copy, "--check")
    assert done.returncode == 1
    named = {line.split()[0] for line in done.stdout.splitlines()}
    assert named == {"protos/frame_pb2.py", "protos/frame_pb2.pyi", "protos/gone_pb2.py"}
    assert stale.read_bytes() == before
    assert (copy / "protos" / "gone_pb2.py").exists()
    assert generate(copy).returncode == 0
    assert generate(copy, "--check").returncode == 0
    assert not (copy / "protos" / "gone_pb2.py").exists()


def test_a_broken_proto_is_reported(copy):
    (copy / "protos" / "frame.proto").write_text("message {")
    done = generate(copy, "--check")
    assert done.returncode == 1
    assert "frame.proto" in done.stderr


def declared_minimum(root, name: str) -> tuple[int, ...]:
    """The version in `name>=version` among the project's dependencies."""
    lines = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    (found,) = [match for line in lines if (match := re.fullmatch(rf"{name}>=([0-9.]+)", line))]
    return tuple(int(part) for part in found[1].split("."))


def test_declared_versions_can_run_the_generated_code(root):
    """Generated code refuses to be imported by a runtime that is older than its generator."""
    header = (root / "protos" / "frame_pb2.py").read_text()
    (version,) = re.findall(r"^# Protobuf Python Version: ([0-9.]+)$", header, re.MULTILINE)
    assert declared_minimum(root, "protobuf") >= tuple(int(part) for part in version.split("."))
    grpc_version = importlib.import_module("kvsluice.protos.worker_pb2_grpc").GRPC_GENERATED_VERSION
    assert declared_minimum(root, "grpcio") >= tuple(int(part) for part in grpc_version.split("."))
