"""Ray: a cluster to run on, the controller of a fleet there, and how the fleet's processes are started and ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorDiedError, AuthenticationError, GetTimeoutError, RayError, RayTaskError
from ray.experimental import internal_kv
from ray.util.placement_group import get_placement_group, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..errors import ConfigError, InternalError, KvsluiceError, WorkerLost
from .actors import CONTROLLER, Actor, CombinedWorker, DecodeWorker, Gateway, HostSpec, PrefillWorker
from .config import ServeConfig
from .fleet.manager import Manager
from .fleet.report import Report
from .fleet.wanted import WantedFleet, WantedGroup
from .gateway.membership import View
from .processes import forget_source_tree
from .telemetry import configure_logging

T = TypeVar("T")

HOSTS = {"prefill": PrefillWorker, "decode": DecodeWorker, "both": CombinedWorker, "gateway": Gateway}
KEPT = b"kvsluice"
STOP_S = 5.0  # for a process that has nothing to finish
CONNECT_S = 10.0


def start_ray(config: ServeConfig, temp_dir: str, num_actors: int, namespace: str = "kvsluice") -> None:
    """Start a Ray instance for this service alone, on loopback; `serve.prepare_environment` puts it behind a token.

    Raises:
        InternalError: Ray does not start.
    """
    verbose = config.log_level in ("debug", "info")
    try:
        with _driver_elsewhere(temp_dir):
            ray.init(
                address="local",
                namespace=namespace,
                num_cpus=num_actors,
                include_dashboard=config.dashboard,
                dashboard_host="127.0.0.1",
                object_store_memory=config.object_store_bytes,
                logging_level=logging.WARNING if verbose else logging.ERROR,
                log_to_driver=verbose,
                _node_ip_address="127.0.0.1",
                _temp_dir=temp_dir,
            )
    except Exception as exc:  # of many kinds: its own, time-outs, the file system's
        raise InternalError(f"Ray did not start here ({type(exc).__name__}: {_first_line(exc)})") from exc


def connect(address: str, namespace: str) -> None:
    """Become a driver on a cluster that runs.

    Args:
        address: auto, HOST:PORT of its head, from one of its nodes, or ray://HOST:PORT from anywhere.

    Raises:
        ConfigError: there is none, or it does not let this command in.
    """
    _check_reachable(address)
    try:
        with tempfile.TemporaryDirectory(prefix="kvsluice-") as folder, _driver_elsewhere(folder):
            ray.init(address=address, namespace=namespace, logging_level=logging.ERROR, log_to_driver=False)
    except AuthenticationError as exc:
        raise ConfigError(
            f"address: the cluster at {address} asks for its token; "
            "allowed: with RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH set as on its nodes "
            "(that of a service which `kvsluice serve` runs is its own, and takes no commands)"
        ) from exc
    except (ConnectionError, RuntimeError, ValueError, RayError) as exc:
        raise ConfigError(
            f"address: no Ray cluster is to be had at {address} ({type(exc).__name__}: {_first_line(exc)}); "
            "allowed: auto or HOST:PORT on a node of the cluster, ray://HOST:PORT from elsewhere, with the cluster's "
            "token in RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        ) from exc


def _first_line(exc: BaseException) -> str:
    return next(iter(str(exc).strip().splitlines()), "")[:200]


def _check_reachable(address: str) -> None:
    """Ray itself waits long for a head that is not there."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdigit():
        raise ConfigError(f"address: got {address!r}; allowed: auto, HOST:PORT, ray://HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as exc:
        raise ConfigError(f"address: nothing answers at {address}: {exc.strerror or type(exc).__name__}") from exc


@contextlib.contextmanager
def _driver_elsewhere(folder: str) -> Any:
    """Ray puts the driver's working directory on its workers' import path."""
    here = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


def disconnect() -> None:
    """Leave the cluster; a Ray instance that this process has started ends."""
    ray.shutdown()


def gpu_count() -> float:
    """GPUs of the cluster that are not taken."""
    resources: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return resources.get("GPU", 0.0)


def find_actor(name: str, namespace: str) -> Actor | None:
    """The named actor of a fleet, if there is one."""
    try:
        return ray.get_actor(name, namespace)
    except ValueError:
        return None


def ask(actor: Actor, method: str, *args: Any) -> Future[Any]:
    """Call a method of an actor. Errors of the tree come as they were raised; an actor that is gone is `WorkerLost`."""
    answer: Future[Any] = Future()

    def tell(done: Future[Any]) -> None:
        exc = done.exception()
        if exc is None:
            answer.set_result(done.result())
        else:
            answer.set_exception(_typed(exc))

    getattr(actor, method).remote(*args).future().add_done_callback(tell)
    return answer


def _typed(exc: BaseException) -> KvsluiceError:
    cause = exc.cause if isinstance(exc, RayTaskError) else exc
    if isinstance(cause, KvsluiceError):
        return cause
    if isinstance(cause, ActorDiedError):
        return WorkerLost("it is gone")
    if isinstance(cause, RayError):
        return WorkerLost(f"it does not answer: {type(cause).__name__}")
    return InternalError(f"it failed: {type(cause).__name__}")


def get_controller(namespace: str, lasting: bool, log_level: str) -> Actor:
    """The fleet's controller; the first call starts it.

    Args:
        lasting: it is restarted when it dies, and goes on with the fleet as it was.
    """
    remote: Any = ray.remote
    options = {
        "name": CONTROLLER,
        "namespace": namespace,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        "max_restarts": -1 if lasting else 0,
    }
    return remote(Controller).options(**options).remote(namespace, lasting, log_level)


def end_controller(namespace: str) -> None:
    """End it for good, with what it kept."""
    actor = find_actor(CONTROLLER, namespace)
    if actor is not None:
        ray.kill(actor, no_restart=True)


class RayRuntime:
    """A fleet's processes as Ray actors: detached, each in a placement group of its own, on one node."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    async def start(self, worker_id: str, group: WantedGroup, fleet: WantedFleet) -> None:
        """See `Runtime`."""
        await self._call(self._start, worker_id, group, fleet)

    async def stop(self, worker_id: str, grace_s: float) -> None:
        """See `Runtime`."""
        actor = await self._call(find_actor, worker_id, self._namespace)
        if actor is not None and await self.place(worker_id) is None:
            with contextlib.suppress(KvsluiceError, TimeoutError):
                async with asyncio.timeout(grace_s + STOP_S):
                    await asyncio.wrap_future(ask(actor, "stop", grace_s))
        await self._call(self._end, worker_id)

    async def restart(self, worker_id: str) -> None:
        """See `Runtime`."""
        actor = await self._call(find_actor, worker_id, self._namespace)
        if actor is not None:
            with contextlib.suppress(RayError):
                await asyncio.to_thread(ray.kill, actor, no_restart=False)

    async def place(self, worker_id: str) -> str | None:
        """See `Runtime`."""
        return await self._call(self._place, worker_id)

    async def _call(self, job: Callable[..., T], *args: Any) -> T:
        """Ray's calls wait for its head."""
        try:
            return await asyncio.to_thread(job, *args)
        except (RayError, GetTimeoutError) as exc:
            raise WorkerLost(f"Ray does not do what it is told: {type(exc).__name__}") from exc

    def _start(self, worker_id: str, group: WantedGroup, fleet: WantedFleet) -> None:
        remote: Any = ray.remote
        bundle = dict(group.bundle)
        # a worker that takes several bundles later has them on one node
        room = placement_group([bundle], strategy="STRICT_PACK", name=_room(worker_id), lifetime="detached")
        options: dict[str, Any] = {
            "name": worker_id,
            "namespace": self._namespace,
            "lifetime": "detached",
            "num_cpus": bundle.pop("CPU", 0),
            "num_gpus": bundle.pop("GPU", 0),
            "resources": bundle,
            "max_restarts": -1,
            "max_concurrency": 8,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(room, placement_group_bundle_index=0),
        }
        if fleet.env:
            options["runtime_env"] = {"env_vars": dict(fleet.env)}
        spec = HostSpec(worker_id, self._namespace, fleet.lease_s, group.own_host)
        remote(HOSTS[group.role]).options(**options).remote(group.config_json, spec)

    def _end(self, worker_id: str) -> None:
        actor = find_actor(worker_id, self._namespace)
        if actor is not None:
            ray.kill(actor, no_restart=True)
        with contextlib.suppress(ValueError):
            remove_placement_group(get_placement_group(_room(worker_id)))

    def _place(self, worker_id: str) -> str | None:
        try:
            table = placement_group_table(get_placement_group(_room(worker_id)))
        except ValueError:
            return None
        if table["state"] not in ("PENDING", "RESCHEDULING"):
            return None
        wanted = ", ".join(f"{amount:g} {name}" for name, amount in table["bundles"][0].items())
        return f"no node has room for {wanted}"


def _room(worker_id: str) -> str:
    return f"kvsluice-{worker_id}"


class Controller:
    """The manager of a fleet, as a named, detached actor. Async: a gateway's long poll holds nobody up."""

    async def __init__(self, namespace: str, lasting: bool, log_level: str) -> None:  # type: ignore[misc]
        forget_source_tree()
        configure_logging(log_level)
        # what it warns of, restartable actors in placement groups, is meant: a worker leaves its place when it is ended
        logging.getLogger("ray.actor").setLevel(logging.ERROR)
        self._key, self._lasting = namespace.encode(), lasting
        self._keeping = asyncio.Lock()
        kept = await asyncio.to_thread(internal_kv._internal_kv_get, self._key, namespace=KEPT) if lasting else None
        self._manager = Manager(RayRuntime(namespace), self._keep, kept.decode() if kept else None)
        self._task = asyncio.create_task(self._manager.run())

    async def _keep(self, text: str) -> None:
        """With Ray's head, which knows the actors, too: either both are there or none."""
        if self._lasting:
            async with self._keeping:
                await asyncio.to_thread(
                    internal_kv._internal_kv_put, self._key, text.encode(), overwrite=True, namespace=KEPT
                )

    async def apply(self, cluster_json: str) -> None:
        await self._manager.apply(cluster_json)

    async def report(self, report: Report) -> bool:
        return await self._manager.report(report)

    async def predecessor(self, worker_id: str) -> Report | None:
        return self._manager.predecessor(worker_id)

    async def view(self) -> View:
        return self._manager.table.view()

    async def watch(self, after: int, timeout_s: float) -> View:
        return await self._manager.watch(after, timeout_s)

    async def drain(self, worker_ids: list[str], groups: list[str], grace_s: float | None) -> list[str]:
        return await self._manager.drain(worker_ids, groups, grace_s)

    async def status(self) -> Mapping[str, Any]:
        return self._manager.status()

    async def shutdown(self, grace_s: float) -> None:
        """End all of the fleet but the controller; nothing of it is kept."""
        await self._manager.shutdown(grace_s)
        self._task.cancel()
        if self._lasting:
            async with self._keeping:
                await asyncio.to_thread(internal_kv._internal_kv_del, self._key, namespace=KEPT)
