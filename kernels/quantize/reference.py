"""`quantize` and its inverses in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import block_rows

# half an ulp of float16 relative to a normal value, and half the smallest subnormal step
HALF_ULP = 2.0**-11
HALF_TINY = 2.0**-25
FP16_MAX = 65504.0
BLOCK_ROWS = 2048  # rows packed at once, so that float32 copies do not grow with n


def quantize(x: Tensor, bits: int, group: int, axis: str) -> tuple[Tensor, Tensor, Tensor]:
    """Pack x [n, ..., c], a block of rows at a time; see `op.quantize`."""
    n, channels = x.shape[0], x.shape[-1]
    by_rows = axis == "channel"
    groups = (-(-n // group), *x.shape[1:]) if by_rows else (*x.shape[:-1], -(-channels // group))
    codes = x.new_empty((*x.shape[:-1], -(-channels * bits // 8)), dtype=torch.uint8)
    scale, minimum = (x.new_empty(groups, dtype=torch.float16) for _ in range(2))
    rows = block_rows(x.device, BLOCK_ROWS)
    step = max(1, rows // group) * group if by_rows else rows
    for begin in range(0, n, step):
        end = min(begin + step, n)
        at = slice(begin // group, -(-end // group)) if by_rows else slice(begin, end)
        codes[begin:end], scale[at], minimum[at] = _quantize_block(x[begin:end].float(), bits, group, axis)
    return codes, scale, minimum


def _quantize_block(x: Tensor, bits: int, group: int, axis: str) -> tuple[Tensor, Tensor, Tensor]:
    dim = 0 if axis == "channel" else x.dim() - 1
    size = x.shape[dim]
    grouped = _split_groups(x, dim, group)
    low, high = torch.aminmax(grouped, dim=dim + 1, keepdim=True)
    minimum = (low - low.abs() * HALF_ULP - HALF_TINY).clamp(-FP16_MAX, FP16_MAX).half()
    levels = (1 << bits) - 1
    # by a tensor: a GPU multiplies by the reciprocal of a number, which rounds otherwise
    step = (high - minimum.float()) / high.new_full((), levels)
    scale = (step * (1 + HALF_ULP) + HALF_TINY).clamp(max=FP16_MAX).half()
    # a scale of 0 is that of a constant group
    divisor = torch.where(scale == 0, 1.0, scale.float())
    codes = ((grouped - minimum.float()) / divisor).round_().clamp_(0, levels).to(torch.uint8)
    codes = codes.flatten(dim, dim + 1).narrow(dim, 0, size)
    return _pack(codes, bits), scale.squeeze(dim + 1), minimum.squeeze(dim + 1)


def dequantize(
    codes: Tensor, scale: Tensor, minimum: Tensor, bits: int, group: int, axis: str, num_channels: int
) -> Tensor:
    """Unpack to float32 [n, ..., num_channels]; see `op.dequantize`."""
    values = _unpack(codes, bits, num_channels)
    dim = 0 if axis == "channel" else codes.dim() - 1
    return values.mul_(_spread(scale, dim, group, values.shape[dim])).add_(
        _spread(minimum, dim, group, values.shape[dim])
    )


def dequantize_chunks(
    codes: Tensor,
    scale: Tensor,
    minimum: Tensor,
    heads: Tensor,
    chunks: Tensor,
    chunk: int,
    bits: int,
    group: int,
    axis: str,
    num_channels: int,
) -> Tensor:
    """Unpack chosen chunks to float32 [M, chunk, num_channels]; see `op.dequantize_chunks`."""
    first = chunks * chunk
    rows = first[:, None] + torch.arange(chunk, device=chunks.device)
    values = _unpack(codes[rows, heads[:, None]], bits, num_channels)
    if axis == "channel":
        groups = first // group
        return values.mul_(scale[groups, heads][:, None].float()).add_(minimum[groups, heads][:, None].float())
    at = (rows, heads[:, None])
    return values.mul_(_spread(scale[at], 2, group, num_channels)).add_(_spread(minimum[at], 2, group, num_channels))


def _split_groups(x: Tensor, dim: int, group: int) -> Tensor:
    """Split axis `dim` into [groups, group]; a partial last group is filled up with copies of its last element."""
    missing = -x.shape[dim] % group
    if missing:
        last = x.narrow(dim, x.shape[dim] - 1, 1)
        x = torch.cat((x, last.expand(*x.shape[:dim], missing, *x.shape[dim + 1 :])), dim=dim)
    return x.unflatten(dim, (-1, group))


def _spread(groups: Tensor, dim: int, group: int, size: int) -> Tensor:
    """Repeat each group's number for its elements along `dim`."""
    if groups.shape[dim] == 1:
        return groups.float()
    return groups.float().repeat_interleave(group, dim=dim).narrow(dim, 0, size)


def _pack(codes: Tensor, bits: int) -> Tensor:
    per_byte = 8 // bits
    if per_byte == 1:
        return codes.contiguous()
    missing = -codes.shape[-1] % per_byte
    if missing:
        codes = F.pad(codes, (0, missing))
    lanes = codes.unflatten(-1, (-1, per_byte))
    packed = lanes[..., 0].clone()
    for lane in range(1, per_byte):
        packed |= lanes[..., lane] << (lane * bits)
    return packed


def _unpack(packed: Tensor, bits: int, num_channels: int) -> Tensor:
    """float32 [..., num_channels] codes."""
    per_byte = 8 // bits
    if per_byte == 1:
        return packed.float()
    mask = (1 << bits) - 1
    lanes = torch.stack([(packed >> (lane * bits)) & mask for lane in range(per_byte)], dim=-1)
    return lanes.flatten(-2).narrow(-1, 0, num_channels).float()
