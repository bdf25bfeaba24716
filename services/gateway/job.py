"""An accepted request, as the gateway's parts share it."""

from __future__ import annotations

import contextlib
import time
from asyncio import CancelledError, Task
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import InvalidRequest, KvsluiceError
from ...kvstore.identity import RequestId, TenantId
from ...kvstore.session import sequence_id
from ...protos import generation_pb2 as pb
from ...protos import worker_pb2 as wpb
from ..security import NO_TENANT
from ..validation import CheckedRequest
from .affinity import PromptPrefixes
from .sessions import Turn, owned_id

_EPOCH_UNIT_NS = 1000
GATEWAYS = 1024  # that tell their epochs apart

Write = Callable[[pb.GenerateResponse], Awaitable[None]]


class Epochs:
    """Attempt numbers that only ever grow, across requests and restarts, so that no late frame or token fits again.

    Each is a time and the number of its gateway, so that two gateways never use the same one for a sequence of the
    same name.

    Args:
        gateway: number of this gateway among those of the fleet.
    """

    def __init__(self, gateway: int = 0) -> None:
        self._gateway = gateway % GATEWAYS
        self._last = time.time_ns() // _EPOCH_UNIT_NS

    def next(self, above: int = 0) -> int:
        """The next one, above those that others are known to have used."""
        self._last = max(self._last + 1, time.time_ns() // _EPOCH_UNIT_NS, above // GATEWAYS + 1)
        return self._last * GATEWAYS + self._gateway


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
    def interruptible(self) -> Iterator[None]:
        """Turn the cancellation that `interrupt` causes into its error."""
        try:
            yield
        except CancelledError:
            if self.error is None:
                raise
            self._task.uncancel()
            raise self.error from None


@dataclass(frozen=True)
class Job:
    """A validated, tokenized request.

    Attributes:
        prompt_ids: what is prefilled.
        history_ids: what follows it before the answer: earlier turns of a session, and this one's input.
        turn: of a session; None = the request is by itself.
        tenant: whose it is.
        prefixes: how the prompt begins, and by what else it is known, such as the text that came in.
        accepted_s: monotonic time at which the request arrived.
        deadline_s: monotonic time of its deadline.
    """

    request_id: str
    checked: CheckedRequest
    prompt_ids: tuple[int, ...]
    sampling: wpb.Sampling
    accepted_s: float
    deadline_s: float
    history_ids: tuple[int, ...] = ()
    turn: Turn | None = None
    tenant: TenantId = NO_TENANT
    prefixes: Sequence[PromptPrefixes] = ()

    @property
    def sequence_id(self) -> str:
        """What workers and the store call it: the turns of a session are one sequence."""
        own = RequestId(self.request_id) if self.turn is None else sequence_id(self.turn.session_id)
        return owned_id(self.tenant, own)

    @property
    def num_input_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.history_ids)

    @property
    def keeps(self) -> bool:
        """Whether what decode holds of it is written to a store."""
        return self.checked.durability != "none"


def public_error(error: KvsluiceError, input_field: str) -> KvsluiceError:
    """A worker's error in the words of the public API: workers know of a prompt's length only."""
    if isinstance(error, InvalidRequest) and error.field == "num_prompt_tokens":
        return type(error)(input_field, error.problem, error.allowed)
    return error
