"""What becomes of a request's KV cache: recipes, and the torch code that carries them out.

    recipe.py     the public, torch-free side: Recipe, resolve, the names
      spec · filling · slots · codec_slots · layout · placement · resolve · registry · recipes/
    interfaces.py what the engines know: LayerObs, EncodedLayer, Compressor, SequenceCache
      compressor · propagation · scoring · budgets · codecs · lowrank · retrieval
      cache · layer_cache · segment · host_values · views · sizes
      hidden_rows · recall · recalled_chunks   what was not propagated, and comes back while decoding
      sealing · rooms        blocks of many sequences, packed together

The functions below load torch when they are first asked for, so that a process which only validates requests
can import `compression.recipe` without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import make_cache
    from .compressor import make_compressor
    from .sizes import bound_nbytes, host_pages

__all__ = ["bound_nbytes", "host_pages", "make_cache", "make_compressor"]

_HOMES = {"make_compressor": "compressor", "make_cache": "cache", "bound_nbytes": "sizes", "host_pages": "sizes"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(name)
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
