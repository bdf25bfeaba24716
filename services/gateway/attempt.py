"""One attempt at a request: a pair of workers, from opening it on decode to the last token that it gives."""

from __future__ import annotations

import asyncio
import contextlib
import time
from asyncio import CancelledError, Task
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from ...compression.recipe import Recipe
from ...compression.shared_layers import shared_share
from ...errors import InternalError, KvsluiceError, RequestCancelled, WorkerLost
from ...protos import generation_pb2 as pb
from ...protos import worker_pb2 as wpb
from ..config import ServeConfig
from ..rpc import call_error, is_cancelled, read_all
from ..tracing import current_span
from .answer import Answer
from .failover import Start
from .inbox import Event, Inbox
from .job import Job
from .links import DecodeLink, PrefillLink
from .membership import Member
from .pool import Route
from .waits import saved

REPORT_WAIT_S = 2.0


class Attempt:
    """Runs a job on workers; what they tell goes to the answer.

    Args:
        route: without a prefill worker where `start` needs none.
        recipe: resolved.
        respond: writes a chunk to the client.

    Attributes:
        shipped, finished: the workers' accounts of it, once they have come.
        resumed: how far decode had to go back.
        epoch: its own.
        queried_tokens, cached_tokens: of the prompt that the answer begins with, looked up in shared prefixes and found
            there.
        saved_tokens: what the prompt cost less for it, in tokens that run whole.
        handoff_is_open: a prefill worker has taken the prompt, and decode does not have all of it yet.
    """

    def __init__(
        self,
        job: Job,
        route: Route,
        recipe: Recipe,
        epoch: int,
        start: Start,
        answer: Answer,
        respond: Callable[[pb.Chunk], Awaitable[None]],
        config: ServeConfig,
    ) -> None:
        self.epoch, self.handoff_is_open = epoch, False
        self._job, self._route, self._recipe, self._start = job, route, recipe, start
        self._answer, self._respond, self._config = answer, respond, config
        self._inbox = Inbox()
        self._early: list[wpb.TokenEntry] = []
        self._queue_s = 0.0
        self._owed = 0
        self._decoding = False
        self.shipped = wpb.Shipped()
        self.finished: wpb.Finished | None = None
        self.resumed = wpb.Resumed()
        self.queried_tokens = self.cached_tokens = 0
        self.saved_tokens = 0.0
        self._shared_share = shared_share(recipe, len(job.prompt_ids), route.model.shape.num_layers)

    async def run(self) -> None:
        """Go on until every choice has ended. Raises an error of the tree otherwise."""
        decode, use = self._route.decode, (self._job.sequence_id, self.epoch)
        links = [link for link in (decode, self._route.prefill) if link is not None]
        for link in links:
            link.users.add(use)
        try:
            await self._run(decode)
        except RequestCancelled as exc:
            # nobody here cancelled it: that is how a worker's end looks when it still had time to say goodbye
            raise WorkerLost("a worker was lost while it worked on the request") from exc
        finally:
            for link in links:
                link.users.discard(use)

    async def _run(self, decode: DecodeLink) -> None:
        decode.open(self._open_message(), self._inbox)
        try:
            await self._opened()
            if self._start is Start.RESTORE:
                await self._stream()
            else:
                assert self._route.prefill is not None
                await self._prefill_and_stream(self._route.prefill)
        finally:
            decode.close(self._job.sequence_id, self.epoch, self.finished is not None, keep=bool(self._job.history_ids))

    def blamed(self) -> set[Member]:
        """Who may be at fault where it failed: those that are gone, or all."""
        members = [link for link in (self._route.prefill, self._route.decode) if link is not None]
        return {link.member for link in members if not link.up} or {link.member for link in members}

    def _open_message(self) -> wpb.Open:
        job = self._job
        message = wpb.Open(
            request_id=job.sequence_id,
            epoch=self.epoch,
            tenant=job.tenant,
            num_prompt_tokens=len(job.prompt_ids),
            recipe_json=self._recipe.to_json(),
            sampling=job.sampling,
            credits=self._window,
            sent=self._answer.sent(),
            history_tokens=len(job.history_ids),
            from_store=self._start is Start.RESTORE,
            trace=dict(current_span.get().carrier),
        )
        if job.keeps:
            every = self._config.store_keep_every if job.checked.durability == "tokens" else 0
            end_ttl_s = 0.0 if job.turn is None else self._config.session_ttl_s
            message.keeping.CopyFrom(wpb.Keeping(keep_every=every, end_ttl_s=end_ttl_s))
        return message

    @property
    def _window(self) -> int:
        return self._config.stream_credits * self._job.sampling.n

    async def _opened(self) -> None:
        for event in await self._inbox.take():
            if not isinstance(event, wpb.Opened):
                raise InternalError("a decode worker answered out of order")
        self._answer.opened_s = time.monotonic() - self._job.accepted_s

    async def _prefill_and_stream(self, prefill: PrefillLink) -> None:
        job, epoch = self._job, self.epoch
        request = wpb.PrefillRequest(
            request_id=job.sequence_id,
            epoch=epoch,
            tenant=job.tenant,
            prompt_ids=job.prompt_ids,
            recipe_json=self._recipe.to_json(),
            sampling=job.sampling,
            decode_address=self._route.decode.member.address,
            resumed=self._start is Start.REPLAY,
        )
        remaining_s = max(0.001, job.deadline_s - time.monotonic())
        call = prefill.prefill(request, remaining_s, job.prefixes, self._shared_share)
        reader: Task[None] | None = None
        try:
            await self._inbox.unless_failed(self._accepted(call))
            self._queue_s, self.handoff_is_open = time.monotonic() - job.accepted_s, True
            reader = asyncio.create_task(self._read_prefill(call, prefill))
            await self._stream()
        finally:
            prefill.done(job.sequence_id, epoch)
            if reader is not None:
                reader.cancel()
            call.cancel()

    async def _accepted(self, call: Any) -> None:
        """Wait until the prefill worker has taken the request."""
        try:
            await call.initial_metadata()
        except CancelledError:
            if is_cancelled():
                raise
        if call.done() and await call.code() is not grpc.StatusCode.OK:
            raise await call_error(call)

    async def _read_prefill(self, call: Any, prefill: PrefillLink) -> None:
        first_came = False

        def take(event: wpb.PrefillEvent) -> None:
            nonlocal first_came
            kind = event.WhichOneof("event")
            if kind is not None:
                first_came |= kind == "first_tokens"
                self._inbox.post(getattr(event, kind))

        try:
            await read_all(call, take)
            prefill.users.discard((self._job.sequence_id, self.epoch))  # nothing more is wanted of it
            if not first_came:
                self._inbox.fail(InternalError("a prefill worker ended a request without its first tokens"))
        except KvsluiceError as exc:
            # with the first tokens here and the whole sequence at decode, nothing of the prefill worker is needed
            if not (first_came and self._decoding):
                lost = isinstance(exc, (RequestCancelled, WorkerLost))
                self._inbox.fail(
                    WorkerLost(f"the {prefill.called} was lost while it worked on the request") if lost else exc
                )

    async def _stream(self) -> None:
        while not self._answer.ended:
            await self._handle(await self._inbox.take())
        if not self._decoding and not self.shipped.frames:
            return
        # the worker's account of the request follows its last token at once; an answer is not held back for it, and
        # whatever becomes of the workers now, the answer is whole
        with contextlib.suppress(TimeoutError, KvsluiceError):
            async with asyncio.timeout(REPORT_WAIT_S):
                while self.finished is None or not (self.shipped.frames or self._start is Start.RESTORE):
                    await self._handle(await self._inbox.take())

    async def _handle(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, wpb.FirstTokens):
                self._take_first(event)
            elif isinstance(event, wpb.TokenEntry):
                self._decoding, self.handoff_is_open = True, False
                if self._answer.has_begun or self._job.history_ids:
                    self._take_entry(event)
                else:
                    self._early.append(event)
            elif isinstance(event, wpb.Shipped):
                self.shipped, self.handoff_is_open = event, False
            elif isinstance(event, wpb.Finished):
                self.finished = event
            elif isinstance(event, wpb.Resumed):
                self.resumed = event
        chunks = self._answer.drain()
        for chunk in chunks:
            await self._respond(chunk)
        if chunks and self._owed >= max(1, self._window // 2):
            self._route.decode.credit(self._job.sequence_id, self.epoch, self._owed)
            self._owed = 0

    def _take_first(self, event: wpb.FirstTokens) -> None:
        assert self._route.prefill is not None
        prefill, job = self._route.prefill, self._job
        prefill.first(job.sequence_id, self.epoch, event.cached_tokens)
        if self._answer.has_begun or self._job.history_ids:
            return  # drawn to no end: what was told counts, and what goes before the answer
        self.queried_tokens = len(job.prompt_ids) if prefill.info.prefix_chunk_tokens else 0
        self.cached_tokens, self.saved_tokens = event.cached_tokens, saved(event.cached_tokens * self._shared_share)
        self._answer.begin(event, self._queue_s)
        early, self._early = self._early, []
        for entry in early:
            self._take_entry(entry)

    def _take_entry(self, entry: wpb.TokenEntry) -> None:
        self._owed += len(entry.tokens)
        if self._answer.take(entry):
            self._route.decode.cancel_choice(self._job.sequence_id, self.epoch, entry.choice)
