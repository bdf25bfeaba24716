"""The actors of a fleet on Ray: the controller, and the hosts of the services.

    Controller (named, detached)   membership with generation numbers
    PrefillWorker, DecodeWorker    one process each (or CombinedWorker: both roles in one), restarted when they die
    Gateway                        the generate API

Each actor hosts its service on an event loop of its own; tokens and KV go from process to process over gRPC and never
through Ray. A restarted actor comes back serving, at a new address that it registers with the controller.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import uuid
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from ..errors import ConfigError, InternalError, KvsluiceError, StoreUnavailable, WorkerLost
from .config import ServeConfig
from .gateway.membership import Member, MembershipTable, Role, View
from .lifecycle import LoopThread, WorkerHost, WorkerService, end_later, end_process, persist
from .metrics.worker import WorkerMetrics
from .model_shape import model_shape
from .processes import forget_source_tree
from .ray_metrics import mirror
from .security import FleetSecurity
from .telemetry import configure_logging, where
from .worker import WorkerIdentity, check_fit, compute_dtype

if TYPE_CHECKING:
    from ..kvstore.store import Store
    from ..models.model import Model
    from .gateway.server import Gateway as GatewayService

log = logging.getLogger("kvsluice.cluster")

Actor = Any  # Ray's handles make their methods up at run time

NAMESPACE = "kvsluice"
CONTROLLER = "Controller"
WORKER_HOST = "127.0.0.1"  # all processes of this fleet run on one machine
REBIND_S = 5.0
STORE_PAUSE_S = 5.0


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
        assert self._config.fleet_tokens, "whoever starts a fleet gives its processes a token"
        configure_logging(self._config.log_level, self._config.log_format, worker_id)
        self._worker_id = worker_id
        self._controller = ray.get_actor(CONTROLLER, NAMESPACE)
        self._loop = LoopThread(f"{worker_id}-loop")
        self._status = {"pid": str(os.getpid())}
        try:
            self._status["address"] = self._start()
        except Exception as exc:
            error = exc if isinstance(exc, KvsluiceError) else InternalError(f"it cannot start: {where(exc)}")
            self._status |= {"error_type": error.type_name, "message": error.message}
            if self._predecessor() is not None:
                log.error("%s cannot start again and will be tried once more: %s", worker_id, error.message)
                end_later()

    def status(self) -> dict[str, str]:
        """`pid`, and `address` or `error_type` and `message` of the error that kept it from starting."""
        return self._status

    def _start(self) -> str:
        raise NotImplementedError

    def _predecessor(self) -> Member | None:
        """The one before it, for an actor that was restarted."""
        view: Any = ray.get(self._controller.view.remote())
        return next((m for m in view.members if m.worker_id == self._worker_id), None)

    async def _open_store(self) -> Store | None:
        """The store that the configuration names; None where there is none, or none now: a worker that takes another's
        place serves without, rather than not at all.

        Raises:
            ConfigError: it is not to be had as configured. StoreUnavailable: it is not there.
        """
        config = self._config.store
        if config is None:
            return None
        from ..kvstore.opening import open_store

        try:
            return await open_store(config)
        except StoreUnavailable as exc:
            if await asyncio.to_thread(self._predecessor) is None:
                raise
            log.error("%s serves without its store until that is there again: %s", self._worker_id, exc.message)
            return None

    async def _use_store_later(self, use: Callable[[Store], None]) -> None:
        from ..kvstore.opening import open_store

        config = self._config.store
        assert config is not None, "there is one to wait for"
        use(await persist(lambda: open_store(config), StoreUnavailable, math.inf, STORE_PAUSE_S))
        log.info("%s has its store again", self._worker_id)

    def _register(self, role: Role, address: str, **more: str) -> None:
        member = Member(self._worker_id, role, address, uuid.uuid4().hex, **more)
        ray.get(self._controller.register.remote(member))


class Worker(Host):
    """Hosts prefill, decode or both over one model."""

    roles: tuple[Role, ...] = ()

    @property
    def _role(self) -> str:
        return "both" if len(self.roles) > 1 else self.roles[0]

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
        self._metrics = WorkerMetrics(config.model_name, self._worker_id, self._role)
        self._metrics.watch_gpu(model.device)
        store = self._loop.run(self._open_store()) if "decode" in self.roles else None
        services = self._services(model, store)
        self._worker = WorkerHost(services, config.max_frame_bytes, FleetSecurity.of(config))
        address = self._loop.run(self._worker.start(WORKER_HOST, config.worker_port))
        if store is None and config.store is not None and "decode" in self.roles:
            decode: Any = services[-1]
            self._loop.spawn(self._use_store_later(lambda late: decode.use_store(self._metrics.measured(late))))
        metrics_port = self._metrics.serve(config, WORKER_HOST)
        if metrics_port is not None:
            self._status["metrics_port"] = str(metrics_port)
        mirror(self._metrics.registry)
        for role in self.roles:
            self._register(role, address)
        return address

    def _services(self, model: Model, store: Store | None) -> list[WorkerService]:
        from ..models.profiles import load_profile
        from .decode.server import make_decode_service
        from .prefill.server import make_prefill_service

        config = self._config
        shape = model_shape(model.config)
        check_fit(config, shape)
        identity = WorkerIdentity(
            worker_id=self._worker_id,
            role=self._role,
            model=config.model_name,
            model_fingerprint=model.fingerprint,
            vocab_size=model.config.vocab_size,
            shape=shape,
            profile=load_profile(config.model, shape),
        )
        makers: dict[Role, Callable[..., WorkerService]] = {
            "prefill": make_prefill_service,
            "decode": partial(make_decode_service, store=None if store is None else self._metrics.measured(store)),
        }
        recorder = self._metrics.recorder()
        services = [
            makers[role](model, config, identity, on_crash=end_process, recorder=recorder) for role in self.roles
        ]
        for service in services:
            self._metrics.watch(service)
        return services


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
            config = config.model_copy(update=_ports(earlier))
        tokenizer = load_tokenizer(config.model)

        async def start() -> tuple[Service, str]:
            service = Service(config, tokenizer, RayMembership(self._controller))
            return service, await service.start()

        # what died may hold its port a moment longer
        self._gateway, address = self._loop.run(persist(start, ConfigError, REBIND_S if earlier else 0.0))
        store = self._loop.run(self._open_store())
        if store is not None:
            self._gateway.sessions.use_store(store)
        elif config.store is not None:
            self._loop.spawn(self._use_store_later(self._gateway.sessions.use_store))
        mirror(self._gateway.metrics.registry)
        http_address = self._gateway.http_address or ""
        self._status["http_address"] = http_address
        self._register("gateway", address, http_address=http_address)
        return address

    def ready(self) -> bool:
        """Whether a request would be served now."""
        return self._gateway.ready

    def stop(self, grace_s: float) -> None:
        """Refuse new requests, let running ones finish, stop listening."""
        self._loop.run(self._gateway.stop(grace_s))


def _ports(earlier: Member) -> dict[str, int]:
    """Settings by which a gateway listens where its predecessor did."""
    addresses = {"port": earlier.address, "http_port": earlier.http_address}
    return {key: int(address.rpartition(":")[2]) for key, address in addresses.items() if address}
