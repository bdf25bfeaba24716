"""Starts `kvsluice serve` as a process of its own, waits until it is ready and stops it again."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
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
REDIS_START_S = 10.0
READINESS = "kvsluice.v1.Generation"
_SERVING = re.compile(r"^kvsluice: serving .* on (?P<address>\S+)(?: and (?P<http_url>\S+))? \(", re.MULTILINE)


class ServiceFailed(RuntimeError):
    """`kvsluice serve` ended or never became ready; the message holds the end of its log."""


@dataclass(frozen=True)
class ServiceProcess:
    """A running service.

    Attributes:
        address: host:port of the gRPC generate API.
        http_url: of the OpenAI API, as its clients take it; empty = it is off.
        process: the process to signal; its children are the workers.
        log: file with all that it printed.
    """

    address: str
    http_url: str
    process: subprocess.Popen[bytes]
    log: Path

    def log_tail(self, num_chars: int = 4000) -> str:
        return _tail(self.log, num_chars)


def is_ready(address: str, timeout_s: float = 2.0) -> bool:
    """Whether the service at `address` says that it takes requests."""
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=READINESS)
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
        except grpc.RpcError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def _await(process: subprocess.Popen[bytes], log: Path, timeout_s: float) -> ServiceProcess:
    """The service as soon as it has said where it listens and takes requests there."""
    deadline = time.monotonic() + timeout_s
    while True:
        said = _SERVING.search(log.read_text(errors="replace"))
        if said is not None and is_ready(said["address"]):
            return ServiceProcess(said["address"], said["http_url"] or "", process, log)
        if process.poll() is not None:
            raise ServiceFailed(f"the service ended with status {process.returncode}:\n{_tail(log)}")
        if time.monotonic() > deadline:
            raise ServiceFailed(f"the service was not ready after {timeout_s:.0f} s:\n{_tail(log)}")
        time.sleep(0.2)


def _tail(log: Path, num_chars: int = 4000) -> str:
    return log.read_text(errors="replace")[-num_chars:]


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
def running_redis() -> Iterator[str]:
    """Run a redis-server on a free port of this machine, which persists nothing, for the length of the `with` block.
    Yields host:port.

    Raises:
        ServiceFailed: there is none to run, or it does not start.
    """
    if shutil.which("redis-server") is None:
        raise ServiceFailed("no redis-server on this machine; on Debian: apt-get install redis-server")
    with tempfile.TemporaryDirectory(prefix="kvsluice-redis-") as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = Path(folder) / "redis.log"
        command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--logfile", str(log)]
        process = subprocess.Popen(  # noqa: S603 - the command above
            [*command, "--save", "", "--appendonly", "no"], stdout=subprocess.DEVNULL
        )
        try:
            deadline = time.monotonic() + REDIS_START_S
            while not _listens(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise ServiceFailed(f"redis-server does not start:\n{_tail(log) if log.exists() else ''}")
                time.sleep(0.05)
            yield f"127.0.0.1:{port}"
        finally:
            _stop(process)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def running_service(*arguments: str, start_timeout_s: float = START_TIMEOUT_S) -> Iterator[ServiceProcess]:
    """Run `kvsluice serve ARGUMENTS` on free ports of this machine for the length of the `with` block.

    The service chooses its ports itself: one that is only looked up here could be taken until it listens.

    Raises:
        ServiceFailed: it ended, or was not ready in time.
    """
    with tempfile.TemporaryDirectory(prefix="kvsluice-") as folder:
        log = Path(folder) / "serve.log"
        command: Sequence[str] = (sys.executable, "-P", "-m", "kvsluice.services.cli", "serve")
        with log.open("wb") as sink:
            process = subprocess.Popen(  # noqa: S603 - the project's own command
                [*command, "--host", "127.0.0.1", "--port", "0", "--http-port", "0", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield _await(process, log, start_timeout_s)
        finally:
            _stop(process)
