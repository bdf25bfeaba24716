"""A fleet on a Ray cluster of two nodes, each in a network namespace: brought up, upgraded, drained, and with a node
that is lost and comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from kvsluice.client import Client, Completion
from kvsluice.services.processes import remove_folder
from kvsluice.tests.faults.rig.fleet import command_line
from kvsluice.tests.faults.rig.processes import wait_until
from kvsluice.tests.faults.rig.ray_cluster import TwoNodes, two_nodes

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 180.0
RAY_CLIENT_PORT = 10001  # of every head, unless it is told another
PROMPT = "A story about a lighthouse:"

FLEET = {
    "settings": {
        "model": "smollm2-135m",
        "random_weights": True,
        "seed": 3,
        "http": False,
        "allow_anonymous": True,
        "worker_lease_s": 5,
        "max_migrations": 16,
        "torch_threads": 1,
    },
    "gateways": [{"name": "gateway", "resources": {"custom": {"front": 1}}}],
    "groups": [
        {"name": "prefill", "role": "prefill", "resources": {"custom": {"front": 1}}},
        {"name": "near", "role": "decode", "resources": {"custom": {"front": 1}}},
        {"name": "far", "role": "decode", "resources": {"custom": {"back": 1}}},
    ],
    "lease_s": 15,
}


@dataclass
class Running:
    """A fleet on two nodes.

    Attributes:
        file: what `up` was told last.
        address: the gateway's.
    """

    nodes: TwoNodes
    file: Path
    address: str = ""
    expected: dict[int, list[int]] = field(default_factory=dict)

    def up(self, fleet: dict) -> str:
        self.file.write_text(yaml.safe_dump(fleet))
        done = self.nodes.head.kvsluice("up", "--config", str(self.file))
        assert done.returncode == 0, done.stderr
        return done.stderr + done.stdout

    def state(self, worker: str) -> str | None:
        """What the controller says of a worker; None where there is none."""
        found = [one for one in self.nodes.head.status()["workers"] if one["worker"] == worker]
        return str(found[0]["state"]) if found else None

    def client(self) -> Client:
        return Client(self.address, timeout_s=PATIENCE_S)


class Streams(threading.Thread):
    """Requests one after another, from a thread of their own, until it is told that it is enough."""

    def __init__(self, running: Running, seed: int) -> None:
        super().__init__(daemon=True)
        self.done: list[Completion] = []
        self.error: BaseException | None = None
        self._running, self._seed, self._enough = running, seed, threading.Event()

    def run(self) -> None:
        try:
            with self._running.client() as client:
                while not self._enough.is_set():
                    self.done.append(client.generate(PROMPT, max_tokens=24, ignore_eos=True, seed=self._seed))
        except BaseException as exc:
            self.error = exc

    def end(self) -> None:
        self._enough.set()
        self.join(PATIENCE_S)
        assert not self.is_alive()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with two_nodes({"front": 8}, {"back": 8}) as nodes:
        fleet = Running(nodes, tmp_path_factory.mktemp("fleet") / "cluster.yaml")
        said = fleet.up(FLEET)
        fleet.address = said.rpartition("serves on ")[2].strip()
        yield fleet


def test_workers_listen_on_their_nodes_addresses_and_find_no_top_level_kernels(running):
    head, node = running.nodes.head, running.nodes.node
    state = head.status()
    where = {one["worker"]: one["address"].rpartition(":")[0] for one in state["workers"]}
    assert where == {"gateway-0": head.ip, "prefill-0": head.ip, "near-0": head.ip, "far-0": node.ip}
    assert state["converged"]
    with running.client() as client:
        assert len(client.generate(PROMPT, max_tokens=8, ignore_eos=True).token_ids) == 8

    script = """
        import sys
        from kvsluice.services.cluster import connect, disconnect
        connect(sys.argv[1], "look")
        import ray

        @ray.remote
        def look():
            import importlib.util
            return [importlib.util.find_spec(name) is not None for name in ("kernels", "models", "kvsluice")]

        print(ray.get(look.remote()))
        disconnect()
    """
    # without -P the repository root, from which this runs, is on the driver's own import path
    done = head.run(sys.executable, "-c", textwrap.dedent(script), head.address, cwd=ROOT)
    assert done.stdout.strip() == "[False, False, True]", done.stderr


def test_a_command_without_the_token_is_told_what_is_missing(running):
    head = running.nodes.head
    own = (sys.executable, "-P", "-m", "kvsluice.services.cli", "status", "--address", head.address)
    done = head.run("env", "RAY_AUTH_TOKEN=" + "0" * 64, *own)
    assert done.returncode == 1
    said = done.stderr.strip().splitlines()[-1]  # Ray itself warns before
    assert said.startswith("kvsluice: address: ") and "RAY_AUTH_TOKEN" in said
    assert "Traceback" not in done.stderr


def test_a_command_from_elsewhere_comes_through_rays_client_port(running, tmp_path):
    head = running.nodes.head
    door = ["--address", f"ray://{head.ip}:{RAY_CLIENT_PORT}"]
    for command, told in (
        (["status", "--json"], '"converged": true'),
        (["up", "--config", str(running.file)], "serves"),
    ):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "kvsluice.services.cli", *command, *door],
            env=os.environ | dict(head.environment),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert told in done.stdout + done.stderr
    assert {one["state"] for one in head.status()["workers"]} == {"serving"}, "what is as wanted stays"


@pytest.mark.acceptance
def test_an_upgrade_and_a_drain_fail_no_request_and_change_no_token(running):
    loads = [Streams(running, seed) for seed in (1, 2, 3)]
    for load in loads:
        load.start()
    wait_until(lambda: all(load.done for load in loads), "requests are answered", PATIENCE_S)
    changed = FLEET | {
        "groups": [
            group | ({"settings": {"max_num_seqs": 8}} if group["role"] == "decode" else {})
            for group in FLEET["groups"]
        ]
    }
    said = running.up(changed)
    assert "near-1 serves" in said and "far-1 serves" in said
    assert running.state("near-0") is None and running.state("far-0") is None
    drained = running.nodes.head.kvsluice("drain", "near-1")
    assert drained.returncode == 0, drained.stderr
    wait_until(lambda: running.state("near-2") == "serving", "another takes its place", PATIENCE_S)
    for load in loads:
        load.end()
    for load in loads:
        assert load.error is None
        assert len({tuple(one.token_ids) for one in load.done}) == 1
        assert {one.durability.migrations for one in load.done} == {0}


def test_streams_of_a_lost_node_go_on_and_a_node_that_joins_gets_its_workers(running):
    far = next(one for one in running.nodes.head.status()["workers"] if one["group"] == "far")["worker"]
    with running.client() as client:
        whole = [client.generate(PROMPT, max_tokens=200, ignore_eos=True, seed=seed).token_ids for seed in (5, 6)]
        streams = [client.stream(PROMPT, max_tokens=200, ignore_eos=True, seed=seed) for seed in (5, 6)]
        for stream in streams:
            next(stream)  # one on each decode worker
        running.nodes.node.kill()
        for stream in streams:
            for _ in stream:
                pass
        assert [stream.completion.token_ids for stream in streams] == whole
        assert sum(stream.completion.durability.migrations for stream in streams) >= 1

        def waits() -> bool:
            (one,) = [one for one in running.nodes.head.status()["workers"] if one["worker"] == far]
            return str(one["waits_for"]).startswith("no node has room for ")

        wait_until(waits, "the lost worker waits for a node", PATIENCE_S)
        assert not running.nodes.head.status()["converged"]
        running.nodes.node.start()
        wait_until(lambda: running.nodes.head.status()["converged"], "the fleet is whole again", PATIENCE_S)
        assert len(client.generate(PROMPT, max_tokens=8, ignore_eos=True).token_ids) == 8


def test_a_lost_controller_comes_back_and_nobody_notices(running):
    head = running.nodes.head
    before = {one["worker"]: one["pid"] for one in head.status()["workers"]}
    load = Streams(running, 4)
    load.start()
    wait_until(lambda: load.done, "requests are answered", PATIENCE_S)
    everybody = [*head.processes(), *running.nodes.node.processes()]
    (controller,) = [process for process in everybody if "ray::Controller" in command_line(process)]
    os.kill(controller.pid, signal.SIGKILL)
    wait_until(lambda: not controller.alive, "the controller is gone")
    wait_until(lambda: head.kvsluice("status", "--json").returncode == 0, "another one answers", PATIENCE_S)
    wait_until(lambda: head.status()["converged"], "it knows everybody", PATIENCE_S)
    load.end()
    assert load.error is None
    assert {one["worker"]: one["pid"] for one in head.status()["workers"]} == before


@pytest.mark.acceptance
def test_a_lost_head_is_an_outage_after_which_up_begins_anew(running, tmp_path):
    """Declared: without a Ray head that outlives itself, the fleet ends with it, wherever its processes run."""
    nodes = running.nodes
    nodes.head.kill()
    workers = nodes.node.processes()
    wait_until(lambda: not any(p.alive for p in workers), "the node ends without its head", PATIENCE_S)
    nodes.node.stop()
    remove_folder(nodes.head.folder)
    nodes.head.folder = str(tmp_path)
    nodes.head.start()
    assert "there is no fleet kvsluice" in nodes.head.kvsluice("status").stderr
    alone = FLEET | {"groups": [group for group in FLEET["groups"] if group["name"] != "far"]}
    running.address = running.up(alone).rpartition("serves on ")[2].strip()
    with running.client() as client:
        assert len(client.generate(PROMPT, max_tokens=8, ignore_eos=True).token_ids) == 8
    done = nodes.head.kvsluice("down", "--grace-s", "5")
    assert done.returncode == 0, done.stderr
    left = [command_line(process) for process in nodes.head.processes()]
    assert not [line for line in left if "ray::Decode" in line or "ray::Prefill" in line or "ray::Gateway" in line]
