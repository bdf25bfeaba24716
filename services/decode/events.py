"""What a decode engine tells of its requests."""

from __future__ import annotations

from dataclasses import dataclass

from ...compression.interfaces import EncodedLayer
from ...errors import KvsluiceError
from ...models.sampling import Sampled
from ..staging import Event as DeviceEvent


@dataclass(frozen=True)
class Event:
    """Something that happened to a request."""

    request_id: str
    epoch: int


@dataclass(frozen=True)
class OpenedEvent(Event):
    """Its memory is reserved: layers may come."""


@dataclass(frozen=True)
class TokensEvent(Event):
    """New tokens of a choice. The last one's `finish_reason` says whether the choice has ended.

    Attributes:
        first_index: index of sampled[0] among the choice's emitted tokens.
    """

    choice: int
    first_index: int
    sampled: tuple[Sampled, ...]


@dataclass(frozen=True)
class RowsEvent(Event):
    """Generated rows of a choice, to be kept before any of them is sealed.

    Attributes:
        begin: position of the first one.
        layers: of all layers, see `SequenceCache.rows`.
        after: when they are complete, as `HostCopies.mark` gave it.
    """

    choice: int
    begin: int
    layers: list[EncodedLayer]
    after: DeviceEvent | None


@dataclass(frozen=True)
class FinishedEvent(Event):
    """Every choice has ended and the request's memory is free.

    Attributes:
        resident_bytes: the most that its caches held when a choice ended, what choices share counted once.
        bytes_read: bytes of cache that attention read, over all choices and steps.
        steps: decode steps, over all choices.
        rows_recalled: of the prompt, that came back into the deep layers, over all choices.
    """

    resident_bytes: int
    bytes_read: int
    steps: int
    rows_recalled: int = 0


@dataclass(frozen=True)
class FailedEvent(Event):
    """The request has failed or was cancelled, and its memory is free."""

    error: KvsluiceError
