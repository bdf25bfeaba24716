"""Attention of the last rows of a sequence out of calls that know a square causal mask or none.

    keys   0                        begin      m
           [ 2^i units | 2^j | ... ][ square   ]      begin: a multiple of UNIT at or before the first row
    rows                              [ shift | c | rest ]      padded to a power of two

Every row sees all keys before `begin`; behind it rows and keys form a square whose diagonal is the rows' own. The
keys before it are cut into powers of two and the rows are padded to one, so that a long prompt asks for a dozen shapes
and not for one a chunk: a library that plans or compiles for each shape does so a dozen times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

UNIT = 128  # keys; also the fewest rows of a call
MAX_ROWS = 8192  # of a call, unless their number is a power of two already
MAX_PARTIALS = 8  # that are held, and merged, at once

Partial = tuple[Tensor, Tensor]
"""Attention over some keys: out [c, H, d] and the log of the sum of exponentials, float32 [H, c]."""

Attend = Callable[[Tensor, Tensor, Tensor, bool], Partial]
"""attend(q [s, H, d], k [n, Hkv, d], v [n, Hkv, d], causal): over all keys, or where causal (s = n) up to its own."""

Merge = Callable[[Sequence[Partial], torch.dtype], Partial]
"""merge(partials, dtype): over the keys of all, computed in float32, `out` in `dtype`."""


def padded_rows(num_rows: int) -> int:
    """The power of two that `num_rows` rows are padded to."""
    return max(UNIT, 1 << (num_rows - 1).bit_length())


def spans(num_keys: int) -> list[tuple[int, int]]:
    """Half-open ranges that cover `num_keys` keys, a multiple of UNIT; each a power of two of units, falling."""
    ranges = []
    start = 0
    for bit in reversed(range((num_keys // UNIT).bit_length())):
        length = UNIT << bit
        if num_keys & length:
            ranges.append((start, start + length))
            start += length
    return ranges


def lower_right(q: Tensor, k: Tensor, v: Tensor, attend: Attend, merge: Merge) -> Tensor:
    """Attention of q [c, H, d], the last c of m rows, over k, v [m, Hkv, d]; [c, H, d] in q's dtype."""
    c, m = len(q), len(k)
    if c <= MAX_ROWS or padded_rows(c) == c:
        return _block(q, k, v, attend, merge)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for start in range(0, c, MAX_ROWS):
        stop = min(start + MAX_ROWS, c)
        seen = m - c + stop
        out[start:stop] = _block(q[start:stop], k[:seen], v[:seen], attend, merge)
    return out


def _block(q: Tensor, k: Tensor, v: Tensor, attend: Attend, merge: Merge) -> Tensor:
    c, m = len(q), len(k)
    begin = (m - c) // UNIT * UNIT
    shift = m - c - begin
    size = padded_rows(shift + c)
    own = slice(shift, shift + c)
    rows = _padded(q, shift, size)
    out, lse = attend(rows, _padded(k[begin:], 0, size), _padded(v[begin:], 0, size), True)
    partials = [(out[own], lse[:, own])]
    for start, stop in spans(begin):
        if len(partials) == MAX_PARTIALS:
            out, lse = merge(partials, torch.float32)
            partials = [(out, lse)]
        out, lse = attend(rows, k[start:stop], v[start:stop], False)
        partials.append((out[own], lse[:, own]))
    return partials[0][0] if len(partials) == 1 else merge(partials, q.dtype)[0]


def _padded(x: Tensor, before: int, size: int) -> Tensor:
    """x [n, heads, d] as rows before .. before + n of `size` rows, the others 0; x itself where there are no others.

    Zeros, because a masked value still takes part in a product: 0 x NaN would reach rows that do not see it.
    """
    if len(x) == size:
        return x
    padded = x.new_zeros(size, *x.shape[1:])
    padded[before : before + len(x)] = x
    return padded
