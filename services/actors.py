"""The hosts of a fleet's services, as actors on Ray.

    PrefillWorker, DecodeWorker    one process each (or CombinedWorker: both roles in one), restarted when they die
    Gateway                        the generate API

Each actor hosts its service on an event loop of its own; tokens and KV go from process to process over gRPC and never
through Ray. An actor tells the controller every few seconds where it serves and what it has to do; a restarted one
comes back serving at a new address.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import ray
from ray.exceptions import RayError

from .. import __version__
from ..errors import ConfigError, InternalError, KvsluiceError, StoreUnavailable
from .config import ServeConfig
from .fleet.report import GatewaySight, Load, Report
from .gateway.membership import Role, View
from .lifecycle import AccountableService, LoopThread, WorkerHost, end_later, end_process, persist
from .metrics.worker import Watched, WorkerMetrics
from .model_shape import model_shape
from .processes import forget_source_tree
from .ranks import load_parallel_model
from .ray_metrics import mirror
from .security import FleetSecurity, with_fleet_tokens
from .telemetry import configure_logging, where
from .tracing import configure_tracing
from .worker import WorkerIdentity, check_fit, check_profile

if TYPE_CHECKING:
    from ..kvstore.store import Store
    from ..models.model import Model
    from .gateway.server import Gateway as GatewayService

log = logging.getLogger("kvsluice.cluster")

Actor = Any  # Ray's handles make their methods up at run time

CONTROLLER = "Controller"
REPORTS_PER_LEASE = 4
MOST_REPORT_S = 2.0
CONTROLLER_PAUSE_S = 1.0
REBIND_S = 5.0
STORE_PAUSE_S = 5.0


@dataclass(frozen=True)
class HostSpec:
    """What a host is told beside its configuration.

    Attributes:
        worker_id: its name, also that of the actor.
        namespace: the fleet's.
        lease_s: it reports several times in so long.
        own_host: a gateway listens on its node's own address, whatever that is; workers always do.
    """

    worker_id: str
    namespace: str
    lease_s: float = 30.0
    own_host: bool = False

    @property
    def number(self) -> int:
        """Which one of its group it is."""
        return int(self.worker_id.rpartition("-")[2])


class RayMembership:
    """Membership as the controller has it, over the controller's restarts.

    Args:
        find: the controller as it is known now.
    """

    def __init__(self, find: Callable[[], Actor]) -> None:
        self._find = find

    async def watch(self, after: int, timeout_s: float) -> View:
        while True:
            try:
                view: View = await (await asyncio.to_thread(self._find)).watch.remote(after, timeout_s)
                return view
            except (RayError, ValueError) as exc:
                # the fleet as last known goes on working; whoever runs the service decides what a lost controller means
                log.warning("the controller cannot be asked: %s", type(exc).__name__)
            await asyncio.sleep(CONTROLLER_PAUSE_S)


class Host:
    """An actor that hosts services. Never raises on start: the driver asks `status` and gets the typed error. One that
    takes another's place and fails ends soon after, so that Ray tries again."""

    roles: tuple[Role, ...] = ()

    def __init__(self, config_json: str, spec: HostSpec) -> None:
        forget_source_tree()
        self._config = ServeConfig.from_json(config_json)
        assert self._config.fleet_tokens or self._config.fleet_token_file, "whoever starts a fleet gives it a token"
        self._spec, self._worker_id = spec, spec.worker_id
        configure_logging(self._config.log_level, self._config.log_format, self._worker_id)
        configure_tracing(self._config, self._worker_id)
        self._loop = LoopThread(f"{self._worker_id}-loop")
        self._status = {"pid": str(os.getpid())}
        self._node: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._report = Report(
            worker_id=self._worker_id,
            incarnation=uuid.uuid4().hex,
            roles=self.roles,
            address="",
            node=self._node,
            pid=os.getpid(),
            model=self._config.model_name,
            max_num_seqs=self._config.max_num_seqs,
            package=__version__,
        )
        try:
            self._config = with_fleet_tokens(self._config)
            self._status["address"] = self._start()
            self._report = replace(self._report, address=self._status["address"])
        except Exception as exc:
            error = exc if isinstance(exc, KvsluiceError) else InternalError(f"it cannot start: {where(exc)}")
            self._status |= {"error_type": error.type_name, "message": error.message}
            self._report = replace(self._report, error=error.message, error_type=error.type_name)
            if self._predecessor() is not None:
                log.error("%s cannot start again and will be tried once more: %s", self._worker_id, error.message)
                end_later()
        self._loop.spawn(self._keep_reporting())

    def status(self) -> dict[str, str]:
        """`pid`, and `address` or `error_type` and `message` of the error that kept it from starting."""
        return self._status

    def stop(self, grace_s: float) -> None:
        """Stop serving. A gateway refuses new requests and lets running ones finish first."""
        raise NotImplementedError

    def _start(self) -> str:
        raise NotImplementedError

    async def _account(self) -> Report:
        """The report, with what there is to do now."""
        raise NotImplementedError

    def _controller(self) -> Actor:
        return ray.get_actor(CONTROLLER, self._spec.namespace)

    def _predecessor(self) -> Report | None:
        """The last report of the one before it, for an actor that was restarted. A node that is lost may take the
        controller along, and Ray does not start an actor again that could not be made: its return is waited for."""
        until_s = time.monotonic() + self._config.start_timeout_s
        while True:
            try:
                earlier: Report | None = ray.get(self._controller().predecessor.remote(self._worker_id))
                return earlier
            except (RayError, ValueError) as exc:
                if time.monotonic() > until_s:
                    raise
                log.warning("%s cannot ask the controller: %s", self._worker_id, type(exc).__name__)
            time.sleep(CONTROLLER_PAUSE_S)

    async def _keep_reporting(self) -> None:
        """Give the controller signs of life, until it says that this process does not belong to the fleet."""
        pause_s = min(MOST_REPORT_S, self._spec.lease_s / REPORTS_PER_LEASE)
        while True:
            try:
                report = self._report if self._report.error else await self._account()
                if not await (await asyncio.to_thread(self._controller)).report.remote(report):
                    log.error("%s has been given up by the controller and ends", self._worker_id)
                    os._exit(1)
            except (RayError, ValueError) as exc:
                log.warning("%s cannot report to the controller: %s", self._worker_id, type(exc).__name__)
            except Exception as exc:  # no report is lost for good by one that fails
                log.error("%s cannot give an account of itself: %s", self._worker_id, where(exc))
            await asyncio.sleep(pause_s)

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


class Worker(Host):
    """Hosts prefill, decode or both over one model. Listens on its node's address."""

    @property
    def _role(self) -> str:
        return "both" if len(self.roles) > 1 else self.roles[0]

    def _start(self) -> str:
        config = self._config
        # torch is loaded here, in the worker, and not in the driver or the gateway
        model, self._children = load_parallel_model(config, self._role, self._node)
        self._metrics = WorkerMetrics(config.model_name, self._worker_id, self._role)
        self._metrics.watch_gpu(model.device)
        store = self._loop.run(self._open_store()) if "decode" in self.roles else None
        services = self._serving = self._services(model, store)
        self._worker = WorkerHost(services, config.max_frame_bytes, FleetSecurity.of(config))
        # what died may hold its port a moment longer
        again_s = REBIND_S if self._predecessor() else 0.0
        start = partial(self._worker.start, self._node, config.worker_port)
        address = self._loop.run(persist(start, ConfigError, again_s))
        if store is None and config.store is not None and "decode" in self.roles:
            decode: Any = services[-1]
            self._loop.spawn(self._use_store_later(lambda late: decode.use_store(self._metrics.measured(late))))
        metrics_port = self._metrics.serve(config, self._node)
        if metrics_port is not None:
            self._status["metrics_port"] = str(metrics_port)
        mirror(self._metrics.registry)
        return address

    def stop(self, grace_s: float) -> None:
        """See `Host`."""
        if self._children is None:
            self._loop.run(self._worker.stop(grace_s))
            return
        with self._children.ending():
            self._loop.run(self._worker.stop(grace_s))

    async def _account(self) -> Report:
        load: dict[str, int] = {}
        for service in self._serving:
            info = service.account()
            for name in Load.__dataclass_fields__:
                load[name] = load.get(name, 0) + getattr(info, name)
        return replace(self._report, load=Load(**load))

    def _services(self, model: Model, store: Store | None) -> list[AccountableService]:
        from ..models.profiles import load_profile
        from .decode.server import make_decode_service
        from .prefill.server import make_prefill_service

        config = self._config
        shape = model_shape(model.whole)
        check_fit(config, shape)
        profile = load_profile(config.model, shape, config.profile)
        check_profile(profile, shape)
        identity = WorkerIdentity(
            worker_id=self._worker_id,
            role=self._role,
            model=config.model_name,
            model_fingerprint=model.fingerprint,
            vocab_size=model.config.vocab_size,
            shape=shape,
            profile=profile,
        )
        makers: dict[Role, Callable[..., Any]] = {
            "prefill": make_prefill_service,
            "decode": partial(make_decode_service, store=None if store is None else self._metrics.measured(store)),
        }
        recorder = self._metrics.recorder()
        services = [
            makers[role](model, config, identity, on_crash=end_process, recorder=recorder) for role in self.roles
        ]
        for service in services:
            self._metrics.watch(cast(Watched, service))
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

    roles = ("gateway",)
    _gateway: GatewayService

    def _start(self) -> str:
        from ..models.tokenizer import load_tokenizer
        from .gateway.server import Gateway as Service

        config, earlier = self._config, self._predecessor()
        if self._spec.own_host:
            # checked again: an address that others reach wants more than loopback does
            config = ServeConfig.model_validate(config.model_dump() | {"host": self._node})
        if earlier is not None:
            config = config.model_copy(update=_ports(earlier))
        tokenizer = load_tokenizer(config.model)

        async def start() -> tuple[Service, str]:
            service = Service(config, tokenizer, RayMembership(self._controller), number=self._spec.number)
            return service, await service.start()

        # what died may hold its port a moment longer
        self._gateway, address = self._loop.run(persist(start, ConfigError, REBIND_S if earlier else 0.0))
        store = self._loop.run(self._open_store())
        if store is not None:
            self._gateway.sessions.use_store(store)
        elif config.store is not None:
            self._loop.spawn(self._use_store_later(self._gateway.sessions.use_store))
        mirror(self._gateway.metrics.registry)
        self._status["http_address"] = self._gateway.http_address or ""
        self._report = replace(self._report, http_address=self._status["http_address"])
        return address

    async def _account(self) -> Report:
        gateway, admission = self._gateway, self._gateway.intake.admission
        sight = GatewaySight(
            generation=gateway.pool.generation,
            uses=dict(gateway.pool.uses),
            queue_s=gateway.pool.wait_s,
            admission_s=gateway.admission_wait_s,
            ready=gateway.ready,
        )
        return replace(self._report, load=Load(admission.num_running, admission.num_waiting), sight=sight)

    def ready(self) -> bool:
        """Whether a request would be served now."""
        return self._gateway.ready

    def stop(self, grace_s: float) -> None:
        """See `Host`."""
        self._loop.run(self._gateway.stop(grace_s))


def _ports(earlier: Report) -> dict[str, int]:
    """Settings by which a gateway listens where its predecessor did."""
    addresses = {"port": earlier.address, "http_port": earlier.http_address}
    return {key: int(address.rpartition(":")[2]) for key, address in addresses.items() if address}
