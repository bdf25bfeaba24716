"""The gateway: its doors, its health, and its end. The gRPC door, `kvsluice.v1.Generation`, is here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from asyncio import CancelledError, Task
from typing import TYPE_CHECKING, Any

from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ...errors import WorkerLost
from ...protos import generation_pb2 as pb
from ...protos import generation_pb2_grpc
from ..config import ServeConfig
from ..keys import KeysFile, no_limits
from ..rpc import bind, join_address, make_server
from ..security import Guard, OpenGuard, check_door, client_tls
from ..telemetry import Recorder
from .intake import Intake, Tokenizer
from .membership import Membership

if TYPE_CHECKING:
    from .http.door import HttpDoor

log = logging.getLogger("kvsluice.gateway")

SERVICE = "kvsluice.v1.Generation"


class Gateway(generation_pb2_grpc.GenerationServicer):
    """Serves the generate API over a pool of workers.

    Args:
        config: the process's configuration.
        tokenizer: the served model's.
        membership: where the workers are learnt from.
        number: of this gateway among those of the fleet.

    Attributes:
        http_address: host:port of the OpenAI API, once it is there; None = it is off.
    """

    def __init__(
        self,
        config: ServeConfig,
        tokenizer: Tokenizer,
        membership: Membership,
        recorder: Recorder | None = None,
        number: int = 0,
    ) -> None:
        self._config = config
        keys = None if config.api_keys_file is None else KeysFile(config.api_keys_file)
        self.guard: Guard = keys or OpenGuard()
        limits = keys.limits if keys else no_limits
        self.intake = Intake(config, tokenizer, membership, recorder, number, limits)
        self.pool, self.sessions, self.metrics = self.intake.pool, self.intake.sessions, self.intake.metrics
        self._health = health.aio.HealthServicer()
        self._health_task: Task[None] | None = None
        self._server = make_server(config.max_message_bytes, self.guard)
        self._http: HttpDoor | None = None
        self.http_address: str | None = None

    async def start(self) -> str:
        """Listen. Returns the address, host:port. Raises `ConfigError` where it cannot, or would serve everybody."""
        # a host may have come from elsewhere than what was checked with the configuration
        check_door(self._config, self._config.host)
        generation_pb2_grpc.add_GenerationServicer_to_server(self, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        await self._health.set(SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
        port = bind(self._server, self._config.host, self._config.port, client_tls(self._config))
        if self._config.http:
            # a gateway without this door needs no web framework
            from .http.door import HttpDoor

            self._http = HttpDoor(self.intake, self._config, self.guard)
            self.http_address = await self._http.start()
        await self._server.start()
        self.pool.start()
        self._health_task = asyncio.create_task(self._follow_health(), name="health")
        return join_address(self._config.host, port)

    @property
    def ready(self) -> bool:
        """Whether requests would be served now."""
        return self.intake.ready

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return self.intake.num_requests

    @property
    def admission_wait_s(self) -> float:
        """How long a request that comes now would wait until it may go to a worker, as far as that is known."""
        return self.intake.admission.wait_s()

    async def drain(self, grace_s: float) -> bool:
        """Take no more requests, let the running ones finish. Returns whether all did within the time."""
        self.intake.draining = True
        await self._health.set(SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
        return await self.intake.until_idle(grace_s)

    async def stop(self, grace_s: float = 0.0) -> None:
        """Drain, end what is left with an error, and stop listening."""
        if not await self.drain(grace_s):
            self.intake.interrupt_all(WorkerLost("the service was stopped before the request was finished"))
            await self.drain(1.0)
        if self._health_task is not None:
            self._health_task.cancel()
            with contextlib.suppress(CancelledError):
                await self._health_task
        if self._http is not None:
            await self._http.stop()
        await self._server.stop(0.5)
        await self.pool.stop()
        await self.sessions.close()

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        """See `generation.proto`."""
        await self.intake.generate(request, context.write, context.time_remaining())

    async def Cancel(self, request: pb.CancelRequest, context: Any) -> pb.CancelResponse:
        """See `generation.proto`."""
        return pb.CancelResponse(found=self.intake.cancel(request.request_id))

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Any) -> pb.GetModelInfoResponse:
        """See `generation.proto`."""
        return await self.intake.model_info(request.model)

    async def ListSessions(self, request: pb.ListSessionsRequest, context: Any) -> pb.ListSessionsResponse:
        """See `generation.proto`."""
        return pb.ListSessionsResponse(sessions=await self.intake.list_sessions(request.tenant))

    async def DeleteSession(self, request: pb.DeleteSessionRequest, context: Any) -> pb.DeleteSessionResponse:
        """See `generation.proto`."""
        return pb.DeleteSessionResponse(found=await self.intake.delete_session(request.session_id, request.tenant))

    async def _follow_health(self) -> None:
        status = health_pb2.HealthCheckResponse
        while True:
            # taken before the look, so that no change falls between look and wait
            changed = self.pool.changed
            if self.pool.max_num_seqs:
                self.intake.admission.resize(self.pool.max_num_seqs)
            await self._health.set(SERVICE, status.SERVING if self.ready else status.NOT_SERVING)
            await changed.wait()
