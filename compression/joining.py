"""Rows of several layers that are packed as one (xKV, arXiv 2503.18893 §3)."""

from __future__ import annotations

from torch import Tensor

from .codecs import Codec, compact


class JointRows:
    """The rows of a group of layers side by side, [n, layers x Hkv, d], filled layer by layer."""

    def __init__(self, like: Tensor, num_layers: int) -> None:
        num_rows, self._heads, dim = like.shape
        self._rows = like.new_empty(num_rows, num_layers * self._heads, dim)
        self._filled = 0

    @classmethod
    def put(cls, joint: JointRows | None, rows: Tensor, num_layers: int) -> JointRows:
        """Add the next layer's rows [n, Hkv, d] to `joint`, or to a new one for `num_layers`."""
        joint = joint or cls(rows, num_layers)
        begin = joint._filled * joint._heads
        joint._rows[:, begin : begin + joint._heads] = rows
        joint._filled += 1
        return joint

    def encode(self, codec: Codec) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """The packed rows, and each layer's part of what they share, whose heads are on axis 1."""
        basis = codec.fit(self._rows)
        packed = codec.encode(self._rows, basis)
        parts = [
            {name: compact(t[:, begin : begin + self._heads]) for name, t in basis.items()}
            for begin in range(0, self._rows.shape[1], self._heads)
        ]
        return packed, parts
