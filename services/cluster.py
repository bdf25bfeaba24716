"""The driver of a fleet on Ray on one machine: it starts the actors, watches and ends them.

When the controller or Ray itself dies the service stops, with one line that says so.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..errors import ConfigError, InternalError
from .actors import CONTROLLER, NAMESPACE, Actor, CombinedWorker, Controller, DecodeWorker, Gateway, PrefillWorker
from .config import ServeConfig
from .processes import Process, descendants, kill, remove_folder, wait_gone
from .status import build_error
from .worker_watch import Status, WorkerWatch

log = logging.getLogger("kvsluice.cluster")

WATCH_PERIOD_S = 1.0
SHUTDOWN_S = 15.0


def _ask(actor: Actor) -> Future[Status]:
    answer: Future[Status] = actor.status.remote().future()
    return answer


def start_ray(config: ServeConfig, temp_dir: str, num_actors: int) -> None:
    """Start a Ray instance for this service alone, on loopback; `serve.prepare_environment` puts it behind a token."""
    verbose = config.log_level in ("debug", "info")
    here = os.getcwd()
    # Ray puts the driver's working directory on its workers' import path
    os.chdir(temp_dir)
    try:
        ray.init(
            address="local",
            namespace=NAMESPACE,
            num_cpus=num_actors,
            include_dashboard=config.dashboard,
            dashboard_host="127.0.0.1",
            object_store_memory=config.object_store_bytes,
            logging_level=logging.WARNING if verbose else logging.ERROR,
            log_to_driver=verbose,
            _node_ip_address="127.0.0.1",
            _temp_dir=temp_dir,
        )
    finally:
        os.chdir(here)


class Fleet:
    """All of a service on this machine. The process that makes one is Ray's driver.

    Args:
        config: with an absolute path where the model is a path: workers run in another folder.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._temp_dir = tempfile.mkdtemp(prefix="kvsluice-")
        self._core: list[Process] = []
        self._controller: Actor | None = None
        self._gateway: Actor | None = None
        self._workers: list[tuple[str, Actor]] = []
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
        kinds = self._kinds()
        start_ray(config, self._temp_dir, len(kinds) + 2)
        after_ray()
        self._core = [p for p in descendants() if p.name in ("gcs_server", "raylet")]
        remote: Any = ray.remote
        self._controller = remote(Controller).options(name=CONTROLLER, lifetime="detached", num_cpus=1).remote()
        resources: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        gpu_share = min(1.0, resources.get("GPU", 0.0) / len(kinds)) if "cuda" in config.device else 0.0
        worker_bundle = {"CPU": 1.0} | ({"GPU": gpu_share} if gpu_share else {})
        group = placement_group([*[worker_bundle for _ in kinds], {"CPU": 1.0}], strategy="PACK")

        def launch(cls: type, name: str, index: int, num_gpus: float) -> Actor:
            options = {
                "name": name,
                "num_cpus": 1,
                "num_gpus": num_gpus,
                "max_restarts": -1,
                "max_concurrency": 8,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
            }
            return remote(cls).options(**options).remote(config.to_json(), name)

        self._workers = [(name, launch(cls, name, i, gpu_share)) for i, (name, cls) in enumerate(kinds)]
        self._gateway = launch(Gateway, "gateway-0", len(kinds), 0)
        return self._await_up(stopped)

    def _kinds(self) -> list[tuple[str, type]]:
        config = self._config
        if config.role == "both":
            num = max(config.prefill_workers, config.decode_workers)
            return [(f"worker-{i}", CombinedWorker) for i in range(num)]
        return [(f"prefill-{i}", PrefillWorker) for i in range(config.prefill_workers)] + [
            (f"decode-{i}", DecodeWorker) for i in range(config.decode_workers)
        ]

    def _await_up(self, stopped: Callable[[], bool]) -> bool:
        assert self._gateway is not None
        deadline = time.monotonic() + self._config.start_timeout_s
        waiting = {handle.status.remote(): name for name, handle in [*self._workers, ("gateway-0", self._gateway)]}
        while waiting:
            if stopped():
                return False
            if time.monotonic() > deadline:
                raise ConfigError(f"start_timeout_s: {', '.join(sorted(waiting.values()))} did not come up in time")
            done, _ = ray.wait(list(waiting), timeout=0.2)
            for ref in done:
                name = waiting.pop(ref)
                status = self._status[name] = self._get(ref, name)
                if "error_type" in status:
                    raise build_error(status["error_type"], status["message"])
                if name == "gateway-0":
                    self.address, self.http_address = status["address"], status["http_address"]
        while not self._get(self._gateway.ready.remote(), "gateway-0"):
            if stopped():
                return False
            if time.monotonic() > deadline:
                raise ConfigError("start_timeout_s: the workers did not connect in time")
            time.sleep(0.05)
        return True

    def _get(self, ref: Any, name: str) -> Any:
        try:
            return ray.get(ref, timeout=self._config.start_timeout_s)
        except RayError as exc:
            raise InternalError(f"{name} died while it started: {type(exc).__name__}") from exc

    def watch(self, stop: threading.Event, say: Callable[[str], None]) -> str | None:
        """Wait until `stop` is set. Returns None then, or at once what has died that the service needs to live.
        `say` is told of other parts that die, and of their successors."""
        assert self._controller is not None and self._gateway is not None
        watches = [
            WorkerWatch(name, self._status[name], partial(_ask, actor), say)
            for name, actor in [*self._workers, ("gateway-0", self._gateway)]
        ]
        ping: Any = self._controller.view.remote()
        while not stop.wait(WATCH_PERIOD_S):
            gone = [p.name for p in self._core if not p.alive]
            if gone:
                return f"Ray's {gone[0]} is gone"
            done, _ = ray.wait([ping], timeout=0)
            if done:
                try:
                    ray.get(ping, timeout=1)
                except RayError:
                    return "the controller is gone"
                ping = self._controller.view.remote()
            for watch in watches:
                watch.look()
        return None

    def drain(self) -> bool:
        """Take the service out of rotation and let running requests finish. Returns whether the gateway did."""
        if self._gateway is None:
            return True
        try:
            ray.get(self._gateway.stop.remote(self._config.grace_s), timeout=self._config.grace_s + SHUTDOWN_S)
        except (RayError, GetTimeoutError) as exc:
            log.warning("the gateway did not stop by itself: %s", type(exc).__name__)
            return False
        return True

    def shutdown(self) -> None:
        """End every process of the fleet and of Ray, and remove what they wrote."""
        tree = descendants()
        if all(p.alive for p in self._core):
            # a stuck shutdown must not keep the processes alive
            closing = threading.Thread(target=ray.shutdown, daemon=True)
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
