"""Ray clusters of nodes that a test starts, kills and starts again: on loopback, or each node in a namespace."""

from __future__ import annotations

import itertools
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kvsluice.services.processes import Process, descendants, find, kill, remove_folder, wait_gone
from kvsluice.tests.faults.rig.fleet import command_line
from kvsluice.tests.faults.rig.network import Network, network
from kvsluice.tests.faults.rig.processes import wait_until

START_S = 240.0
STOP_S = 30.0
_numbers = itertools.count()


def cluster_environment() -> dict[str, str]:
    """For all nodes and commands of one cluster: behind a token, and quick to notice a node that is gone."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_health_check_initial_delay_ms": "2000",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "5000",
        "RAY_health_check_failure_threshold": "5",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
        "RAY_raylet_start_wait_time_s": "120",  # machines that run tests have other work
        "OMP_NUM_THREADS": "1",
    }


@dataclass
class RayNode:
    """A node of a Ray cluster, with all its processes.

    Attributes:
        ip: its own address.
        launcher: what its commands begin with.
        head: the head's address, host:port; None = this is the head.
    """

    ip: str
    environment: Mapping[str, str]
    resources: Mapping[str, float]
    num_cpus: int = 8
    launcher: Sequence[str] = ()
    head: str | None = None
    folder: str = field(default_factory=lambda: tempfile.mkdtemp(prefix="kvray"))
    address: str = ""
    _process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it belongs to the cluster."""
        ray = str(Path(sys.executable).with_name("ray"))
        where = ["--head", "--port=0", "--include-dashboard=false", f"--temp-dir={self.folder}"]
        if self.head is not None:
            where = [f"--address={self.head}"]
        command = [*self.launcher, ray, "start", *where, f"--node-ip-address={self.ip}", f"--num-cpus={self.num_cpus}"]
        command += [f"--resources={json.dumps(dict(self.resources))}", "--object-store-memory=80000000", "--block"]
        log = Path(self.folder) / f"start{next(_numbers)}.log"
        with log.open("wb") as sink:
            self._process = subprocess.Popen(
                command,
                env=os.environ | dict(self.environment),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        wait_until(lambda: self._is_up(log), f"the Ray node is up; {log}", START_S)
        if self.head is None:
            # what `ray start` prints of it depends on the address
            lines = [command_line(process) for process in self.processes()]
            found = [re.search(r"--gcs[-_]address=([0-9.]+:\d+)", line) for line in lines if "raylet" in line]
            self.address = next(match[1] for match in found if match is not None)

    def _is_up(self, log: Path) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, log.read_text()
        return "Ray runtime started" in log.read_text()

    def processes(self) -> list[Process]:
        if self._process is None or (own := find(self._process.pid)) is None:
            return []
        return [own, *descendants(self._process.pid)]

    def kill(self) -> None:
        """All of it at once, as when the machine loses power."""
        tree = self.processes()
        kill(tree)
        assert wait_gone(tree, STOP_S) == []
        assert self._process is not None
        self._process.wait(STOP_S)

    def stop(self) -> None:
        """End it and remove what it wrote."""
        if self._process is not None:
            tree = self.processes()
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGTERM)
                wait_gone(tree, 5.0)
            kill(tree)
            wait_gone(tree, STOP_S)
            self._process.wait(STOP_S)
        remove_folder(self.folder)

    def run(
        self, *command: str, cwd: str | Path | None = None, timeout_s: float = 240.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the node."""
        return subprocess.run(
            [*self.launcher, *command],
            env=os.environ | dict(self.environment),
            cwd=cwd or self.folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def kvsluice(self, command: str, *arguments: str, timeout_s: float = 240.0) -> subprocess.CompletedProcess[str]:
        """Run `kvsluice COMMAND` against the cluster, from this node."""
        own = (sys.executable, "-P", "-m", "kvsluice.services.cli", command, "--address", self.head or self.address)
        return self.run(*own, *arguments, timeout_s=timeout_s)

    def status(self) -> dict[str, Any]:
        """What `kvsluice status --json` says."""
        done = self.kvsluice("status", "--json")
        assert done.returncode == 0, done.stderr
        state: dict[str, Any] = json.loads(done.stdout)
        return state


@contextmanager
def loopback_cluster(num_cpus: int = 8) -> Iterator[RayNode]:
    """A cluster of one node that listens on loopback only."""
    environment = cluster_environment() | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    head = RayNode("127.0.0.1", environment, {}, num_cpus)
    try:
        head.start()
        yield head
    finally:
        head.stop()


@dataclass
class TwoNodes:
    """A head and a node, each in a namespace of its own, with a cable between them.

    Attributes:
        cable: from the head's namespace to the node's.
    """

    head: RayNode
    node: RayNode
    cable: Network


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}"


@contextmanager
def two_nodes(head_resources: Mapping[str, float], node_resources: Mapping[str, float]) -> Iterator[TwoNodes]:
    """Such a cluster, whose head this side reaches; or a skipped test that says why there is none."""
    if shutil.which("ray", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("no `ray` beside this Python")
    with ExitStack() as stack:
        outer, cable = stack.enter_context(network()), stack.enter_context(network())
        # the cable's near end moves into the head's namespace; this side reaches it through there
        _ip("link", "set", cable.near_link, "netns", outer.name)
        _ip("-n", outer.name, "addr", "add", f"{cable.near}/24", "dev", cable.near_link)
        _ip("-n", outer.name, "link", "set", cable.near_link, "up")
        _ip("route", "add", f"{cable.near}/32", "via", outer.far)
        environment = cluster_environment()
        head = RayNode(cable.near, environment, head_resources, launcher=outer.launcher)
        stack.callback(head.stop)
        head.start()
        node = RayNode(cable.far, environment, node_resources, launcher=cable.launcher, head=head.address)
        stack.callback(node.stop)
        node.start()
        yield TwoNodes(head, node, cable)
