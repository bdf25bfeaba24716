"""What a store of frames and manifests must do. `tests/contract` holds every store to it.

A store maps immutable values to keys, and one head to each sequence. Rules that hold for all of them:

- **Every value expires.** Each write names its time to live; none is without. Renewing never shortens it.
- **Values never change.** Writing a key again with the same bytes succeeds and renews it, so that a write whose reply
  was lost can be repeated; writing other bytes under a living key is refused. What is replaced is deleted first.
- **Absence is ordinary.** An expired, deleted or evicted value is `None` or False, never an error.
- **A value is whole.** A reader sees all of a value or nothing. Stores do not look inside: who reads decodes.
- **Heads are fenced.** A head changes only by compare-and-set, and its epoch never goes down, so an owner that was
  replaced cannot take its sequence back. An expired head is an absent one.
- **A store that cannot be reached, or has no room, raises `StoreUnavailable`** and has changed nothing that a reader
  could notice, but for a write whose reply was lost. It never evicts a living value to make room for another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from .identity import HeadKey, ManifestKey, StoreKey


@dataclass(frozen=True)
class Head:
    """Which manifest of a sequence is current, and the epoch of its owner."""

    epoch: int
    manifest: ManifestKey


class HeadWrite(Enum):
    """What came of a compare-and-set."""

    WRITTEN = "written"  # the head is the new one, by this call or by an earlier, equal one
    CHANGED = "changed"  # the head is not the expected one; read it again
    FENCED = "fenced"  # the head belongs to a newer epoch; the caller is no longer the owner


class Store(Protocol):
    """A place for frames, manifests and heads. See the module's docstring for the rules.

    Every method that does I/O raises `StoreUnavailable` where the store cannot be reached, refuses to work or is
    closed, and `ValueError` where `ttl_s` is not finite and above zero.
    """

    async def put(self, key: StoreKey, value: bytes, ttl_s: float) -> None:
        """Store an immutable value for at least `ttl_s` seconds.

        Raises:
            StoreUnavailable: also where there is no room.
            InternalError: another value lives under this key.
        """
        ...

    async def get(self, key: StoreKey) -> bytes | None:
        """The value, or None where there is none (any more)."""
        ...

    async def exists(self, key: StoreKey) -> bool:
        """Whether `get` would find a value now; moves no payload."""
        ...

    async def renew(self, key: StoreKey, ttl_s: float) -> bool:
        """Let a value live for at least `ttl_s` seconds from now; False where there is none (any more)."""
        ...

    async def delete(self, key: StoreKey) -> bool:
        """Remove a value; False where there was none. Whoever finds a corrupt value deletes it."""
        ...

    async def read_head(self, key: HeadKey) -> Head | None:
        """The sequence's head, or None where there is none (any more)."""
        ...

    async def compare_and_set_head(self, key: HeadKey, expected: Head | None, new: Head, ttl_s: float) -> HeadWrite:
        """Make `new` the head if it is `expected` now (None = no head), and let it live for at least `ttl_s` seconds.

        In this order: a head equal to `new` is renewed and counts as WRITTEN; a head of a newer epoch than `new`'s
        gives FENCED; a head other than `expected` gives CHANGED. The last two change nothing.
        """
        ...

    async def scan(self, prefix: str) -> list[str]:
        """Names of values and heads that start with `prefix` and have not expired, sorted. For tests and repair."""
        ...

    async def close(self) -> None:
        """Let go of connections and memory; may be called twice. Nothing else works afterwards."""
        ...

    def check_integrity(self) -> None:
        """Raise AssertionError where the store's own accounts contradict what it holds."""
        ...


def check_ttl(ttl_s: float) -> None:
    """Refuse a time to live that is not finite and above zero."""
    if not (math.isfinite(ttl_s) and ttl_s > 0):
        raise ValueError(f"ttl_s must be finite and above 0, got {ttl_s}")
