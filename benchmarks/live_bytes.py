"""How many bytes of tensors are alive, counted as torch makes and frees them, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, counts the storages that operations return, until each is freed.

    What an operation allocates and frees inside itself is not seen, nor are tensors made before.

    Attributes:
        live_bytes: bytes of the counted storages that are alive now.
        peak_bytes: the most that was alive after any operation.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        known = {self._key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and self._key(leaf) not in known:
                self._count(leaf)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return out

    def _key(self, tensor: Tensor) -> int:
        return int(tensor.untyped_storage()._cdata)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = int(storage._cdata), storage.nbytes()
        if key in self._seen:
            return

        def free(_: weakref.ref[Any]) -> None:
            del self._seen[key]
            self.live_bytes -= size

        self.live_bytes += size
        self._seen[key] = weakref.ref(storage, free)
