"""One accepted request: from the workers that are picked for it to its one terminal result."""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import AbstractContextManager
from typing import Any

from ...compression.recipe import Resolved
from ...errors import KvsluiceError, StoreUnavailable, WorkerLost
from ...kvstore.session import Session
from ...protos import generation_pb2 as pb
from ...protos import worker_pb2 as wpb
from ..config import ServeConfig
from ..metrics.gateway import GatewayMetrics
from ..telemetry import Recorder
from ..tracing import Span, current_span, spanning
from ..validation import choose_recipe
from .answer import Answer
from .attempt import Attempt
from .failover import Failover, RetryBudget, Start
from .job import Epochs, Job, Write, public_error
from .pool import Route, WorkerPool
from .sessions import Sessions, TurnTokenizer, after_turn, said_ids


class Call:
    """Runs a job, on other workers where those at work are lost, and writes its chunks and its `complete` message."""

    def __init__(
        self,
        job: Job,
        write: Write,
        *,
        pool: WorkerPool,
        tokenizer: TurnTokenizer,
        sessions: Sessions,
        config: ServeConfig,
        epochs: Epochs,
        budget: RetryBudget,
        metrics: GatewayMetrics,
        recorder: Recorder,
    ) -> None:
        self._job = job
        self._write = write
        self._pool = pool
        self._config = config
        self._epochs = epochs
        self._metrics = metrics
        self._recorder = recorder
        self._answer = Answer(job, tokenizer, metrics)
        self._tokenizer = tokenizer
        self._failover = Failover(
            config.max_migrations, budget, job.keeps, in_session=job.turn is not None, continues=bool(job.history_ids)
        )
        self._sessions = sessions
        self._kept: Session | None = None
        self._queried_tokens = self._prefix_tokens = self._turn_tokens = 0
        self._recomputed_tokens = self._recomputed_prompt_tokens = 0
        self._saved_tokens = 0.0  # by prefixes that were found

    @property
    def answer_tokens(self) -> int:
        """Told so far, in all choices."""
        return self._answer.num_tokens

    @property
    def used_tokens(self) -> int:
        """What it has cost so far, in tokens: those of the input as far as they were run for it, and of the answers."""
        saved_tokens = math.floor(self._turn_tokens + self._saved_tokens)
        return max(0, self._job.num_input_tokens - saved_tokens) + self._answer.num_tokens

    @property
    def _cached_tokens(self) -> int:
        """Of the input, that were not run: a session had kept them, or an earlier prompt began with them."""
        return self._turn_tokens + self._prefix_tokens

    async def run(self) -> None:
        """Work until the `complete` message is written. Raises an error of the tree otherwise."""
        job = self._job
        of_session = None if job.turn is None or job.turn.session is None else job.turn.session.model_fingerprint
        route = await self._route(of_session)
        shape, profile = route.model.shape, route.model.profile
        if job.turn is None or job.turn.session is None:
            resolved = choose_recipe(job.checked, len(job.prompt_ids), shape, profile)
        else:
            resolved = job.turn.recipe(job.checked, shape, profile)
        while True:
            attempt = self._attempt(route, resolved)
            try:
                with self._spanning(route, attempt):
                    await attempt.run()
                break
            except asyncio.CancelledError:
                self._count_again(attempt)  # whoever leaves pays for what ran
                raise
            except KvsluiceError as exc:
                if attempt.handoff_is_open:
                    self._metrics.handoff_failed(exc.type_name)
                self._count_again(attempt)
                await self._plan(exc, attempt)
                try:
                    # tokens stay those of one model: another one's workers do not count
                    route = await self._route(route.model.fingerprint)
                except WorkerLost as none:
                    raise WorkerLost(f"{exc.message}; {none.message}") from exc
        self._count_again(attempt)
        await self._keep_turn(route, resolved, attempt)
        await self._respond(complete=self._report(route, resolved, attempt))
        self._count(route, resolved, attempt)

    async def _route(self, model_fingerprint: str | None) -> Route:
        plan, pool = self._failover, self._pool
        if plan.start is Start.RESTORE and pool.has_decode and not pool.has_store:
            plan.start = Start.REPLAY  # those that had one are gone; what is there goes on without
        return await pool.route(
            model_fingerprint=model_fingerprint,
            prefill=plan.start is not Start.RESTORE,
            store=self._job.keeps,
            blame=plan.blame,
            near=self._sessions.place(self._job.tenant, self._job.checked.session_id),
            prefixes=self._job.prefixes[0],
        )

    def _attempt(self, route: Route, resolved: Resolved) -> Attempt:
        above = 0 if self._job.turn is None else self._job.turn.epoch
        epoch, start = self._epochs.next(above), self._failover.start
        self._recorder.record("gateway.attempt", request_id=self._job.request_id, epoch=epoch, start=start.value)
        return Attempt(
            self._job, route, resolved.recipe, epoch, start, self._answer, self._write_chunk, self._config
        )  # fmt: skip

    def _spanning(self, route: Route, attempt: Attempt) -> AbstractContextManager[Span]:
        """Of an attempt."""
        return spanning(
            "kvsluice.attempt",
            current_span.get().carrier,
            request_id=self._job.request_id,
            epoch=attempt.epoch,
            start=self._failover.start.value,
            decode_worker=route.decode.member.worker_id,
            prefill_worker="" if route.prefill is None else route.prefill.member.worker_id,
        )

    async def _plan(self, error: KvsluiceError, attempt: Attempt) -> None:
        """Have the next attempt go on, or end with the error."""
        try:
            wait_s = self._failover.next(error, self._answer.has_begun, attempt.blamed())
        except KvsluiceError as exc:
            raise public_error(exc, self._job.checked.input_field) from error
        self._answer.interrupted()
        self._metrics.migrated(self._failover.start.value)
        current_span.get().event("migrated", error_type=error.type_name, start=self._failover.start.value)
        self._recorder.record(
            "gateway.migrated",
            request_id=self._job.request_id,
            error_type=error.type_name,
            start=self._failover.start.value,
        )
        await asyncio.sleep(wait_s)

    def _count_again(self, attempt: Attempt) -> None:
        """Count what an attempt has computed that had been computed before, and what it had not to compute."""
        self._queried_tokens += attempt.queried_tokens  # of the one attempt that the answer began with
        self._prefix_tokens += attempt.cached_tokens
        self._saved_tokens += attempt.saved_tokens
        if self._job.history_ids and not self._failover.migrations:
            # a turn begins so: what is new is computed for the first time, and what is not computed was kept
            again = attempt.resumed.recomputed_tokens + attempt.resumed.recomputed_prompt_tokens
            self._turn_tokens = max(0, self._job.num_input_tokens - 1 - again)
            return
        self._recomputed_tokens += attempt.resumed.recomputed_tokens
        self._recomputed_prompt_tokens += attempt.resumed.recomputed_prompt_tokens
        self._metrics.recomputed(attempt.resumed.recomputed_tokens, attempt.resumed.recomputed_prompt_tokens)

    async def _keep_turn(self, route: Route, resolved: Resolved, attempt: Attempt) -> None:
        """Let a turn of a session count, before its end is told."""
        job = self._job
        if job.turn is None:
            return
        finished = attempt.finished
        if job.turn.session is None and not (finished is not None and finished.kept):
            raise StoreUnavailable("the store did not take the session's first turn; it is not kept")
        history = [*job.history_ids, *said_ids(self._answer.first_choice, self._tokenizer)]
        self._kept = after_turn(
            job.turn,
            job.checked,
            resolved,
            route.model.fingerprint,
            attempt.epoch,
            job.prompt_ids,
            history,
            0 if finished is None else finished.stored_bytes,
        )
        await self._sessions.keep(self._kept, job.turn, route.decode.member.worker_id)

    async def _write_chunk(self, chunk: pb.Chunk) -> None:
        await self._respond(chunk=chunk)

    async def _respond(self, **event: Any) -> None:
        await self._write(pb.GenerateResponse(request_id=self._job.request_id, **event))

    def _report(self, route: Route, resolved: Resolved, attempt: Attempt) -> pb.Complete:
        finished, num_prompt = attempt.finished or wpb.Finished(), self._job.num_input_tokens
        return pb.Complete(
            choices=self._answer.choices(),
            usage=pb.Usage(
                prompt_tokens=num_prompt,
                completion_tokens=self._answer.num_tokens,
                cached_tokens=self._cached_tokens,
            ),
            recipe=pb.RecipeReport(
                requested=self._job.checked.recipe_name,
                effective=resolved.recipe.name,
                fingerprint=resolved.recipe.fingerprint,
                fallback_reason=resolved.fallback_reason or "",
                handoff_bytes=attempt.shipped.payload_bytes,
                handoff_bf16_bytes=route.model.shape.bf16_kv_bytes(num_prompt),
                resident_bytes=finished.resident_bytes,
                bytes_read_per_step=finished.bytes_read // max(1, finished.steps),
            ),
            timing=self._answer.timing(),
            durability=pb.DurabilityReport(
                level=self._job.checked.durability,
                kept=finished.kept,
                stored_bytes=finished.stored_bytes,
                migrations=self._failover.migrations,
                recomputed_tokens=self._recomputed_tokens,
                recomputed_prompt_tokens=self._recomputed_prompt_tokens,
                stalled_s=self._answer.stalled_s,
            ),
            session=self._session_report(),
        )

    def _session_report(self) -> pb.SessionReport | None:
        turn, kept = self._job.turn, self._kept
        if turn is None or kept is None:
            return None
        return pb.SessionReport(session_id=turn.session_id, turn=kept.num_turns, tokens=kept.num_tokens)

    def _count(self, route: Route, resolved: Resolved, attempt: Attempt) -> None:
        num_prompt = self._job.num_input_tokens
        self._metrics.finished(
            self._answer.finish_reason,
            time.monotonic() - self._job.accepted_s,
            num_prompt,
            self._answer.num_tokens,
        )
        timing, shipped = self._answer.timing(), attempt.shipped
        current_span.get().set(
            recipe=resolved.recipe.name,
            prompt_tokens=num_prompt,
            completion_tokens=self._answer.num_tokens,
            cached_tokens=self._cached_tokens,
            finish_reason=self._answer.finish_reason,
            handoff_bytes=shipped.payload_bytes,
            migrations=self._failover.migrations,
            time_to_first_token_s=timing.time_to_first_token_s,
        )
        self._metrics.phases(timing.prefill_s, timing.decode_s, self._answer.longest_choice)
        self._metrics.cached(self._queried_tokens, self._prefix_tokens, self._turn_tokens)
        self._metrics.recalled((attempt.finished or wpb.Finished()).rows_recalled)
        if shipped.frames:
            bf16_bytes = route.model.shape.bf16_kv_bytes(len(self._job.prompt_ids))
            self._metrics.handoff(resolved.recipe.name, shipped.payload_bytes, bf16_bytes)
            self._metrics.handoff_took(shipped.handoff_s, shipped.exposed_s)
