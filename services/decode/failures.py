"""What stands for a fault of one request."""

from __future__ import annotations

import logging

import torch

from ...errors import InternalError, KvsluiceError, OutOfMemory
from ...models.parallel import Ranks, RanksBroken
from ..telemetry import about, where

logger = logging.getLogger(__name__)


def typed(exc: Exception, request_id: str, ranks: Ranks | None = None) -> KvsluiceError:
    """The error of the tree that stands for `exc`; one that is not of the tree is logged, its text stays inside.

    Args:
        ranks: that hold the model together. All of them meet an error of the tree alike, any other perhaps one alone,
            which would be without the request while the others go on with it.

    Raises:
        RanksBroken: there are others, and it is of that kind.
    """
    if isinstance(exc, KvsluiceError):
        return exc
    if ranks is not None:
        raise RanksBroken(f"a rank of the model failed in a request: {where(exc)}") from exc
    logger.error("decoding of request %s failed: %s", request_id, where(exc), extra=about(request_id))
    if is_out_of_memory(exc):
        return OutOfMemory("the decode worker ran out of memory")
    return InternalError(f"decoding failed: {type(exc).__name__}")


def is_out_of_memory(exc: Exception) -> bool:
    """Whether memory ran out, of the device or of the host."""
    if isinstance(exc, (torch.OutOfMemoryError, MemoryError)):
        return True
    # torch has no class of its own for these: pinned memory, a library's workspace, memory of the CPU
    signs = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory")
    return isinstance(exc, RuntimeError) and any(sign in str(exc) for sign in signs)
