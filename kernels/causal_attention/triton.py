"""`causal_attention` on a GPU: cuDNN's fused attention, 1.7 times as fast as FlashAttention-2 on Hopper, where it is
worth a plan, and a compiled kernel that merges what it gives; FlashAttention-2 for the rest; what neither takes runs as
in `reference`.

cuDNN plans for every shape, which takes up to tenths of a second; `pieces.py` keeps the shapes few, and multiples of
128, which releases before 9.15.1 need to be right (pytorch issue 169849). Both libraries are called by name, because
torch's own choice may plan for each length of a prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention

from . import pieces, reference

logger = logging.getLogger(__name__)

MIN_ROWS = 64  # fewer are cheap, and other kernels split the keys among more of the chip
MIN_KEYS = 1024
MERGE_ROWS = 16  # of one head, a program

_refused: set[tuple[object, ...]] = set()


@triton.jit(do_not_specialize=["num_rows"])
def _merge(
    outs, lses, out_ptr, lse_ptr, num_rows, row_strides, head_strides, lse_strides,
    HEAD_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [c, H, d] and lse [H, c], both dense, from tuples of the same. Grid: blocks of rows, heads.

    Strides: of each out by row and by head, its channels dense; of each lse by head, its rows dense.
    """
    head, num_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_D)
    inside = rows < num_rows
    mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
    peak = tl.load(lses[0] + head * lse_strides[0] + rows, mask=inside, other=0)
    for i in tl.static_range(1, len(lses)):
        peak = tl.maximum(peak, tl.load(lses[i] + head * lse_strides[i] + rows, mask=inside, other=0))
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    merged = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for i in tl.static_range(len(lses)):
        weight = tl.exp(tl.load(lses[i] + head * lse_strides[i] + rows, mask=inside, other=0) - peak)
        at = rows[:, None] * row_strides[i] + head * head_strides[i] + dims[None, :]
        merged += weight[:, None] * tl.load(outs[i] + at, mask=mask, other=0).to(tl.float32)
        total += weight
    to = (rows[:, None] * num_heads + head) * HEAD_DIM + dims[None, :]
    tl.store(out_ptr + to, (merged / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + head * num_rows + rows, peak + tl.log(total), mask=inside)


def merge(partials: Sequence[pieces.Partial], dtype: torch.dtype) -> pieces.Partial:
    """See `pieces.Merge`. Every row has seen a key in each of the partials."""
    outs, lses = tuple(out for out, _ in partials), tuple(lse for _, lse in partials)
    num_rows, num_heads, d = outs[0].shape
    out = torch.empty(num_rows, num_heads, d, dtype=dtype, device=outs[0].device)
    lse = torch.empty(num_heads, num_rows, dtype=torch.float32, device=out.device)
    strides = tuple(tuple(x.stride(axis) for x in outs) for axis in (0, 1))
    with torch.cuda.device_of(out):
        _merge[(triton.cdiv(num_rows, MERGE_ROWS), num_heads)](
            outs, lses, out, lse, num_rows, *strides, tuple(x.stride(0) for x in lses),
            HEAD_DIM=d, BLOCK_ROWS=MERGE_ROWS, BLOCK_D=triton.next_power_of_2(d), num_warps=4,
        )  # fmt: skip
    return out, lse


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> pieces.Partial:
    """cuDNN's; see `pieces.Attend`. Heads share keys within it, without copies."""
    # the log-sum-exp is always asked for, as with and without it are two plans
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        _heads_first(q), _heads_first(k), _heads_first(v), None, True, 0.0, causal, False
    )[:2]
    # [1, H, s, 1] or, in some releases, [1, H, s]
    return out.squeeze(0).transpose(0, 1), lse.reshape(q.shape[1], len(q))


def lower_right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q [c, H, d], the last c of m rows, over k, v [m, Hkv, d]."""
    kind = (q.shape[1:], k.shape[1:], q.dtype)
    if kind in _refused or not _suits_cudnn(q, k, v):
        return _without_cudnn(q, k, v)
    try:
        return pieces.lower_right(q.contiguous(), k.contiguous(), v.contiguous(), attend, merge)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError as exc:
        logger.warning("cuDNN has no attention for heads of %s in %s: %s", tuple(q.shape[1:]), q.dtype, exc)
        _refused.add(kind)
    return _without_cudnn(q, k, v)


def by_position(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor,
    k_positions: Tensor,
    window: int | None,
    last_rows: bool,
    no_gaps: bool = False,
) -> Tensor:
    """See `reference.by_position`; with `no_gaps` a window of positions is one of rows, which FlashAttention knows."""
    if window is not None and last_rows and no_gaps and _suits_flash(q, k, v):
        first = max(0, len(k) - len(q) - window + 1)  # no row sees an earlier key
        return _flash(q, k[first:], v[first:], window)
    return reference.by_position(q, k, v, q_positions, k_positions, window, last_rows)


def _without_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _flash(q, k, v, None) if _suits_flash(q, k, v) else reference.lower_right(q, k, v)


def _flash(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """FlashAttention-2, whose causal mask begins at the lower right."""
    out = torch.ops.aten._flash_attention_forward(
        q[None], k[None], v[None], None, None, len(q), len(k), 0.0, True, False,
        window_size_left=None if window is None else window - 1, window_size_right=None if window is None else 0,
    )[0]  # fmt: skip
    return out.squeeze(0)


def _suits_cudnn(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if q.device.type != "cuda" or len(q) < MIN_ROWS or len(k) < MIN_KEYS or not q.dtype == k.dtype == v.dtype:
        return False
    return bool(can_use_cudnn_attention(_parameters(q, k, v)))


def _suits_flash(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if q.device.type != "cuda" or not q.dtype == k.dtype == v.dtype or q.shape[2] % 8:
        return False
    return bool(can_use_flash_attention(_parameters(q, k, v)))


def _parameters(q: Tensor, k: Tensor, v: Tensor) -> SDPAParams:
    return SDPAParams(_heads_first(q), _heads_first(k), _heads_first(v), None, 0.0, False, True)


def _heads_first(x: Tensor) -> Tensor:
    """[n, heads, d] as [1, heads, n, d]."""
    return x.unsqueeze(0).transpose(1, 2)
