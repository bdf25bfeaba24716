"""Generate protos/*_pb2.py, *_pb2.pyi and *_pb2_grpc.py from protos/*.proto; --check compares and changes nothing."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
PACKAGE = "kvsluice/protos"  # where the files lie as the generated imports and the .proto imports see it
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")


def generate() -> dict[str, bytes]:
    """File name -> content of everything that protoc makes of protos/*.proto.

    Raises:
        RuntimeError: protoc refused a file; the message is what it printed.
    """
    sources = sorted(PROTOS.glob("*.proto"))
    with_services = [path for path in sources if any(x.startswith("service ") for x in path.read_text().splitlines())]
    with tempfile.TemporaryDirectory() as scratch:
        protoc = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PACKAGE}={PROTOS}"]
        for outputs, paths in (
            ((f"--python_out={scratch}", f"--pyi_out={scratch}"), sources),
            ((f"--grpc_python_out={scratch}",), with_services),
        ):
            names = [f"{PACKAGE}/{path.name}" for path in paths]
            done = subprocess.run([*protoc, *outputs, *names], cwd=scratch, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(done.stderr.strip())
        return {path.name: path.read_bytes() for path in sorted((Path(scratch) / PACKAGE).iterdir())}


def checked_in() -> dict[str, bytes]:
    """File name -> content of the generated files in the tree."""
    return {path.name: path.read_bytes() for pattern in GENERATED for path in PROTOS.glob(pattern)}


def stale_files() -> list[str]:
    """Names of generated files that are missing, out of date, or belong to no .proto file any more."""
    fresh, present = generate(), checked_in()
    return sorted(name for name in fresh.keys() | present.keys() if fresh.get(name) != present.get(name))


def main(arguments: list[str] | None = None) -> int:
    """Write the files, or with --check say which are stale; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the tree and change nothing")
    if parser.parse_args(arguments).check:
        stale = stale_files()
        for name in stale:
            print(f"protos/{name} is stale: run scripts/generate_protos.py")
        return 1 if stale else 0
    fresh = generate()
    for name in checked_in().keys() - fresh.keys():
        (PROTOS / name).unlink()
    for name, content in fresh.items():
        (PROTOS / name).write_bytes(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
