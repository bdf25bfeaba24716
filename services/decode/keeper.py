"""Keeps one running request in a store, so that another worker can go on with it.

    frames, as they arrive ──┐
    the manifest             ├──> queue ──> one task ──> SequenceWriter ──> store
    rows, every few tokens ──┘                └──> rows are kept: the choice may run on

Decoding does not wait for the store, but for two bounds: no more bytes of a prompt are taken in than the store has not
taken by `MAX_QUEUED_BYTES`, and no choice runs further ahead of its kept rows than its leash. So a slow store slows its
own requests. One that fails is given up: the request goes on and is no longer kept.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence

from ...errors import Fenced, KvsluiceError
from ...kvstore.continuation import ContinuedChoice
from ...kvstore.identity import FrameIdent
from ...kvstore.manifest import Manifest
from ...kvstore.sequences import Rows, SequenceWriter
from ..framing import FramePacker
from ..staging import Event as DeviceEvent
from ..staging import HostCopies
from ..telemetry import Recorder, about, where
from .events import RowsEvent
from .restore import Restored
from .sequence import EmittedChoice, KeptRows

logger = logging.getLogger(__name__)

MAX_QUEUED_BYTES = 16 << 20

_Job = bytes | Manifest | RowsEvent


class Keeper:
    """Writes what it is given, in order. All methods belong to the event loop; only `frame` and `close` wait.

    Args:
        writer: of the sequence.
        ident: whose it is.
        ttl_s: how long it lives in the store unless it is renewed.
        copies: how rows come to the host.
        lengthen: told of a choice and how many of its rows are kept now; infinite where none will be.
        fenced: told when another worker has taken the sequence over.

    Attributes:
        is_kept: it has not been given up.
        stored_bytes: of the sequence that were written, by this worker or those before it.
    """

    def __init__(
        self,
        writer: SequenceWriter,
        ident: FrameIdent,
        ttl_s: float,
        copies: HostCopies,
        lengthen: Callable[[int, float], None],
        fenced: Callable[[KvsluiceError], None],
        recorder: Recorder,
    ) -> None:
        self.is_kept = True
        self._writer, self._ident, self._ttl_s, self._copies = writer, ident, ttl_s, copies
        self._lengthen, self._fenced, self._recorder = lengthen, fenced, recorder
        self._jobs: deque[_Job] = deque()
        self._queued_bytes = 0
        self._is_writing = False
        self._changed = asyncio.Event()  # there is a job, or room
        self._tokens: list[list[int]] = []
        self._reasons: list[str] = []
        self._task: asyncio.Task[None] | None = None

    @property
    def stored_bytes(self) -> int:
        return self._writer.stored_bytes

    async def frame(self, data: bytes) -> None:
        """Store a frame of the prompt, once there is room for it in the queue."""
        while self.is_kept and self._queued_bytes + len(data) > max(MAX_QUEUED_BYTES, len(data)):
            await self._turn()
        self._add(data, len(data))

    def manifest(self, manifest: Manifest, emitted: Sequence[EmittedChoice]) -> None:
        """Store the manifest of all frames so far.

        Args:
            emitted: with what the choices begin.
        """
        self._begin([choice.token_ids for choice in emitted])
        self._add(manifest)

    def started(self) -> None:
        """The request has been started: what was given up before could not let its choices off their leash."""
        if not self.is_kept:
            self._let_go()

    async def take_over(self, restored: Restored) -> None:
        """Go on keeping what was restored. Rows of which only a part is of use are stored as what they are now."""
        self._begin([choice.token_ids for choice in restored.emitted])
        parts = self._writer.take_over(restored.found, restored.ends)
        again = [(i, restored.emitted[i].kept[-1]) for i in parts]
        try:
            if again:
                rows = await asyncio.to_thread(lambda: [self._packed(i, kept, None) for i, kept in again])
                await self._writer.extend(rows, self._choices())
        except Exception as exc:
            self._give_up(exc)
        else:
            self._start()

    def _begin(self, emitted: Sequence[Sequence[int]]) -> None:
        """Note what every choice has emitted before it goes on here."""
        self._tokens, self._reasons = [list(ids) for ids in emitted], ["" for _ in emitted]

    def tokens(self, choice: int, token_ids: Sequence[int], finish_reason: str) -> None:
        """Count tokens that were told; they are written with the next rows."""
        self._tokens[choice] += token_ids
        self._reasons[choice] = finish_reason

    def rows(self, event: RowsEvent) -> None:
        """Store generated rows."""
        self._add(event)

    async def finish(self, ttl_s: float) -> None:
        """Write what is left, and let all of it live for so long: the sequence may be continued then."""
        while self.is_kept and (self._jobs or self._is_writing):
            await self._turn()
        await self._stop()
        if self.is_kept:
            try:
                await self._writer.renew(ttl_s)
            except Exception as exc:
                self._give_up(exc)

    async def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def close(self, delete: bool) -> None:
        """Write nothing more.

        Args:
            delete: what was written is of no use to anyone; otherwise it expires.
        """
        await self._stop()
        was_kept, self.is_kept = self.is_kept, False
        self._jobs.clear()
        self._changed.set()
        if delete and was_kept:
            try:
                await self._writer.delete()
            except KvsluiceError as exc:
                logger.warning(
                    "request %s stays in the store until it expires: %s",
                    self._ident.request_id,
                    exc,
                    extra=about(self._ident.request_id),
                )

    def _add(self, job: _Job, num_bytes: int = 0) -> None:
        if self.is_kept:
            self._jobs.append(job)
            self._queued_bytes += num_bytes
            self._changed.set()
            self._start()

    def _start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def _turn(self) -> None:
        """Wait until something has changed."""
        self._changed.clear()
        await self._changed.wait()

    async def _run(self) -> None:
        try:
            await self._write_all()
        except Exception as exc:
            if not isinstance(exc, KvsluiceError):
                logger.error(
                    "keeping request %s failed: %s",
                    self._ident.request_id,
                    where(exc),
                    extra=about(self._ident.request_id),
                )
            self._give_up(exc)

    async def _write_all(self) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time() + self._ttl_s / 3
        while True:
            if loop.time() >= due_s:
                await self._writer.renew()
                due_s = loop.time() + self._ttl_s / 3
            if self._jobs:
                self._is_writing = True
                await self._write(self._jobs.popleft())
                self._is_writing = False
                self._changed.set()
                continue
            try:
                async with asyncio.timeout_at(due_s):
                    await self._turn()
            except TimeoutError:
                pass

    async def _write(self, job: _Job) -> None:
        if isinstance(job, bytes):
            await self._writer.put_frame(job)
            self._queued_bytes -= len(job)
            self._changed.set()
        elif isinstance(job, Manifest):
            await self._writer.commit(job)
            self._record("decode.kept", stored_bytes=self.stored_bytes)
        else:
            await self._keep_rows([job, *self._more_rows()])

    def _more_rows(self) -> list[RowsEvent]:
        """Rows that wait at the head of the queue: those of all choices are written together."""
        more = []
        while self._jobs and isinstance(self._jobs[0], RowsEvent):
            more.append(self._jobs.popleft())
        return more  # type: ignore[return-value]

    async def _keep_rows(self, events: Sequence[RowsEvent]) -> None:
        kept = [(event.choice, KeptRows(event.begin, event.layers), event.after) for event in events]
        rows = await asyncio.to_thread(lambda: [self._packed(*one) for one in kept])
        await self._writer.extend(rows, self._choices())
        for one in rows:
            num_rows = one.tokens[1] - one.tokens[0]
            self._record("decode.rows_kept", choice=one.choice, rows=num_rows, nbytes=sum(map(len, one.frames)))
            self._lengthen(one.choice, num_rows)

    def _choices(self) -> list[ContinuedChoice]:
        return [ContinuedChoice(tuple(ids), reason) for ids, reason in zip(self._tokens, self._reasons, strict=True)]

    def _packed(self, choice: int, kept: KeptRows, after: DeviceEvent | None) -> Rows:
        packer = FramePacker(self._ident, kept.num_rows, copies=self._copies, begin=kept.begin)
        frames = [data for layer in kept.layers for data in packer.add(layer, after)] + packer.flush()
        return Rows(choice, (kept.begin, kept.end), frames)

    def _give_up(self, error: Exception) -> None:
        self.is_kept = False
        self._jobs.clear()
        self._changed.set()
        self._record("decode.not_kept", error_type=type(error).__name__)
        if isinstance(error, Fenced):
            self._fenced(error)
            return
        logger.warning(
            "request %s is not kept any longer: %s",
            self._ident.request_id,
            type(error).__name__,
            extra=about(self._ident.request_id),
        )
        self._let_go()

    def _let_go(self) -> None:
        for choice in range(len(self._tokens)):
            self._lengthen(choice, math.inf)

    def _record(self, name: str, **fields: str | float) -> None:
        self._recorder.record(name, request_id=self._ident.request_id, epoch=self._ident.epoch, **fields)
