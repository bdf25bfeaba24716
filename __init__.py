"""kvsluice: distributed prefill/decode serving of long prompts with compressed, recallable KV caches.

`Client` and `AsyncClient` talk to a running service; they are loaded when first used, so that importing a part of the
package, such as the kernels, stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import AsyncClient, Client

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("AsyncClient", "Client"):
        from . import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
