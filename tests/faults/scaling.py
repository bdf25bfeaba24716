"""From 1P1D to 2P2D and back by load alone, on a real Ray cluster: no request fails, and no token changes.

    python -P -m kvsluice.tests.faults.scaling --json benchmarks/results/scaling.json

A few clients send requests one after another; then many do, until the controller has doubled both groups; then few
again, until it has taken the second worker of each away.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kvsluice.client import Client
from kvsluice.evals.report import write_results
from kvsluice.tests.faults.rig.ray_cluster import RayNode, loopback_cluster

PROMPT_TOKENS, ANSWER_TOKENS = 384, 24
FEW, MANY = 1, 10
PATIENCE_S = 600.0
POLL_S = 1.0

SCALING = {"target_queue_s": 1.0, "target_token_usage": 0.6, "up_after_s": 3, "down_after_s": 15, "cooldown_s": 8}
FLEET: dict[str, Any] = {
    "settings": {
        "model": "smollm2-135m",
        "random_weights": True,
        "seed": 3,
        "port": 0,
        "http": False,
        "torch_threads": 1,
        "max_num_seqs": 4,
        "max_queue": 256,
    },
    "groups": [
        {"name": "prefill", "role": "prefill", "replicas": {"min": 1, "max": 2}, "scaling": SCALING},
        {"name": "decode", "role": "decode", "replicas": {"min": 1, "max": 2}, "scaling": SCALING},
    ],
    "drain_s": 120,
}


@dataclass
class Load:
    """Clients that each send one request after another.

    Attributes:
        answered: requests, by the number of clients that were at work.
        wrong: answers that are not those of the same request before.
    """

    address: str
    answered: int = 0
    migrated: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    _clients: list[tuple[threading.Thread, threading.Event]] = field(default_factory=list)
    _known: dict[int, list[int]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def resize(self, num_clients: int) -> None:
        """Have so many clients at work; those that are too many finish what they have."""
        while len(self._clients) > num_clients:
            self._clients.pop()[1].set()
        while len(self._clients) < num_clients:
            enough = threading.Event()
            thread = threading.Thread(target=self._work, args=(len(self._clients), enough))
            self._clients.append((thread, enough))
            thread.start()

    def _work(self, number: int, enough: threading.Event) -> None:
        prompt = [1000 + number * 7 + i % 500 for i in range(PROMPT_TOKENS)]
        with Client(self.address, timeout_s=PATIENCE_S) as client:
            while not enough.is_set():
                try:
                    done = client.generate(
                        prompt, recipe="exact", max_tokens=ANSWER_TOKENS, ignore_eos=True, temperature=0.0
                    )
                except Exception as exc:
                    with self._lock:
                        self.errors.append(f"{type(exc).__name__}: {exc}")
                    continue
                with self._lock:
                    self.answered += 1
                    self.migrated += done.durability.migrations > 0
                    self.wrong += self._known.setdefault(number, done.token_ids) != done.token_ids


def sizes(state: dict[str, Any]) -> dict[str, int]:
    return {group["group"]: group["serving"] for group in state["groups"] if group["role"] != "gateway"}


def wait_for(head: RayNode, wanted: int, note: Callable[[dict[str, int]], None]) -> float:
    """Wait until both groups have so many workers, and no others are on their way out. Returns seconds."""
    begin = time.monotonic()
    while time.monotonic() - begin < PATIENCE_S:
        state = head.status()
        note(sizes(state))
        if state["converged"] and set(sizes(state).values()) == {wanted}:
            return time.monotonic() - begin
        time.sleep(POLL_S)
    raise TimeoutError(f"not {wanted}P{wanted}D within {PATIENCE_S:.0f} s: {state}")


def run() -> dict[str, Any]:
    """Scale up and down under load. Returns what came of it."""
    course: list[dict[str, Any]] = []
    begin = time.monotonic()

    def note(now: dict[str, int]) -> None:
        if not course or course[-1]["workers"] != now:
            course.append({"at_s": round(time.monotonic() - begin, 1), "workers": now})
            print(f"{course[-1]['at_s']:7.1f} s  {now['prefill']}P{now['decode']}D", file=sys.stderr, flush=True)

    with loopback_cluster(num_cpus=8) as head, tempfile.TemporaryDirectory(prefix="kvsluice-") as folder:
        file = Path(folder) / "cluster.yaml"
        file.write_text(yaml.safe_dump(FLEET))
        done = head.kvsluice("up", "--config", str(file), timeout_s=PATIENCE_S)
        if done.returncode:
            raise RuntimeError(done.stderr)
        load = Load(done.stdout.rpartition("serves on ")[2].strip())
        try:
            load.resize(FEW)
            wait_for(head, 1, note)
            load.resize(MANY)
            up_s = wait_for(head, 2, note)
            at_two = load.answered
            load.resize(FEW)
            down_s = wait_for(head, 1, note)
        finally:
            load.resize(0)
        head.kvsluice("down", "--grace-s", "60", timeout_s=PATIENCE_S)
    return {
        "failed": len(load.errors),
        "wrong": load.wrong,
        "answered": load.answered,
        "answered_until_2p2d": at_two,
        "migrated": load.migrated,
        "up_s": round(up_s, 1),
        "down_s": round(down_s, 1),
        "course": course,
        "errors": load.errors[:10],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    results = run()
    passed = results["failed"] == 0 and results["wrong"] == 0
    print(
        f"1P1D → 2P2D in {results['up_s']:.0f} s → 1P1D in {results['down_s']:.0f} s; {results['answered']} requests "
        f"answered, {results['migrated']} of them moved, {results['failed']} failed, {results['wrong']} wrong"
    )
    if arguments.json is not None:
        settings = {"clients": [FEW, MANY], "prompt_tokens": PROMPT_TOKENS, "answer_tokens": ANSWER_TOKENS}
        write_results(arguments.json, {"settings": settings | {"scaling": SCALING}, "results": results})
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
