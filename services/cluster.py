"""The fleet on Ray: the actors that host the services, the controller that knows them, and the driver of one machine.

    Controller (named, detached)   membership with generation numbers
    PrefillWorker, DecodeWorker    one process each (or CombinedWorker: both roles in one), restarted when they die
    Gateway                        the generate API

Each actor hosts its service on an event loop of its own; tokens and KV go from process to process over gRPC and never
through Ray. A restarted actor comes back serving, at a new address that it registers with the controller.

When the controller or Ray itself dies the service stops, with one line that says so.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..errors import ConfigError, InternalError, KvsluiceError, WorkerLost
from .config import ServeConfig
from .gateway.membership import Member, MembershipTable, Role, View
from .lifecycle import LoopThread, WorkerHost, WorkerService, end_later, end_process, persist
from .model_shape import model_shape
from .processes import Process, descendants, forget_source_tree, kill, remove_folder, wait_gone
from .status import build_error
from .telemetry import configure_logging, where
from .worker import WorkerIdentity, check_fit, compute_dtype
from .worker_watch import Status, WorkerWatch

if TYPE_CHECKING:
    from ..models.model import Model
    from .gateway.server import Gateway as GatewayService

log = logging.getLogger("kvsluice.cluster")

Actor = Any  # Ray's handles make their methods up at run time

NAMESPACE = "kvsluice"
CONTROLLER = "Controller"
WORKER_HOST = "127.0.0.1"  # all processes of this fleet run on one machine
WATCH_PERIOD_S = 1.0
SHUTDOWN_S = 15.0
REBIND_S = 5.0


class Controller:
    """Keeps the membership. Async: a gateway's long poll holds nobody up."""

    def __init__(self) -> None:
        self._table = MembershipTable()

    async def register(self, member: Member) -> None:
        await self._table.register(member)

    async def view(self) -> View:
        return self._table.view()

    async def watch(self, after: int, timeout_s: float) -> View:
        return await self._table.watch(after, timeout_s)


class RayMembership:
    """Membership as the controller has it."""

    def __init__(self, controller: Actor) -> None:
        self._controller = controller

    async def watch(self, after: int, timeout_s: float) -> View:
        try:
            view: View = await self._controller.watch.remote(after, timeout_s)
        except RayError as exc:
            raise WorkerLost("the controller is gone") from exc
        return view


class Host:
    """An actor that hosts services. Never raises on start: the driver asks `status` and gets the typed error. One that
    takes another's place and fails ends soon after, so that Ray tries again."""

    def __init__(self, config_json: str, worker_id: str) -> None:
        forget_source_tree()
        self._config = ServeConfig.from_json(config_json)
        configure_logging(self._config.log_level)
        self._worker_id = worker_id
        self._controller = ray.get_actor(CONTROLLER, NAMESPACE)
        self._loop = LoopThread(f"{worker_id}-loop")
        self._status = {"pid": str(os.getpid())}
        try:
            self._status["address"] = self._start()
        except Exception as exc:
            error = exc if isinstance(exc, KvsluiceError) else InternalError(f"it cannot start: {where(exc)}")
            self._status |= {"error_type": type(error).__name__, "message": error.message}
            if self._predecessor() is not None:
                log.error("%s cannot start again and will be tried once more: %s", worker_id, error.message)
                end_later()

    def status(self) -> dict[str, str]:
        """`pid`, and `address` or `error_type` and `message` of the error that kept it from starting."""
        return self._status

    def _start(self) -> str:
        raise NotImplementedError

    def _predecessor(self) -> str | None:
        """Where the one before it served, for an actor that was restarted."""
        view: Any = ray.get(self._controller.view.remote())
        return next((m.address for m in view.members if m.worker_id == self._worker_id), None)

    def _register(self, role: Role, address: str) -> None:
        member = Member(self._worker_id, role, address, uuid.uuid4().hex)
        ray.get(self._controller.register.remote(member))


class Worker(Host):
    """Hosts prefill, decode or both over one model."""

    roles: tuple[Role, ...] = ()

    def _start(self) -> str:
        # torch is loaded here, in the worker, and not in the driver or the gateway
        from ..models.loader import load_model

        config = self._config
        model = load_model(
            config.model,
            dtype=compute_dtype(config.dtype),
            device=config.device,
            random_weights=config.random_weights,
            seed=config.seed or 0,
        )
        self._worker = WorkerHost(self._services(model), config.max_frame_bytes)
        address = self._loop.run(self._worker.start(WORKER_HOST))
        for role in self.roles:
            self._register(role, address)
        return address

    def _services(self, model: Model) -> list[WorkerService]:
        from ..models.profiles import load_profile
        from .decode.server import make_decode_service
        from .prefill.server import make_prefill_service

        config = self._config
        shape = model_shape(model.config)
        check_fit(config, shape)
        identity = WorkerIdentity(
            worker_id=self._worker_id,
            role="both" if len(self.roles) > 1 else self.roles[0],
            model=config.model_name,
            model_fingerprint=model.fingerprint,
            vocab_size=model.config.vocab_size,
            shape=shape,
            profile=load_profile(config.model, shape),
        )
        makers: dict[Role, Callable[..., WorkerService]] = {
            "prefill": make_prefill_service,
            "decode": make_decode_service,
        }
        return [makers[role](model, config, identity, on_crash=end_process) for role in self.roles]


class PrefillWorker(Worker):
    """Runs prompts."""

    roles = ("prefill",)


class DecodeWorker(Worker):
    """Generates."""

    roles = ("decode",)


class CombinedWorker(Worker):
    """Does both over one copy of the model: the aggregated mode."""

    roles = ("prefill", "decode")


class Gateway(Host):
    """Hosts the generate API. A restarted one listens where its predecessor did."""

    _gateway: GatewayService

    def _start(self) -> str:
        from ..models.tokenizer import load_tokenizer
        from .gateway.server import Gateway as Service

        config, earlier = self._config, self._predecessor()
        if earlier is not None:
            config = config.model_copy(update={"port": int(earlier.rpartition(":")[2])})
        tokenizer = load_tokenizer(config.model)

        async def start() -> tuple[Service, str]:
            service = Service(config, tokenizer, RayMembership(self._controller))
            return service, await service.start()

        # what died may hold its port a moment longer
        self._gateway, address = self._loop.run(persist(start, ConfigError, REBIND_S if earlier else 0.0))
        self._register("gateway", address)
        return address

    def ready(self) -> bool:
        """Whether a request would be served now."""
        return self._gateway.ready

    def stop(self, grace_s: float) -> None:
        """Refuse new requests, let running ones finish, stop listening."""
        self._loop.run(self._gateway.stop(grace_s))


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
        self.address = ""

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
                    self.address = status["address"]
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
