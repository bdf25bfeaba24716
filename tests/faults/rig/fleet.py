"""A running service whose processes a test may look at, kill and freeze, and such a service over a store to break."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil

from kvsluice.evals.service_process import ServiceProcess, is_ready, running_service
from kvsluice.protos import worker_pb2 as wpb
from kvsluice.protos.worker_pb2_grpc import DecodeWorkerStub, PrefillWorkerStub
from kvsluice.services.processes import Process, descendants
from kvsluice.tests.faults.rig.failpoints import Failpoints, Point, failpoints
from kvsluice.tests.faults.rig.processes import process_state, wait_until
from kvsluice.tests.faults.rig.proxy import Proxy
from kvsluice.tests.faults.rig.redis_server import HOST, RedisServer, running

LEASE_S = 3.0
PATIENCE_S = 120.0  # for workers that start again on a machine that has other work
ACTORS = {"prefill": "ray::PrefillWorker", "decode": "ray::DecodeWorker", "gateway": "ray::Gateway"}
STUBS = {"prefill": PrefillWorkerStub, "decode": DecodeWorkerStub}


def command_line(process: Process) -> str:
    try:
        return Path(f"/proc/{process.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def cpu_seconds(process: Process) -> float:
    """That it has computed; 0 where it is gone."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Victim:
    """A running service."""

    service: ServiceProcess

    @property
    def address(self) -> str:
        return self.service.address

    @property
    def said(self) -> str:
        """All that it has printed."""
        return self.service.log.read_text(errors="replace")

    def processes(self) -> list[Process]:
        return descendants(self.service.process.pid)

    def find(self, name: str) -> Process:
        """The one actor or daemon whose command line holds `name`."""
        found = [p for p in self.processes() if name in command_line(p)]
        assert len(found) == 1, f"{len(found)} processes are called {name}"
        return found[0]

    def actors(self, role: str) -> list[Process]:
        """Processes of a role, the oldest first."""
        found = [p for p in self.processes() if ACTORS[role] in command_line(p)]
        return sorted(found, key=lambda process: (process.start_ticks, process.pid))

    def kill(self, name: str) -> Process:
        process = self.find(name)
        os.kill(process.pid, signal.SIGKILL)
        return process

    def busiest(self, role: str) -> Process:
        """The process of a role that computes most."""
        before = {process: cpu_seconds(process) for process in self.actors(role)}
        time.sleep(0.3)
        return max(before, key=lambda process: cpu_seconds(process) - before[process])

    def wait_said(self, text: str) -> None:
        """Wait until the service has printed a text."""
        wait_until(lambda: text in self.said, f"the service says {text!r}")

    def wait_busy(self, name: str, seconds: float) -> None:
        """Wait until a process has computed for so long from now on."""
        process = self.find(name)
        begin = cpu_seconds(process)
        wait_until(lambda: cpu_seconds(process) > begin + seconds, f"{name} computes", 60.0)


def worker_info(process: Process, role: str, token: str) -> wpb.WorkerInfo | None:
    """A worker's account of itself; None where it gives none (yet)."""
    try:
        ports = [one.laddr.port for one in psutil.Process(process.pid).net_connections("tcp") if one.status == "LISTEN"]
    except psutil.Error:
        return None
    for port in ports:  # Ray listens, too
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            try:
                known = (("authorization", f"Bearer {token}"),)
                info: wpb.WorkerInfo = STUBS[role](channel).Info(wpb.InfoRequest(), timeout=2.0, metadata=known)
            except grpc.RpcError:
                continue
            return info
    return None


@dataclass
class Fleet(Victim):
    """A service over a redis-server behind a proxy.

    Attributes:
        sizes: workers of each role.
        token: the fleet's.
    """

    redis: RedisServer
    proxy: Proxy
    points: Failpoints
    sizes: dict[str, int]
    token: str

    def infos(self, role: str) -> list[wpb.WorkerInfo]:
        """Of all workers that give an account of themselves."""
        found = (worker_info(process, role, self.token) for process in self.actors(role))
        return [info for info in found if info is not None]

    def is_whole(self) -> bool:
        """Whether every worker runs, is known to the gateway and can keep requests, and the store answers."""
        running = {role: [p for p in self.actors(role) if process_state(p.pid) != "T"] for role in self.sizes}
        if any(len(running[role]) != size for role, size in self.sizes.items()):
            return False
        infos = {role: self.infos(role) for role in self.sizes}
        if any(len(infos[role]) != size for role, size in self.sizes.items()):
            return False
        if not all(info.has_store for info in infos["decode"]):
            return False
        return self._links_are_up() and self.redis.answers() and is_ready(self.address)

    def _links_are_up(self) -> bool:
        last = {}
        for line in self.said.splitlines():
            words = line.split()
            if words[-1:] and words[-1] in ("up", "lost") and words[-5:-3] and words[-4] == "worker":
                last[words[-3]] = words[-1]
        return len(last) == sum(self.sizes.values()) and set(last.values()) == {"up"}

    def await_whole(self) -> None:
        """Wait until nothing of what was done to it is left."""
        wait_until(self.is_whole, "every worker is there again", PATIENCE_S)


@contextmanager
def running_fleet(
    folder: Path, points: dict[str, Point], *arguments: str, prefill_workers: int = 2, decode_workers: int = 3
) -> Iterator[Fleet]:
    """Such a service for the length of the block, impatient, so that faults are over soon."""
    sizes = {"prefill": prefill_workers, "decode": decode_workers}
    with ExitStack() as stack:
        redis = stack.enter_context(running(RedisServer(folder / "redis")))
        proxy = stack.enter_context(Proxy(HOST, redis.port))
        (folder / "points").mkdir()
        hooks = stack.enter_context(failpoints(folder / "points", points))
        given = ["--model", "smollm2-135m", "--torch-threads", "1", "--default-recipe", "sluice-full"]
        given += ["--log-level", "info", "--worker-lease-s", str(LEASE_S), "--max-migrations", "64"]
        given += ["--store-url", f"redis://{HOST}:{proxy.port}", "--store-keep-every", "8"]
        # full soon: what grows behind that is a leak
        given += ["--store-cache-bytes", str(16 << 20), "--prefix-cache-bytes", str(64 << 20)]
        token = secrets.token_hex(32)
        (folder / "token").write_text(token)
        given += ["--fleet-token-file", str(folder / "token")]
        given += ["--prefill-workers", str(prefill_workers), "--decode-workers", str(decode_workers), *arguments]
        service = stack.enter_context(running_service(*given))
        yield Fleet(service, redis, proxy, hooks, sizes, token)
