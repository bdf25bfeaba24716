"""The one way in behind every door: validation, admission, tokenizing, and the call that answers.

A door turns its protocol's requests into `GenerateRequest`s and what is written into its replies; all else is here.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from asyncio import Event
from collections.abc import Callable, Sequence
from typing import Protocol

from ... import __version__
from ...compression.recipe import recipe_names
from ...errors import (
    DeadlineExceeded,
    DuplicateRequest,
    InvalidRequest,
    KvsluiceError,
    Overloaded,
    PermissionDenied,
    RequestCancelled,
    UnknownModel,
    WorkerLost,
)
from ...kvstore.identity import TenantId
from ...protos import generation_pb2 as pb
from ..config import ServeConfig
from ..keys import TenantLimits, no_limits
from ..metrics.gateway import GatewayMetrics
from ..security import Caller, Role, current_caller
from ..telemetry import NullRecorder, Recorder, current_request_id
from ..tracing import current_span, incoming_trace, spanning
from ..validation import CheckedRequest, ServedModel, check_input_size, check_prompt, check_request
from .admission import Admission, AdmissionPolicy, Ask, Held
from .affinity import PromptPrefixes
from .call import Call
from .failover import RetryBudget
from .job import Epochs, Job, Ticket, Write
from .links import WorkerModel
from .membership import Membership
from .pool import WorkerPool
from .sessions import Sessions, Turn, TurnTokenizer

MAX_TOKENIZING = 2


class Tokenizer(TurnTokenizer, Protocol):
    """What the gateway needs of `models.tokenizer.Tokenizer`."""

    @property
    def has_chat_template(self) -> bool: ...

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> list[int]: ...
    def token_bytes(self, token_id: int) -> bytes: ...


class Intake:
    """Takes requests of every door and runs them over a pool of workers.

    Args:
        config: the process's configuration.
        tokenizer: the served model's.
        membership: where the workers are learnt from.

    Attributes:
        pool, sessions, metrics: the gateway's.
        draining: no more requests are taken.
    """

    def __init__(
        self,
        config: ServeConfig,
        tokenizer: Tokenizer,
        membership: Membership,
        recorder: Recorder | None = None,
        number: int = 0,
        limits: Callable[[TenantId], TenantLimits] = no_limits,
    ) -> None:
        self.tokenizer = tokenizer
        self.metrics = GatewayMetrics(config.model_name)
        self.pool = WorkerPool(membership, config)
        self.metrics.follow(self.pool.accounts)
        self.sessions = Sessions(config.session_ttl_s, config.store_url is not None)
        self.admission = Admission(
            AdmissionPolicy(
                config.max_num_seqs * config.decode_workers,
                config.max_queue,
                max_ttft_s=config.max_ttft_s,
                burst_s=config.tenant_burst_s,
                backlog=self.pool.backlog,
            )
        )
        self.pool.on_prefilled = self.admission.go_on
        self._limits = limits
        self.draining = False
        self._config = config
        self._recorder = recorder or NullRecorder()
        self._epochs = Epochs(number)
        self._retries = RetryBudget(config.retries_per_minute, time.monotonic)
        self._tickets: dict[tuple[TenantId, str], Ticket] = {}
        self._tokenizing = asyncio.Semaphore(MAX_TOKENIZING)
        self._draw_seed = _seed_source(config.seed)
        self._num_early = 0  # requests that wait for the first workers
        self._idle = Event()
        self._idle.set()

    @property
    def ready(self) -> bool:
        """Whether requests would be served now."""
        return self.pool.ready and not self.draining

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._tickets)

    async def until_idle(self, within_s: float) -> bool:
        """Wait until no request runs. Returns whether that came within the time."""
        try:
            async with asyncio.timeout(within_s):
                await self._idle.wait()
        except TimeoutError:
            pass
        return not self._tickets

    def interrupt_all(self, error: KvsluiceError) -> None:
        """End every request with an error."""
        for ticket in list(self._tickets.values()):
            ticket.interrupt(error)

    def cancel(self, request_id: str) -> bool:
        """End a request of the caller's tenant. Returns whether it was running."""
        ticket = self._tickets.get((current_caller.get().tenant, request_id))
        if ticket is not None:
            ticket.interrupt(RequestCancelled("the request was cancelled"))
        return ticket is not None

    async def generate(
        self,
        request: pb.GenerateRequest,
        write: Write,
        allowed_s: float | None = None,
        counted: Callable[[int], None] | None = None,
    ) -> None:
        """Run a request in the current task; to cancel that is to cancel the request.

        Args:
            write: takes the request's messages, in order; `complete` is the last one. What it waits for holds the
                request back, and so its choices.
            allowed_s: seconds until its deadline; None = as configured.
            counted: is told the input's tokens before anything is written.

        Raises:
            KvsluiceError: what the request ended with, if `complete` was not written.
        """
        accepted_s = time.monotonic()
        if self.draining:
            raise WorkerLost("the service is shutting down")
        allowed_s = self._config.default_deadline_s if allowed_s is None else allowed_s
        try:
            with spanning("kvsluice.request", incoming_trace.get(), "server"):
                async with asyncio.timeout(allowed_s):
                    await self._generate(request, write, counted, accepted_s, accepted_s + allowed_s)
        except TimeoutError:
            late = DeadlineExceeded(f"not finished within {allowed_s:.3g} s")
            self.metrics.failed(late)
            raise late from None
        except KvsluiceError as exc:
            self.metrics.failed(exc)
            raise

    async def model_info(self, name: str) -> pb.GetModelInfoResponse:
        """What is served. Raises `UnknownModel` where `name` is given and is not the served model's."""
        if name and name != self._config.model_name:
            raise UnknownModel(f"model: {name[:64]!r} is not served here; allowed: {self._config.model_name}")
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

    async def list_sessions(self, tenant: str = "") -> list[pb.SessionInfo]:
        """The sessions of a tenant, by default of the caller's. Raises as `Sessions.all`, and `PermissionDenied`."""
        return await self.sessions.all(_tenant(current_caller.get(), tenant))

    async def delete_session(self, session_id: str, tenant: str = "") -> bool:
        """Delete a session of a tenant, by default of the caller's. Returns whether it was there. Raises as
        `Sessions.delete`, and `PermissionDenied`."""
        if not session_id:
            raise InvalidRequest("session_id", "is empty", "the id of a session")
        return await self.sessions.delete(_tenant(current_caller.get(), tenant), session_id)

    async def _generate(
        self,
        request: pb.GenerateRequest,
        write: Write,
        counted: Callable[[int], None] | None,
        accepted_s: float,
        deadline_s: float,
    ) -> None:
        current_request_id.set(request.request_id)
        served = self._served(self.pool.model or await self._first_model())
        checked = check_request(request, served, self._draw_seed)
        request_id = checked.request_id or uuid.uuid4().hex
        current_request_id.set(request_id)
        current_span.get().set(request_id=request_id, model=served.name, recipe_asked=checked.recipe_name)
        tenant = current_caller.get().tenant
        if (tenant, request_id) in self._tickets:
            raise DuplicateRequest("request_id: a request with this id is running")
        task = asyncio.current_task()
        assert task is not None
        ticket = self._tickets[tenant, request_id] = Ticket(request_id, task)
        self._idle.clear()
        try:
            with ticket.interruptible(), self.sessions.running(tenant, checked.session_id):
                if checked.token_ids is None:
                    check_input_size(checked, served)
                else:
                    check_prompt(checked, len(checked.token_ids), served)
                # tokenizing costs time, so it waits for room, too, and a full queue refuses at once
                known_by = _known_by(tenant, checked)
                async with self.admission.slot(self._ask(tenant, checked, known_by, deadline_s)) as held:
                    held.used_tokens = 0
                    job = await self._job(request_id, checked, known_by, served, accepted_s, deadline_s)
                    if counted is not None:
                        counted(job.num_input_tokens)
                    await self._run(job, write, held)
        finally:
            del self._tickets[tenant, request_id]
            if not self._tickets:
                self._idle.set()
            self._report_load()

    async def _first_model(self) -> WorkerModel:
        """Of the first workers, waited for by as many requests as may wait for room: nothing is known of them yet.

        Raises:
            Overloaded: more do. WorkerLost: no workers come.
        """
        if self._num_early >= max(1, self._config.max_queue):
            problem = f"no workers are there yet, and {self._num_early} requests wait for them"
            raise Overloaded(problem, reason="no_workers")
        self._num_early += 1
        try:
            return (await self.pool.route()).model
        finally:
            self._num_early -= 1

    async def _job(
        self,
        request_id: str,
        checked: CheckedRequest,
        known_by: PromptPrefixes,
        served: ServedModel,
        accepted_s: float,
        deadline_s: float,
    ) -> Job:
        tenant = current_caller.get().tenant
        turn = None if checked.session_id is None else await self.sessions.turn(tenant, checked, self._limits(tenant))
        if turn is None or turn.session is None:
            prompt_ids, history_ids = await self._tokenize(checked), tuple[int, ...]()
            prefixes = [known_by] if known_by.is_tokenized else [_of_ids(tenant, checked, prompt_ids), known_by]
        else:
            assert self.pool.model is not None
            turn.check_model(self.pool.model.fingerprint)
            prompt_ids = list(turn.session.prompt_ids)
            prefixes = [_of_ids(tenant, checked, prompt_ids)]
            history_ids = (*turn.session.history_ids, *await self._tokenize(checked, turn))
        sampling = check_prompt(checked, len(prompt_ids) + len(history_ids), served)
        return Job(
            request_id,
            checked,
            tuple(prompt_ids),
            sampling,
            accepted_s,
            deadline_s,
            history_ids=history_ids,
            turn=turn,
            tenant=tenant,
            prefixes=prefixes,
        )

    def _ask(self, tenant: TenantId, checked: CheckedRequest, known_by: PromptPrefixes, deadline_s: float) -> Ask:
        return Ask(
            num_choices=checked.sampling.n,
            tenant=tenant,
            limits=self._limits(tenant),
            prompt_tokens=known_by.num_tokens,
            # a turn's input may go on behind a prompt that is not known here yet
            saved_tokens=0.0 if checked.session_id is not None else self.pool.saved_tokens(known_by),
            max_tokens=checked.max_tokens,
            remaining_s=deadline_s - time.monotonic(),
        )

    async def _run(self, job: Job, write: Write, held: Held) -> None:
        self._report_load()
        call = Call(
            job,
            write,
            pool=self.pool,
            tokenizer=self.tokenizer,
            sessions=self.sessions,
            config=self._config,
            epochs=self._epochs,
            budget=self._retries,
            metrics=self.metrics,
            recorder=self._recorder,
        )
        try:
            await call.run()
        finally:
            held.used_tokens = call.used_tokens
        self.admission.answered(call.answer_tokens / job.sampling.n)

    async def _tokenize(self, checked: CheckedRequest, turn: Turn | None = None) -> list[int]:
        if checked.token_ids is not None:
            return list(checked.token_ids)
        async with self._tokenizing:
            # long texts take a second or more, and the tokenizer lets other threads run meanwhile
            if turn is not None:
                return await asyncio.to_thread(turn.new_ids, checked, self.tokenizer)
            if checked.messages is not None:
                return await asyncio.to_thread(self.tokenizer.apply_chat_template, list(checked.messages))
            return await asyncio.to_thread(self.tokenizer.encode, checked.prompt or "", True)

    def _served(self, model: WorkerModel) -> ServedModel:
        limit, has_store = model.shape.max_position_embeddings, self._config.store_url is not None
        return ServedModel(
            name=self._config.model_name,
            vocab_size=model.vocab_size,
            max_model_len=min(limit, self._config.max_model_len or limit),
            max_new_tokens=self._config.max_new_tokens,
            default_recipe=self._config.default_recipe,
            has_chat_template=self.tokenizer.has_chat_template,
            # one that cannot be reached now is the service's trouble, not the request's
            has_store=has_store or self.pool.has_store,
            has_sessions=has_store or self.sessions.available,
            default_durability=self._config.durability,
        )

    def _report_load(self) -> None:
        self.metrics.load(self.admission.num_running, self.admission.num_waiting)


def _tenant(caller: Caller, named: str) -> TenantId:
    """Whose sessions a caller means. Raises `PermissionDenied` where they are another's."""
    if named in ("", caller.tenant):
        return caller.tenant
    if caller.role is not Role.ADMIN:
        raise PermissionDenied("tenant: is another one; allowed: the key's own, or a key with the role admin")
    return TenantId(named)


def _known_by(tenant: TenantId, checked: CheckedRequest) -> PromptPrefixes:
    """How a request's input begins; where it is a text that is not tokenized yet, by the text."""
    if checked.token_ids is not None:
        return _of_ids(tenant, checked, checked.token_ids)
    parts = [part for message in checked.messages or () for part in (message["role"], message["content"])]
    text = [checked.prompt] if checked.prompt is not None else ["", *parts]  # what a chat is made into is another text
    return PromptPrefixes.of_text(tenant, checked.recipe.to_json(), text)


def _of_ids(tenant: TenantId, checked: CheckedRequest, prompt_ids: Sequence[int]) -> PromptPrefixes:
    return PromptPrefixes(tenant, checked.recipe.to_json(), prompt_ids)


def _seed_source(seed: int | None) -> Callable[[], int]:
    """Seeds for requests that bring none: a fixed sequence where the service has a seed."""
    source = random.SystemRandom() if seed is None else random.Random(seed)
    return lambda: source.getrandbits(63)
