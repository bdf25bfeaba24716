"""The gRPC generate API: `kvsluice.v1.Generation`, health and reflection."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
import uuid
from asyncio import CancelledError, Task
from collections.abc import Callable
from typing import Any, Protocol

from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ... import __version__
from ...compression.recipe import recipe_names
from ...errors import (
    DeadlineExceeded,
    DuplicateRequest,
    InvalidRequest,
    KvsluiceError,
    Overloaded,
    RequestCancelled,
    UnknownModel,
    WorkerLost,
)
from ...protos import generation_pb2 as pb
from ...protos import generation_pb2_grpc
from ..config import ServeConfig
from ..rpc import bind, current_request_id, join_address, make_server
from ..telemetry import GatewayMetrics, NullRecorder, Recorder
from ..validation import CheckedRequest, ServedModel, check_input_size, check_prompt, check_request
from .admission import Admission
from .call import Call
from .failover import RetryBudget
from .job import Epochs, Job, Ticket
from .links import WorkerModel
from .membership import Membership
from .pool import WorkerPool
from .sessions import Sessions, Turn, TurnTokenizer

log = logging.getLogger("kvsluice.gateway")

SERVICE = "kvsluice.v1.Generation"
MAX_TOKENIZING = 2


class Tokenizer(TurnTokenizer, Protocol):
    """What the gateway needs of `models.tokenizer.Tokenizer`."""

    @property
    def has_chat_template(self) -> bool: ...

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> list[int]: ...


class Gateway(generation_pb2_grpc.GenerationServicer):
    """Serves the generate API over a pool of workers.

    Args:
        config: the process's configuration.
        tokenizer: the served model's.
        membership: where the workers are learnt from.
    """

    def __init__(
        self,
        config: ServeConfig,
        tokenizer: Tokenizer,
        membership: Membership,
        recorder: Recorder | None = None,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._recorder = recorder or NullRecorder()
        self.metrics = GatewayMetrics(config.model_name)
        self.pool = WorkerPool(membership, config)
        self._admission = Admission(config.max_num_seqs * config.decode_workers, config.max_queue)
        self._epochs = Epochs()
        self._retries = RetryBudget(config.retries_per_minute, time.monotonic)
        self.sessions = Sessions(config.session_ttl_s, config.store_url is not None)
        self._tickets: dict[str, Ticket] = {}
        self._tokenizing = asyncio.Semaphore(MAX_TOKENIZING)
        self._draw_seed = _seed_source(config.seed)
        self._draining = False
        self._num_early = 0  # requests that wait for the first workers
        self._idle = asyncio.Event()
        self._idle.set()
        self._health = health.aio.HealthServicer()
        self._health_task: Task[None] | None = None
        self._server = make_server(config.max_message_bytes)

    async def start(self) -> str:
        """Listen. Returns the address, host:port. Raises `ConfigError` where it cannot listen."""
        generation_pb2_grpc.add_GenerationServicer_to_server(self, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        await self._health.set(SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
        port = bind(self._server, self._config.host, self._config.port)
        await self._server.start()
        self.pool.start()
        self._health_task = asyncio.create_task(self._follow_health(), name="health")
        return join_address(self._config.host, port)

    @property
    def ready(self) -> bool:
        """Whether requests would be served now."""
        return self.pool.ready and not self._draining

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._tickets)

    async def drain(self, grace_s: float) -> bool:
        """Take no more requests, let the running ones finish. Returns whether all did within the time."""
        self._draining = True
        await self._health.set(SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        except TimeoutError:
            pass
        return not self._tickets

    async def stop(self, grace_s: float = 0.0) -> None:
        """Drain, end what is left with an error, and stop listening."""
        if not await self.drain(grace_s):
            for ticket in list(self._tickets.values()):
                ticket.interrupt(WorkerLost("the service was stopped before the request was finished"))
            await self.drain(1.0)
        if self._health_task is not None:
            self._health_task.cancel()
            with contextlib.suppress(CancelledError):
                await self._health_task
        await self._server.stop(0.5)
        await self.pool.stop()
        await self.sessions.close()

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        """See `generation.proto`."""
        accepted_s = time.monotonic()
        if self._draining:
            raise WorkerLost("the service is shutting down")
        remaining = context.time_remaining()
        allowed_s = self._config.default_deadline_s if remaining is None else remaining
        try:
            async with asyncio.timeout(allowed_s):
                await self._generate(request, context, accepted_s, accepted_s + allowed_s)
        except TimeoutError:
            self.metrics.failed(DeadlineExceeded.__name__)
            raise DeadlineExceeded(f"not finished within {allowed_s:.3g} s") from None
        except KvsluiceError as exc:
            self.metrics.failed(exc.type_name)
            raise

    async def Cancel(self, request: pb.CancelRequest, context: Any) -> pb.CancelResponse:
        """See `generation.proto`."""
        ticket = self._tickets.get(request.request_id)
        if ticket is not None:
            ticket.interrupt(RequestCancelled("the request was cancelled"))
        return pb.CancelResponse(found=ticket is not None)

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Any) -> pb.GetModelInfoResponse:
        """See `generation.proto`."""
        if request.model and request.model != self._config.model_name:
            raise UnknownModel(f"model: {request.model[:64]!r} is not served here; allowed: {self._config.model_name}")
        model = self.pool.model or await self._first_model()
        served = self._served(model)
        return pb.GetModelInfoResponse(
            model=served.name,
            fingerprint=model.fingerprint,
            max_model_len=served.max_model_len,
            vocab_size=served.vocab_size,
            recipes=recipe_names(),
            default_recipe=served.default_recipe,
            version=__version__,
        )

    async def ListSessions(self, request: pb.ListSessionsRequest, context: Any) -> pb.ListSessionsResponse:
        """See `generation.proto`."""
        return pb.ListSessionsResponse(sessions=await self.sessions.all())

    async def DeleteSession(self, request: pb.DeleteSessionRequest, context: Any) -> pb.DeleteSessionResponse:
        """See `generation.proto`."""
        if not request.session_id:
            raise InvalidRequest("session_id", "is empty", "the id of a session")
        return pb.DeleteSessionResponse(found=await self.sessions.delete(request.session_id))

    async def _generate(self, request: pb.GenerateRequest, context: Any, accepted_s: float, deadline_s: float) -> None:
        current_request_id.set(request.request_id)
        served = self._served(self.pool.model or await self._first_model())
        checked = check_request(request, served, self._draw_seed)
        request_id = checked.request_id or uuid.uuid4().hex
        current_request_id.set(request_id)
        if request_id in self._tickets:
            raise DuplicateRequest("request_id: a request with this id is running")
        task = asyncio.current_task()
        assert task is not None
        ticket = self._tickets[request_id] = Ticket(request_id, task)
        self._idle.clear()
        try:
            with ticket.interruptible(), self.sessions.running(checked.session_id):
                if checked.token_ids is None:
                    check_input_size(checked, served)
                else:
                    check_prompt(checked, len(checked.token_ids), served)
                # tokenizing costs time, so it waits for room, too, and a full queue refuses at once
                async with self._admission.slot(checked.sampling.n, deadline_s - time.monotonic()):
                    job = await self._job(request_id, checked, served, accepted_s, deadline_s)
                    await self._run(job, context.write)
        finally:
            del self._tickets[request_id]
            if not self._tickets:
                self._idle.set()
            self._report_load()

    async def _first_model(self) -> WorkerModel:
        """Of the first workers, waited for by as many requests as may wait for room: nothing is known of them yet.

        Raises:
            Overloaded: more do. WorkerLost: no workers come.
        """
        if self._num_early >= max(1, self._config.max_queue):
            raise Overloaded(f"no workers are there yet, and {self._num_early} requests wait for them")
        self._num_early += 1
        try:
            return (await self.pool.route()).model
        finally:
            self._num_early -= 1

    async def _job(
        self, request_id: str, checked: CheckedRequest, served: ServedModel, accepted_s: float, deadline_s: float
    ) -> Job:
        turn = None if checked.session_id is None else await self.sessions.turn(checked)
        if turn is None or turn.session is None:
            prompt_ids, history_ids = await self._tokenize(checked), tuple[int, ...]()
        else:
            assert self.pool.model is not None
            turn.check_model(self.pool.model.fingerprint)
            prompt_ids = list(turn.session.prompt_ids)
            history_ids = (*turn.session.history_ids, *await self._tokenize(checked, turn))
        sampling = check_prompt(checked, len(prompt_ids) + len(history_ids), served)
        return Job(
            request_id, checked, tuple(prompt_ids), sampling, accepted_s, deadline_s, history_ids=history_ids, turn=turn
        )

    async def _run(self, job: Job, write: Callable[[pb.GenerateResponse], Any]) -> None:
        self._report_load()
        call = Call(
            job,
            write,
            pool=self.pool,
            tokenizer=self._tokenizer,
            sessions=self.sessions,
            config=self._config,
            epochs=self._epochs,
            budget=self._retries,
            metrics=self.metrics,
            recorder=self._recorder,
        )
        await call.run()

    async def _tokenize(self, checked: CheckedRequest, turn: Turn | None = None) -> list[int]:
        if checked.token_ids is not None:
            return list(checked.token_ids)
        async with self._tokenizing:
            # long texts take a second or more, and the tokenizer lets other threads run meanwhile
            if turn is not None:
                return await asyncio.to_thread(turn.new_ids, checked, self._tokenizer)
            if checked.messages is not None:
                return await asyncio.to_thread(self._tokenizer.apply_chat_template, list(checked.messages))
            return await asyncio.to_thread(self._tokenizer.encode, checked.prompt or "", True)

    def _served(self, model: WorkerModel) -> ServedModel:
        limit = model.shape.max_position_embeddings
        return ServedModel(
            name=self._config.model_name,
            vocab_size=model.vocab_size,
            max_model_len=min(limit, self._config.max_model_len or limit),
            max_new_tokens=self._config.max_new_tokens,
            default_recipe=self._config.default_recipe,
            has_chat_template=self._tokenizer.has_chat_template,
            has_store=self.pool.has_store,
            has_sessions=self.sessions.available,
            default_durability=self._config.durability,
        )

    def _report_load(self) -> None:
        self.metrics.load(self._admission.num_running, self._admission.num_waiting)

    async def _follow_health(self) -> None:
        status = health_pb2.HealthCheckResponse
        while True:
            # taken before the look, so that no change falls between look and wait
            changed = self.pool.changed
            await self._health.set(SERVICE, status.SERVING if self.ready else status.NOT_SERVING)
            await changed.wait()


def _seed_source(seed: int | None) -> Callable[[], int]:
    """Seeds for requests that bring none: a fixed sequence where the service has a seed."""
    source = random.SystemRandom() if seed is None else random.Random(seed)
    return lambda: source.getrandbits(63)
