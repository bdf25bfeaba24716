"""A network of its own for a server: a namespace behind a pair of virtual cables. Needs root and `ip`."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_numbers = itertools.count()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"


class Network:
    """A namespace and its cable.

    Attributes:
        near, far: addresses of this side and of the namespace's.
        near_link: name of this side's end of the cable.
        launcher: what a command begins with that runs inside.
    """

    def __init__(self, name: str, subnet: int) -> None:
        self.name = name
        self.near, self.far = f"10.213.{subnet}.1", f"10.213.{subnet}.2"
        self.launcher = ("ip", "netns", "exec", name)
        self.near_link, self._far_link = f"{name}a", f"{name}b"

    def make(self) -> None:
        _run("ip", "netns", "add", self.name)
        _run("ip", "link", "add", self.near_link, "type", "veth", "peer", "name", self._far_link, "netns", self.name)
        _run("ip", "addr", "add", f"{self.near}/24", "dev", self.near_link)
        _run("ip", "link", "set", self.near_link, "up")
        _run("ip", "-n", self.name, "addr", "add", f"{self.far}/24", "dev", self._far_link)
        _run("ip", "-n", self.name, "link", "set", self._far_link, "up")
        _run("ip", "-n", self.name, "link", "set", "lo", "up")

    def remove(self) -> None:
        """Take it away; the cable goes with the namespace."""
        for command in (("ip", "link", "del", self.near_link), ("ip", "netns", "del", self.name)):
            subprocess.run(command, capture_output=True, check=False)

    def cut(self) -> None:
        """Unplug the far end: packets vanish, connections stay as they are, and nobody is told."""
        _run("ip", "-n", self.name, "link", "set", self._far_link, "down")

    def mend(self) -> None:
        _run("ip", "-n", self.name, "link", "set", self._far_link, "up")

    def limit(self, kbit_per_s: int) -> None:
        """Let the cable carry so much each way; needs `tc`."""
        shape = ("root", "tbf", "rate", f"{kbit_per_s}kbit", "burst", "16kb", "latency", "400ms")
        _run("tc", "qdisc", "add", "dev", self.near_link, *shape)
        _run("tc", "-n", self.name, "qdisc", "add", "dev", self._far_link, *shape)


@contextmanager
def network() -> Iterator[Network]:
    """A network, or a skipped test that says why there is none."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if shutil.which("ip") is None:
        pytest.skip("no `ip` on this machine; on Debian: apt-get install iproute2")
    number = next(_numbers)
    net = Network(f"kv{os.getpid()}n{number}", (os.getpid() * 7 + number) % 250 + 1)
    try:
        try:
            net.make()
        except AssertionError as exc:
            pytest.skip(f"this machine makes no network namespaces: {exc}")
        yield net
    finally:
        net.remove()
