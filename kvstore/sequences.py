"""How a sequence lies in a store: written by its owner as it grows, found and taken over by another worker.

    head ──> manifest ──> frames of the prompt
      │         ^
      └──> continuation ──> frames of generated rows

What a name points to is written before it, and lives longer: frames, then the manifest or continuation, then the head.
So a sequence is there whole or not at all, and what an owner leaves behind when it dies expires.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from ..errors import CorruptFrame, Fenced, StoreUnavailable
from .continuation import Continuation, ContinuedChoice, RowsEntry, decode_continuation, encode_continuation
from .envelope import Fault, checksum_of, corrupt
from .frame import decode_frame
from .identity import FrameIdent, FrameKey, ManifestKey, StoreKey, continuation_key, frame_key, head_key, manifest_key
from .manifest import FrameEntry, Manifest, decode_manifest, encode_manifest, frame_entry
from .store import Head, HeadWrite, Store

T = TypeVar("T")

FRAME_TTL_FACTOR = 1.25  # by which frames outlive what names them
FENCED = "another worker owns the sequence by now"
MANY = 8  # operations that are under way at once


@dataclass(frozen=True)
class StoredSequence:
    """What a head leads to.

    Attributes:
        head: as it was found.
        manifest: of the prompt.
        manifest_key, manifest_checksum: its name, and the xxh3-64 that ends it.
        continuation: None where nothing beyond the prompt is kept.
    """

    head: Head
    manifest: Manifest
    manifest_key: ManifestKey
    manifest_checksum: int
    continuation: Continuation | None

    def rows_of(self, choice: int) -> list[RowsEntry]:
        """What is kept of a choice's generated rows, ascending."""
        return [] if self.continuation is None else self.continuation.rows_of(choice)


async def claim_sequence(store: Store, ident: FrameIdent, ttl_s: float) -> Head | None:
    """Become the owner of a sequence of an earlier epoch, so that it no longer changes under whoever reads it. Returns
    its head before that; None where there is none.

    Raises:
        StoreUnavailable: the store cannot be reached.
        Fenced: a later epoch owns it.
    """
    key = head_key(ident)
    while (head := await store.read_head(key)) is not None:
        result = await store.compare_and_set_head(key, head, Head(ident.epoch, head.manifest), ttl_s)
        if result is HeadWrite.WRITTEN:
            return head
        if result is HeadWrite.FENCED:
            raise Fenced(FENCED)
    return None


async def find_sequence(store: Store, ident: FrameIdent) -> StoredSequence | None:
    """The sequence that `ident` is about, whatever its epoch; None where there is none, or where it is not whole.

    A corrupt manifest or continuation is deleted.

    Raises:
        StoreUnavailable: the store cannot be asked.
    """
    head = await store.read_head(head_key(ident))
    if head is None:
        return None
    try:
        data = await _read(store, head.manifest)
        continuation, key = None, head.manifest
        if key.startswith("kvsluice:continuation:"):
            continuation = decode_continuation(data)
            key = continuation.base
            data = await _read(store, key)
        manifest = decode_manifest(data)
    except _Missing:
        return None
    except CorruptFrame:
        await store.delete(key)
        return None
    found = StoredSequence(head, manifest, key, checksum_of(data), continuation)
    return found if _fits(found, ident) else None


async def delete_sequence(store: Store, ident: FrameIdent) -> None:
    """Remove what is stored of a sequence, names first; its head expires, and leads nowhere.

    Raises:
        StoreUnavailable: the store cannot be reached; what is left expires.
    """
    found = await find_sequence(store, ident)
    if found is not None:
        writer = SequenceWriter(store, ident, 1.0)
        writer.take_over(found, dict.fromkeys(range(len(found.manifest.choices)), sys.maxsize))
        await writer.delete()


def _fits(found: StoredSequence, ident: FrameIdent) -> bool:
    """Whether all parts are of the sequence, and continue each other."""
    idents = [found.manifest.ident]
    if found.continuation is not None:
        idents.append(found.continuation.ident)
        num_choices = len(found.continuation.choices)
        if found.continuation.base_checksum != found.manifest_checksum or num_choices != len(found.manifest.choices):
            return False
        begins = [found.continuation.rows_of(choice)[:1] for choice in range(num_choices)]
        if any(rows and rows[0].tokens[0] != len(found.manifest.prompt_ids) for rows in begins):
            return False
    return all(replace(one, epoch=ident.epoch) == ident and one.epoch <= found.head.epoch for one in idents)


class _Missing(Exception):
    """A value that is not there (any more)."""


async def _read(store: Store, key: StoreKey) -> bytes:
    data = await store.get(key)
    if data is None:
        raise _Missing
    return data


class Named(Protocol):
    """A value by its name, and what has to lie there."""

    @property
    def key(self) -> StoreKey: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def checksum(self) -> int: ...


async def read_frames(store: Store, entries: Sequence[Named]) -> AsyncIterator[bytes]:
    """The frames of these entries, in order, the next ones under way while one is looked at.

    Raises:
        CorruptFrame: one is missing, or is not what its entry says; it is deleted then.
        StoreUnavailable: the store cannot be asked.
    """
    under_way: deque[asyncio.Task[bytes | None]] = deque()
    ahead = iter(entries)
    try:
        for entry in entries:
            while len(under_way) < MANY and (coming := next(ahead, None)) is not None:
                under_way.append(asyncio.create_task(store.get(coming.key)))
            data = await under_way.popleft()
            if data is None:
                raise corrupt("sequence", Fault.MISSING)
            if len(data) != entry.size_bytes or checksum_of(data) != entry.checksum:  # decoding verifies it
                await store.delete(entry.key)
                raise corrupt("sequence", Fault.DIFFERENT)
            yield data
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


@dataclass(frozen=True)
class Rows:
    """Generated rows that are to be kept.

    Attributes:
        choice: whose.
        tokens: half-open range of positions; begins where what was kept before ends.
        frames: of all layers.
    """

    choice: int
    tokens: tuple[int, int]
    frames: Sequence[bytes]


class SequenceWriter:
    """Writes one sequence as its owner. Methods are called one after the other.

    Every method raises `StoreUnavailable` where the store cannot be reached or has no room, and `Fenced` where another
    worker has taken the sequence over; what was written until then expires.

    Args:
        ident: whose sequence; its epoch is the owner's.
        ttl_s: how long what is written lives, unless it is renewed.

    Attributes:
        stored_bytes: of all values of the sequence that were written, or taken over.
    """

    def __init__(self, store: Store, ident: FrameIdent, ttl_s: float) -> None:
        self.stored_bytes = 0
        self._store, self._ident, self._ttl_s = store, ident, ttl_s
        self._head: Head | None = None
        self._base: tuple[ManifestKey, int] | None = None
        self._frames: list[FrameKey] = []
        self._rows: list[RowsEntry] = []
        self._num_frames = 0
        self._version = 0

    async def put_frame(self, data: bytes) -> None:
        """Store the next frame of the prompt, as it was received."""
        await self._put_frame(data)

    async def commit(self, manifest: Manifest) -> None:
        """Store the manifest, all of whose frames are here, and let the sequence be found."""
        key, data = manifest_key(self._ident), encode_manifest(manifest)
        await self._put(key, data, self._ttl_s)
        self._base = (key, checksum_of(data))
        await self._point_to(key)

    def take_over(self, found: StoredSequence, ends: Mapping[int, int]) -> list[int]:
        """Go on with a sequence that was claimed.

        Args:
            ends: choice -> position up to which its kept rows are of use; what is kept beyond is not named again.

        Returns:
            Choices of which rows that were kept together are of use in part: those are to be kept again.
        """
        self._head = found.head
        self._base = (found.manifest_key, found.manifest_checksum)
        self._frames = [entry.key for entry in found.manifest.frames]
        self.stored_bytes = sum(entry.size_bytes for entry in found.manifest.frames)
        parts = []
        for choice, end in sorted(ends.items()):
            for rows in found.rows_of(choice):
                if rows.tokens[1] <= end:
                    self._rows.append(rows)
                    self._frames += [entry.key for entry in rows.frames]
                    self.stored_bytes += sum(entry.size_bytes for entry in rows.frames)
                elif rows.tokens[0] < end:
                    parts.append(choice)
        return parts

    async def extend(self, rows: Sequence[Rows], choices: Sequence[ContinuedChoice]) -> None:
        """Keep more rows, and say how far the choices have come."""
        assert self._base is not None, "what is extended was committed"
        for one in rows:
            entries = await together([self._put_frame(data) for data in one.frames])
            self._rows.append(RowsEntry(one.choice, one.tokens, tuple(entries)))
        self._rows.sort(key=lambda entry: (entry.choice, entry.tokens))
        self._version += 1
        continuation = Continuation(self._ident, *self._base, self._version, tuple(choices), tuple(self._rows))
        before = None if self._head is None else self._head.manifest
        key = continuation_key(self._ident, self._version)
        await self._put(key, encode_continuation(continuation), self._ttl_s)
        await self._point_to(key)
        if before is not None and before != self._base[0]:
            await self._store.delete(before)

    async def renew(self, ttl_s: float | None = None) -> None:
        """Let everything live for another time to live, or for this one: what is named first, the head last."""
        ttl_s = self._ttl_s if ttl_s is None else ttl_s
        await together([self._store.renew(key, ttl_s * FRAME_TTL_FACTOR) for key in self._frames])
        if self._head is not None and self._base is not None:
            for key in dict.fromkeys((self._base[0], self._head.manifest)):
                await self._store.renew(key, ttl_s)
            await self._point_to(self._head.manifest, ttl_s)

    async def delete(self) -> None:
        """Remove what can be removed now, names first; the head expires, and leads nowhere."""
        named = [] if self._head is None or self._base is None else [self._head.manifest, self._base[0]]
        for key in dict.fromkeys(named):
            await self._store.delete(key)
        await together([self._store.delete(key) for key in self._frames])

    async def _put_frame(self, data: bytes) -> FrameEntry:
        key = frame_key(self._ident, self._num_frames)
        self._num_frames += 1
        self._frames.append(key)
        await self._put(key, data, self._ttl_s * FRAME_TTL_FACTOR)
        return frame_entry(key, decode_frame(data))

    async def _put(self, key: StoreKey, data: bytes, ttl_s: float) -> None:
        await self._store.put(key, data, ttl_s)
        self.stored_bytes += len(data)

    async def _point_to(self, key: ManifestKey, ttl_s: float | None = None) -> None:
        """Make the head lead to a manifest or continuation."""
        ttl_s = self._ttl_s if ttl_s is None else ttl_s
        name, new = head_key(self._ident), Head(self._ident.epoch, key)
        expected = self._head
        while True:
            result = await self._store.compare_and_set_head(name, expected, new, ttl_s)
            if result is HeadWrite.WRITTEN:
                self._head = new
                return
            if result is HeadWrite.FENCED:
                raise Fenced(FENCED)
            expected = await self._store.read_head(name)  # an earlier owner's
            if expected is None and self._base is not None and not await self._store.exists(self._base[0]):
                raise StoreUnavailable("what the store held of the sequence is gone")  # it was emptied


async def together(operations: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run operations, a few at a time. Returns their results in order; the first error is raised once all that were
    begun are done, and the others are not begun."""
    done: list[T] = []
    for begin in range(0, len(operations), MANY):
        results = await asyncio.gather(*operations[begin : begin + MANY], return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                for operation in operations[begin + MANY :]:
                    operation.close()
                raise result
            done.append(result)
    return done
