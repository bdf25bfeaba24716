"""One accepted request: from the workers that are picked for it to its one terminal result."""

from __future__ import annotations

import asyncio
import contextlib
import time
from asyncio import CancelledError, Task
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import grpc

from ...compression.recipe import Resolved
from ...errors import InternalError, InvalidRequest, KvsluiceError, RequestCancelled, WorkerLost
from ...protos import generation_pb2 as pb
from ...protos import worker_pb2 as wpb
from ..config import ServeConfig
from ..rpc import call_error, read_all
from ..telemetry import GatewayMetrics, Recorder
from ..validation import CheckedRequest, choose_recipe
from .choice import Choice, Detokenizer
from .links import Event, Inbox
from .pool import Route, WorkerPool

REPORT_WAIT_S = 2.0
MAX_ATTEMPTS = 3
MAX_CHUNK_TOKENS = 32  # with 20 logprobs each some 32 KiB, which every client takes

_EPOCH_UNIT_NS = 1000


class Epochs:
    """Attempt numbers that only ever grow, across requests and restarts, so that no late frame or token fits again."""

    def __init__(self) -> None:
        self._last = time.time_ns() // _EPOCH_UNIT_NS

    def next(self) -> int:
        self._last += 1
        return self._last


class Ticket:
    """Lets others end the task that works on a request."""

    def __init__(self, request_id: str, task: Task[Any]) -> None:
        self.request_id = request_id
        self.error: KvsluiceError | None = None
        self._task = task

    def interrupt(self, error: KvsluiceError) -> None:
        """End the request with this error, whatever it waits for; the first error counts."""
        if self.error is None:
            self.error = error
            self._task.cancel()

    @contextlib.contextmanager
    def interruptible(self) -> Any:
        """Turn the cancellation that `interrupt` causes into its error."""
        try:
            yield
        except CancelledError:
            if self.error is None:
                raise
            self._task.uncancel()
            raise self.error from None


def public_error(error: KvsluiceError, input_field: str) -> KvsluiceError:
    """A worker's error in the words of the public API: workers know of a prompt's length only."""
    if isinstance(error, InvalidRequest) and error.field == "num_prompt_tokens":
        return type(error)(input_field, error.problem, error.allowed)
    return error


class _NotStarted(Exception):
    """The workers were gone before they began; another attempt repeats nothing."""


@dataclass(frozen=True)
class Job:
    """A validated, tokenized request.

    Attributes:
        accepted_s: monotonic time at which the request arrived.
        deadline_s: monotonic time of its deadline.
    """

    request_id: str
    checked: CheckedRequest
    prompt_ids: tuple[int, ...]
    sampling: wpb.Sampling
    accepted_s: float
    deadline_s: float


Write = Callable[[pb.GenerateResponse], Awaitable[None]]


class Call:
    """Runs a job on a pair of workers and writes its chunks and its `complete` message."""

    def __init__(
        self,
        job: Job,
        ticket: Ticket,
        write: Write,
        *,
        pool: WorkerPool,
        tokenizer: Detokenizer,
        config: ServeConfig,
        epochs: Epochs,
        metrics: GatewayMetrics,
        recorder: Recorder,
    ) -> None:
        self._job = job
        self._ticket = ticket
        self._write = write
        self._pool = pool
        self._config = config
        self._epochs = epochs
        self._metrics = metrics
        self._recorder = recorder
        self._choices = [Choice(i, tokenizer, job.checked.stop, job.sampling.min_tokens) for i in range(job.sampling.n)]
        self._early: list[wpb.TokenEntry] = []
        self._first: wpb.FirstTokens | None = None
        self._first_came = False
        self._first_s = self._last_s = 0.0
        self._shipped = wpb.Shipped()
        self._finished: wpb.Finished | None = None
        self._decoding = False
        self._owed = 0
        self._queue_s = 0.0

    async def run(self) -> None:
        """Work until the `complete` message is written. Raises an error of the tree otherwise."""
        for attempt in range(1, MAX_ATTEMPTS + 1):
            route = await self._pool.route()
            resolved = choose_recipe(
                self._job.checked, len(self._job.prompt_ids), route.model.shape, route.model.profile
            )
            try:
                await self._attempt(route, resolved)
            except _NotStarted as exc:
                if attempt == MAX_ATTEMPTS:
                    raise WorkerLost("the workers were lost before they began") from exc
                # the link notices by itself; until then the same worker would be picked again
                await asyncio.sleep(0.1 * attempt)
                continue
            await self._respond(complete=self._report(route, resolved))
            self._count(route, resolved)
            return

    async def _attempt(self, route: Route, resolved: Resolved) -> None:
        job, epoch = self._job, self._epochs.next()
        inbox = Inbox(self._fail)
        recipe_json = resolved.recipe.to_json()
        self._recorder.record("gateway.attempt", request_id=job.request_id, epoch=epoch)
        try:
            route.decode.open(
                wpb.Open(
                    request_id=job.request_id,
                    epoch=epoch,
                    num_prompt_tokens=len(job.prompt_ids),
                    recipe_json=recipe_json,
                    sampling=job.sampling,
                    credits=self._window,
                ),
                inbox,
            )
        except WorkerLost as exc:
            raise _NotStarted from exc
        try:
            await self._opened(inbox)
            request = wpb.PrefillRequest(
                request_id=job.request_id,
                epoch=epoch,
                prompt_ids=job.prompt_ids,
                recipe_json=recipe_json,
                sampling=job.sampling,
                decode_address=route.decode.member.address,
            )
            await self._prefill_and_stream(route, request, inbox)
        finally:
            route.decode.close(job.request_id, epoch, self._finished is not None)

    @property
    def _window(self) -> int:
        return self._config.stream_credits * len(self._choices)

    async def _opened(self, inbox: Inbox) -> None:
        for event in await inbox.take():
            if not isinstance(event, wpb.Opened):
                raise InternalError("a decode worker answered out of order")

    async def _prefill_and_stream(self, route: Route, request: wpb.PrefillRequest, inbox: Inbox) -> None:
        try:
            call = route.prefill.prefill(request, max(0.001, self._job.deadline_s - time.monotonic()))
        except WorkerLost as exc:
            raise _NotStarted from exc
        reader: Task[None] | None = None
        try:
            await self._accepted(call)
            self._queue_s = time.monotonic() - self._job.accepted_s
            reader = asyncio.create_task(self._read_prefill(call, inbox, route.prefill.called))
            await self._stream(route, request.epoch, inbox)
        finally:
            route.prefill.done(request.request_id, request.epoch)
            if reader is not None:
                reader.cancel()
            call.cancel()

    async def _accepted(self, call: Any) -> None:
        """Wait until the prefill worker has taken the request."""
        await call.initial_metadata()
        if call.done() and await call.code() is not grpc.StatusCode.OK:
            error = await call_error(call)
            if isinstance(error, WorkerLost):
                raise _NotStarted from error
            raise error

    async def _read_prefill(self, call: Any, inbox: Inbox, worker: str) -> None:
        def take(event: wpb.PrefillEvent) -> None:
            kind = event.WhichOneof("event")
            if kind is not None:
                self._first_came |= kind == "first_tokens"
                inbox.post(getattr(event, kind))

        try:
            await read_all(call, take)
            if not self._first_came:
                inbox.fail(InternalError("a prefill worker ended a request without its first tokens"))
        except KvsluiceError as exc:
            # with the first tokens here and the whole sequence at decode, nothing of the prefill worker is needed
            if not (self._first_came and self._decoding):
                # nobody here cancelled it: that is how a worker's end looks when it still had time to say goodbye
                lost = isinstance(exc, (RequestCancelled, WorkerLost))
                inbox.fail(WorkerLost(f"the {worker} was lost while it worked on the request") if lost else exc)

    def _fail(self, error: KvsluiceError) -> None:
        # all that can still come behind the last token is the worker's account of the request
        if not self._ended:
            self._ticket.interrupt(public_error(error, self._job.checked.input_field))

    @property
    def _ended(self) -> bool:
        return all(choice.finish_reason for choice in self._choices)

    async def _stream(self, route: Route, epoch: int, inbox: Inbox) -> None:
        while not self._ended:
            await self._handle(await inbox.take(), route, epoch)
        if not self._decoding and not self._shipped.frames:
            return
        # the worker's account of the request follows its last token at once; an answer is not held back for it
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REPORT_WAIT_S):
                while self._finished is None or not self._shipped.frames:
                    await self._handle(await inbox.take(), route, epoch)

    async def _handle(self, events: list[Event], route: Route, epoch: int) -> None:
        chunks: dict[int, list[pb.Chunk]] = {}
        for event in events:
            if isinstance(event, wpb.FirstTokens):
                self._take_first(event, chunks, route, epoch)
            elif isinstance(event, wpb.Shipped):
                self._shipped = event
            elif isinstance(event, wpb.Finished):
                self._finished = event
            elif isinstance(event, wpb.TokenEntry):
                self._decoding = True
                if self._first is None:
                    self._early.append(event)
                else:
                    self._take_entry(event, chunks, route, epoch)
        for chunk in chain.from_iterable(chunks.values()):
            await self._respond(chunk=chunk)
        if chunks and self._owed >= max(1, self._window // 2):
            route.decode.credit(self._job.request_id, epoch, self._owed)
            self._owed = 0

    def _take_first(self, event: wpb.FirstTokens, chunks: dict[int, list[pb.Chunk]], route: Route, epoch: int) -> None:
        self._first = event
        self._first_s = self._last_s = time.monotonic()
        self._metrics.started(self._queue_s + event.queue_s)
        self._metrics.first_token(self._first_s - self._job.accepted_s)
        route.prefill.done(self._job.request_id, epoch)
        for state in event.choices:
            self._extend(state.index, 0, state.emitted, state.finish_reason, chunks, route, epoch)
        early, self._early = self._early, []
        for entry in early:
            self._take_entry(entry, chunks, route, epoch)

    def _take_entry(self, entry: wpb.TokenEntry, chunks: dict[int, list[pb.Chunk]], route: Route, epoch: int) -> None:
        self._owed += len(entry.tokens)
        now = time.monotonic()
        if entry.tokens:
            self._metrics.next_tokens(now - self._last_s, len(entry.tokens))
        self._last_s = now
        self._extend(entry.choice, entry.first_index, entry.tokens, entry.finish_reason, chunks, route, epoch)

    def _extend(
        self,
        index: int,
        first: int,
        tokens: Any,
        reason: str,
        chunks: dict[int, list[pb.Chunk]],
        route: Route,
        epoch: int,
    ) -> None:
        if index >= len(self._choices):
            raise InternalError("a worker reported a choice that was not asked for")
        choice = self._choices[index]
        if choice.finish_reason:
            # what the worker made before it learned that a stop string had ended the choice
            return
        chunk = choice.extend(first, tokens, reason)
        if choice.finish_reason and not reason:
            route.decode.cancel_choice(self._job.request_id, epoch, index)
        ready = chunks.setdefault(index, [])
        if not ready or len(ready[-1].token_ids) + len(chunk.token_ids) > MAX_CHUNK_TOKENS:
            ready.append(chunk)
            return
        merged = ready[-1]
        merged.text += chunk.text
        merged.token_ids.extend(chunk.token_ids)
        merged.logprobs.extend(chunk.logprobs)
        merged.finish_reason = chunk.finish_reason

    async def _respond(self, **event: Any) -> None:
        await self._write(pb.GenerateResponse(request_id=self._job.request_id, **event))

    def _report(self, route: Route, resolved: Resolved) -> pb.Complete:
        finished = self._finished or wpb.Finished()
        first = self._first or wpb.FirstTokens()
        num_prompt = len(self._job.prompt_ids)
        return pb.Complete(
            choices=[choice.report() for choice in self._choices],
            usage=pb.Usage(prompt_tokens=num_prompt, completion_tokens=sum(c.num_tokens for c in self._choices)),
            recipe=pb.RecipeReport(
                requested=self._job.checked.recipe_name,
                effective=resolved.recipe.name,
                fingerprint=resolved.recipe.fingerprint,
                fallback_reason=resolved.fallback_reason or "",
                handoff_bytes=self._shipped.payload_bytes,
                handoff_bf16_bytes=route.model.shape.bf16_kv_bytes(num_prompt),
                resident_bytes=finished.resident_bytes,
                bytes_read_per_step=finished.bytes_read // max(1, finished.steps),
            ),
            timing=pb.Timing(
                queue_s=self._queue_s + first.queue_s,
                prefill_s=first.prefill_s,
                time_to_first_token_s=self._first_s - self._job.accepted_s,
                decode_s=self._last_s - self._first_s,
            ),
        )

    def _count(self, route: Route, resolved: Resolved) -> None:
        num_prompt = len(self._job.prompt_ids)
        self._metrics.finished(
            self._choices[0].finish_reason,
            time.monotonic() - self._job.accepted_s,
            num_prompt,
            sum(c.num_tokens for c in self._choices),
        )
        self._metrics.handoff(
            resolved.recipe.name, self._shipped.payload_bytes, route.model.shape.bf16_kv_bytes(num_prompt)
        )
        self._metrics.cache_usage(self._pool.cache_usage)
