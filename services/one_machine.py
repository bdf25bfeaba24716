"""The driver of a fleet on one machine: it starts Ray and the fleet's controller, watches them and ends everything.

When the controller or Ray itself dies the service stops, with one line that says so.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from typing import Any

from ..errors import ConfigError, InternalError, KvsluiceError
from . import cluster
from .actors import Actor
from .config import ServeConfig
from .fleet.wanted import cluster_of
from .processes import Process, descendants, kill, remove_folder, wait_gone
from .status import build_error
from .worker_watch import WorkerWatch

log = logging.getLogger("kvsluice.cluster")

WATCH_PERIOD_S = 1.0
SHUTDOWN_S = 15.0
GATEWAY = "gateway-0"


class Fleet:
    """All of a service on this machine. The process that makes one is Ray's driver.

    Args:
        config: with an absolute path where the model is a path: workers run in another folder.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._temp_dir = tempfile.mkdtemp(prefix="kvsluice-")
        self._core: list[Process] = []
        self._namespace = ""
        self._controller: Actor | None = None
        self._actors: dict[str, Actor] = {}
        self._status: dict[str, dict[str, str]] = {}
        self.address = self.http_address = ""

    def start(self, stopped: Callable[[], bool], after_ray: Callable[[], None]) -> bool:
        """Bring everything up and wait until requests are served.

        Args:
            stopped: asked now and then; when it says so, starting is given up.
            after_ray: called once Ray is up; Ray installs signal handlers of its own.

        Returns:
            Whether it is up; False when it was given up.

        Raises:
            KvsluiceError: what kept a worker from starting.
        """
        config = self._config
        if config.device != "cpu":
            from .device import check_device  # brings torch, which a driver for CPUs does without

            check_device(config.device)
        wanted = cluster_of(config, 0.0)
        num_workers = sum(group.range.max for group in wanted.groups)
        cluster.start_ray(config, self._temp_dir, num_workers + 2, wanted.name)
        after_ray()
        self._core = [p for p in descendants() if p.name in ("gcs_server", "raylet")]
        if "cuda" in config.device:
            wanted = cluster_of(config, min(1.0, cluster.gpu_count() / num_workers))
        self._namespace = wanted.name
        self._controller = cluster.get_controller(wanted.name, lasting=False, log_level=config.log_level)
        self._ask_controller("apply", wanted.model_dump_json())
        for worker in self._ask_controller("status")["workers"]:
            self._actors[worker["worker"]] = cluster.find_actor(worker["worker"], wanted.name)
        return self._await_up(stopped)

    def _ask_controller(self, method: str, *args: Any) -> Any:
        try:
            return cluster.ask(self._controller, method, *args).result(self._config.start_timeout_s)
        except TimeoutError as exc:
            raise InternalError("the controller does not answer") from exc

    def _await_up(self, stopped: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + self._config.start_timeout_s
        waiting = {cluster.ask(actor, "status"): name for name, actor in self._actors.items()}
        while waiting:
            if stopped():
                return False
            if time.monotonic() > deadline:
                raise ConfigError(f"start_timeout_s: {', '.join(sorted(waiting.values()))} did not come up in time")
            done, _ = wait(list(waiting), timeout=0.2, return_when=FIRST_COMPLETED)
            for answer in done:
                self._take_status(waiting.pop(answer), answer)
        self.address, self.http_address = self._status[GATEWAY]["address"], self._status[GATEWAY]["http_address"]
        while not cluster.ask(self._actors[GATEWAY], "ready").result(self._config.start_timeout_s):
            if stopped():
                return False
            if time.monotonic() > deadline:
                raise ConfigError("start_timeout_s: the workers did not connect in time")
            time.sleep(0.05)
        return True

    def _take_status(self, name: str, answer: Future[dict[str, str]]) -> None:
        try:
            status = self._status[name] = answer.result()
        except KvsluiceError as exc:
            raise InternalError(f"{name} died while it started: {exc.message}") from exc
        if "error_type" in status:
            raise build_error(status["error_type"], status["message"])

    def watch(self, stop: threading.Event, say: Callable[[str], None]) -> str | None:
        """Wait until `stop` is set. Returns None then, or at once what has died that the service needs to live.
        `say` is told of other parts that die, and of their successors."""
        watches = [
            WorkerWatch(name, self._status[name], partial(cluster.ask, actor, "status"), say)
            for name, actor in self._actors.items()
        ]
        ping = cluster.ask(self._controller, "view")
        while not stop.wait(WATCH_PERIOD_S):
            gone = [p.name for p in self._core if not p.alive]
            if gone:
                return f"Ray's {gone[0]} is gone"
            if ping.done():
                if ping.exception() is not None:
                    return "the controller is gone"
                ping = cluster.ask(self._controller, "view")
            for watch in watches:
                watch.look()
        return None

    def drain(self) -> bool:
        """Take the service out of rotation and let running requests finish. Returns whether the gateway did."""
        if GATEWAY not in self._actors:
            return True
        try:
            cluster.ask(self._actors[GATEWAY], "stop", self._config.grace_s).result(self._config.grace_s + SHUTDOWN_S)
        except (KvsluiceError, TimeoutError) as exc:
            log.warning("the gateway did not stop by itself: %s", type(exc).__name__)
            return False
        return True

    def shutdown(self) -> None:
        """End every process of the fleet and of Ray, and remove what they wrote."""
        tree = descendants()
        if all(p.alive for p in self._core):
            # a stuck shutdown must not keep the processes alive
            closing = threading.Thread(target=cluster.disconnect, daemon=True)
            closing.start()
            closing.join(SHUTDOWN_S)
            wait_gone(tree, 2.0)
        self.kill(tree)

    def kill(self, tree: list[Process] | None = None) -> None:
        """End everything at once."""
        tree = [*(tree or ()), *descendants()]
        kill(tree)
        wait_gone(tree, 2.0)
        if not remove_folder(self._temp_dir):
            log.warning("%s is left over", self._temp_dir)
