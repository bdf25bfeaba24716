"""Small tensors between the host and a device, without waiting for what the device still has to do."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(host: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device, where it arrives before what is launched next; `host` may be dropped at once."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


class Fetched:
    """A copy of a device tensor on its way to the host, behind all that has been launched.

    Args:
        tensor: any; on a CPU it is the copy.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._done = tensor, None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> Tensor:
        """The tensor on the host, once it is there; what was launched since is not waited for.

        Raises:
            RuntimeError: the device has failed.
        """
        if self._done is not None:
            self._done.synchronize()
        return self._host
