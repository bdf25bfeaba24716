"""Every error that crosses a boundary of the system, in one tree.

    KvsluiceError                   status               retryable
    ├── InvalidRequest              INVALID_ARGUMENT     no    names the field and what it allows
    │   └── InvalidRecipe           INVALID_ARGUMENT     no    slots that do not fit together or the model
    ├── UnknownModel                NOT_FOUND            no
    ├── DuplicateRequest            ALREADY_EXISTS       no
    ├── ConfigError                 FAILED_PRECONDITION  no    stops start-up, names the key
    ├── UnsupportedModel            FAILED_PRECONDITION  no    lists what is supported
    ├── BrokenCheckpoint            FAILED_PRECONDITION  no    names the file
    ├── Overloaded                  RESOURCE_EXHAUSTED   yes
    ├── OutOfMemory                 RESOURCE_EXHAUSTED   yes   a worker had none for it; another one may
    ├── WorkerLost                  UNAVAILABLE          yes
    ├── StoreUnavailable            UNAVAILABLE          yes
    ├── RequestCancelled            CANCELLED            no
    ├── DeadlineExceeded            DEADLINE_EXCEEDED    yes
    ├── CorruptFrame                DATA_LOSS            yes   bytes that are not a frame, or a broken one
    ├── FrameMismatch               FAILED_PRECONDITION  no    a sound frame of another model, recipe or epoch
    ├── Fenced                      FAILED_PRECONDITION  no    another worker owns the sequence by now
    ├── SequenceLost                DATA_LOSS            yes   what was stored of a sequence is not there, or not whole
    ├── SessionMismatch             FAILED_PRECONDITION  no    a session that this request cannot continue; says why
    └── InternalError               INTERNAL             no

The message of an error is public: it never holds prompts, secrets, addresses or paths of the server.
This module imports nothing, so every other module may raise its errors.
"""

from __future__ import annotations

from typing import ClassVar


class KvsluiceError(Exception):
    """Base of the tree.

    Attributes:
        status: name of the gRPC status code that the error maps to.
        http_status: the HTTP status that the error maps to.
        retryable: whether the same request may succeed when it is sent again.
    """

    status: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    @property
    def type_name(self) -> str:
        """The class of this module that it is: others are not known on the far side of a boundary."""
        return next(cls.__name__ for cls in type(self).__mro__ if cls.__module__ == __name__)


class InvalidRequest(KvsluiceError):
    """A field of a request holds something it may not hold.

    Args:
        field: the field as the caller knows it, such as ``sampling.temperature``.
        problem: what is wrong with it.
        allowed: the values that are allowed, in words or as a range.
    """

    status = "INVALID_ARGUMENT"
    http_status = 400

    def __init__(self, field: str, problem: str, allowed: str) -> None:
        super().__init__(f"{field}: {problem}; allowed: {allowed}")
        self.field = field
        self.problem = problem
        self.allowed = allowed


class InvalidRecipe(InvalidRequest):
    """A recipe is unknown, or its slots do not fit together or do not fit the model."""


class Unauthenticated(KvsluiceError):
    """Who calls is not known: a key is missing or unknown, or one side does not trust the other's certificate."""

    status = "UNAUTHENTICATED"
    http_status = 401


class PermissionDenied(KvsluiceError):
    """Who calls is known and may not do this."""

    status = "PERMISSION_DENIED"
    http_status = 403


class UnknownModel(KvsluiceError):
    """The request names a model that is not served here."""

    status = "NOT_FOUND"
    http_status = 404


class DuplicateRequest(KvsluiceError):
    """A request with this id is already running."""

    status = "ALREADY_EXISTS"
    http_status = 409


class ConfigError(KvsluiceError):
    """A configuration key is unknown or its value is not allowed; start-up stops."""

    status = "FAILED_PRECONDITION"
    http_status = 500


class UnsupportedModel(KvsluiceError):
    """A checkpoint of a family or with a feature that the forward pass does not cover."""

    status = "FAILED_PRECONDITION"
    http_status = 500


class BrokenCheckpoint(KvsluiceError):
    """A checkpoint folder or file that is incomplete or contradicts itself."""

    status = "FAILED_PRECONDITION"
    http_status = 500


class Overloaded(KvsluiceError):
    """No room now; the request was not started.

    Attributes:
        retry_after_s: when there may be room, as far as that is known; 0 = it is not.
        reason: of a closed set, for metrics; what a worker refused is `worker`.
    """

    status = "RESOURCE_EXHAUSTED"
    http_status = 429
    retryable = True

    def __init__(self, message: str, retry_after_s: float = 0.0, reason: str = "worker") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.reason = reason


class OutOfMemory(KvsluiceError):
    """A worker ran out of memory over a request that it had let in; others may have enough."""

    status = "RESOURCE_EXHAUSTED"
    http_status = 503
    retryable = True


class WorkerLost(KvsluiceError):
    """A worker died, was cut off or is not there (yet)."""

    status = "UNAVAILABLE"
    http_status = 503
    retryable = True


class StoreUnavailable(KvsluiceError):
    """The store cannot be reached or refuses to work."""

    status = "UNAVAILABLE"
    http_status = 503
    retryable = True


class RequestCancelled(KvsluiceError):
    """The caller cancelled the request."""

    status = "CANCELLED"
    http_status = 499


class DeadlineExceeded(KvsluiceError):
    """The request's deadline passed before it was finished."""

    status = "DEADLINE_EXCEEDED"
    http_status = 504
    retryable = True


class CorruptFrame(KvsluiceError):
    """Bytes that are not a sound frame or manifest."""

    status = "DATA_LOSS"
    http_status = 500
    retryable = True


class FrameMismatch(KvsluiceError):
    """A sound frame of another model, recipe, request or epoch than the one expected."""

    status = "FAILED_PRECONDITION"
    http_status = 500


class Fenced(KvsluiceError):
    """Another worker has taken the sequence over; what this one still writes does not count."""

    status = "FAILED_PRECONDITION"
    http_status = 409


class SequenceLost(KvsluiceError):
    """What was stored of a sequence is not there (any more), is not whole, or does not fit."""

    status = "DATA_LOSS"
    http_status = 500
    retryable = True


class SessionMismatch(KvsluiceError):
    """A session that the request cannot continue: of another model or recipe, or not where the request takes it to
    be."""

    status = "FAILED_PRECONDITION"
    http_status = 409


class InternalError(KvsluiceError):
    """A fault of the system's own."""
