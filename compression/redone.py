"""A decode step's last row once more, attending to all that its cache holds instead of what it chose."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .interfaces import ReadCounter
from .layer_cache import LayerCache
from .recall import Recall


class RedoneRow:
    """What a forward pass asks of a cache, for a row that has been appended and attended from. The pass gives the row's
    keys and values anew; the cache is read, and nothing in it changes, counts of what was read included.

    Args:
        layers: of all layers, in order.
        recall: what the row sees besides them; None = nothing. It brings nothing back itself.
    """

    def __init__(self, layers: Sequence[LayerCache], recall: Recall | None) -> None:
        self._layers, self._recall = layers, recall
        self._last: tuple[Tensor, Tensor] | None = None

    def append(self, layer: int, k_pre: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Take the row [1, Hkv, d] in place of the one that is there."""
        self._last = (k_pre if self._layers[layer].tail_is_unrotated else k, v)

    def attend(self, layer: int, q: Tensor, positions: Tensor) -> Tensor:
        """q [1, H, d] -> [1, H, d]."""
        assert self._last is not None, "a row comes before its attention"
        more: list[tuple[Tensor, Tensor]] = []
        if self._recall is not None and layer > self._recall.plan.layer:
            more = self._recall.part(layer, q, positions, joins=False, counter=ReadCounter())
        return self._layers[layer].attend_to_all(q, positions, self._last, more)

    def recall(self, layer: int, like: Tensor) -> None:
        """No rows join this one."""
