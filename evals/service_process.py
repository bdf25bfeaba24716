"""Starts `kvsluice serve` as a process of its own, waits until it is ready and stops it again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0
READINESS = "kvsluice.v1.Generation"


class ServiceFailed(RuntimeError):
    """`kvsluice serve` ended or never became ready; the message holds the end of its log."""


@dataclass(frozen=True)
class ServiceProcess:
    """A running service.

    Attributes:
        address: host:port of the gRPC generate API.
        process: the process to signal; its children are the workers.
        log: file with all that it printed.
    """

    address: str
    process: subprocess.Popen[bytes]
    log: Path

    def log_tail(self, num_chars: int = 4000) -> str:
        return self.log.read_text(errors="replace")[-num_chars:]


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_ready(address: str, timeout_s: float = 2.0) -> bool:
    """Whether the service at `address` says that it takes requests."""
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=READINESS)
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
        except grpc.RpcError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def _await_ready(service: ServiceProcess, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_ready(service.address):
        if service.process.poll() is not None:
            raise ServiceFailed(f"the service ended with status {service.process.returncode}:\n{service.log_tail()}")
        if time.monotonic() > deadline:
            raise ServiceFailed(f"the service was not ready after {timeout_s:.0f} s:\n{service.log_tail()}")
        time.sleep(0.2)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            # its own process group, so nothing that it started is left behind
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def running_service(*arguments: str, start_timeout_s: float = START_TIMEOUT_S) -> Iterator[ServiceProcess]:
    """Run `kvsluice serve ARGUMENTS` on a free port of this machine for the length of the `with` block.

    Raises:
        ServiceFailed: it ended, or was not ready in time.
    """
    address = f"127.0.0.1:{free_port()}"
    host, port = address.split(":")
    with tempfile.TemporaryDirectory(prefix="kvsluice-") as folder:
        log = Path(folder) / "serve.log"
        command: Sequence[str] = (sys.executable, "-P", "-m", "kvsluice.services.cli", "serve")
        with log.open("wb") as sink:
            process = subprocess.Popen(  # noqa: S603 - the project's own command
                [*command, "--host", host, "--port", port, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        service = ServiceProcess(address, process, log)
        try:
            _await_ready(service, start_timeout_s)
            yield service
        finally:
            _stop(process)
