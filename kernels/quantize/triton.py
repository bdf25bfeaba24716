"""Packing in two launches, the groups' ranges and the codes, and decoding in one, of all rows or of chosen chunks.

All bits are those that the reference gives on a CPU: divisions and float16 conversions round to the nearest, and
products and sums round separately.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import FP16_MAX, HALF_TINY, HALF_ULP

TILE_ELEMENTS = 1024
RANGE_ELEMENTS = 2048
MOST_GROUP_ELEMENTS = 64  # of a group that a program reads at once
# float32 numbers of this size are integers: adding it rounds to the nearest, ties to the even
ROUNDER = tl.constexpr(1.5 * 2**23)
LARGEST, ULP, TINY = tl.constexpr(FP16_MAX), tl.constexpr(HALF_ULP), tl.constexpr(HALF_TINY)


@triton.jit
def group_scale(low, high, BITS: tl.constexpr):
    """The float16 scale and minimum of groups from their least and largest numbers, float32 of any shape."""
    minimum = low - tl.abs(low) * ULP - TINY
    minimum = tl.minimum(tl.maximum(minimum, -LARGEST), LARGEST).to(tl.float16)
    LEVELS: tl.constexpr = (1 << BITS) - 1
    difference = high - minimum.to(tl.float32)
    scale = tl.div_rn(difference, tl.zeros_like(difference) + LEVELS) * (1 + ULP) + TINY
    return tl.minimum(scale, LARGEST).to(tl.float16), minimum


@triton.jit
def group_codes(x, scale, minimum, BITS: tl.constexpr):
    """The int32 codes of numbers, all float32."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    # a scale of 0 is that of a constant group
    codes = tl.div_rn(x - minimum, tl.where(scale == 0, 1.0, scale))
    codes = tl.minimum(tl.maximum(codes, 0.0), LEVELS)
    return ((codes + ROUNDER) - ROUNDER).to(tl.int32)


@triton.jit
def packed_bytes(codes, BITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """int32 codes [BLOCK_R, BLOCK_C] as uint8 [BLOCK_R, BLOCK_C * BITS / 8]."""
    PER_BYTE: tl.constexpr = 8 // BITS
    lanes = codes << ((tl.arange(0, BLOCK_C) % PER_BYTE) * BITS)[None, :]
    return tl.sum(tl.reshape(lanes, [BLOCK_R, BLOCK_C // PER_BYTE, PER_BYTE]), 2).to(tl.uint8)


@triton.jit(do_not_specialize=["num_rows", "num_groups"])
def _ranges(
    x_ptr, scale_ptr, minimum_ptr, num_rows, num_groups, x_row, x_head, x_channel,
    NUM_HEADS: tl.constexpr, NUM_CHANNELS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BY_CHANNEL: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """x [n, heads, channels], strided, to the scale and minimum of every group. Grid: blocks of groups."""
    groups = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    is_group = groups < num_groups
    if BY_CHANNEL:
        channel, above = groups % NUM_CHANNELS, groups // NUM_CHANNELS
        row, head = (above // NUM_HEADS) * GROUP, above % NUM_HEADS
        size, step, most = num_rows - row, x_row, tl.minimum(num_rows, GROUP)
    else:
        PER_ROW: tl.constexpr = (NUM_CHANNELS + GROUP - 1) // GROUP
        channel, above = (groups % PER_ROW) * GROUP, groups // PER_ROW
        row, head = above // NUM_HEADS, above % NUM_HEADS
        size, step, most = NUM_CHANNELS - channel, x_channel, tl.minimum(NUM_CHANNELS, GROUP)
    first = x_ptr + row * x_row + head * x_head + channel * x_channel
    low = tl.full([BLOCK_G], float("inf"), tl.float32)
    high = tl.full([BLOCK_G], float("-inf"), tl.float32)
    for begin in range(0, most, BLOCK_E):
        place = begin + tl.arange(0, BLOCK_E)
        mask = ((place < GROUP)[:, None] & (place[:, None] < size[None, :])) & is_group[None, :]
        x = tl.load(first[None, :] + place.to(tl.int64)[:, None] * step, mask=mask, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.min(tl.where(mask, x, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(mask, x, float("-inf")), 0))
    scale, minimum = group_scale(tl.where(is_group, low, 0.0), tl.where(is_group, high, 0.0), BITS)
    tl.store(minimum_ptr + groups, minimum, mask=is_group)
    tl.store(scale_ptr + groups, scale, mask=is_group)


@triton.jit(do_not_specialize=["num_rows"])
def _encode(
    x_ptr, scale_ptr, minimum_ptr, codes_ptr, num_rows, x_row, x_head, x_channel,
    NUM_HEADS: tl.constexpr, NUM_CHANNELS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BY_CHANNEL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x [rows / heads, heads, channels], strided, to codes [rows, bytes]. Grid: blocks of rows."""
    PER_BYTE: tl.constexpr = 8 // BITS
    NUM_BYTES: tl.constexpr = (NUM_CHANNELS + PER_BYTE - 1) // PER_BYTE
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    channels = tl.arange(0, BLOCK_C)
    is_row = rows < num_rows
    mask = is_row[:, None] & (channels < NUM_CHANNELS)[None, :]
    token, head = rows // NUM_HEADS, rows % NUM_HEADS
    x_at = (token * x_row + head * x_head)[:, None] + channels.to(tl.int64)[None, :] * x_channel
    x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
    group = _group_of(token, head, channels, NUM_HEADS, NUM_CHANNELS, GROUP, BY_CHANNEL)
    scale = tl.load(scale_ptr + group, mask=mask, other=1.0).to(tl.float32)
    minimum = tl.load(minimum_ptr + group, mask=mask, other=0.0).to(tl.float32)
    codes = tl.where(mask, group_codes(x, scale, minimum, BITS), 0)
    places = tl.arange(0, BLOCK_C // PER_BYTE)
    is_byte = is_row[:, None] & (places < NUM_BYTES)[None, :]
    packed = packed_bytes(codes, BITS, BLOCK_R, BLOCK_C)
    tl.store(codes_ptr + rows[:, None] * NUM_BYTES + places[None, :], packed, mask=is_byte)


@triton.jit
def _group_of(
    token, head, channels, NUM_HEADS: tl.constexpr, NUM_CHANNELS: tl.constexpr, GROUP: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
):  # fmt: skip
    """Where the scale and minimum of the channels of rows (token, head) lie, [rows, channels]."""
    if BY_CHANNEL:
        group = ((token // GROUP) * NUM_HEADS + head)[:, None] * NUM_CHANNELS + channels[None, :]
    else:
        NUM_GROUPS: tl.constexpr = (NUM_CHANNELS + GROUP - 1) // GROUP
        group = (token * NUM_HEADS + head)[:, None] * NUM_GROUPS + (channels // GROUP)[None, :]
    return group


@triton.jit(do_not_specialize=["num_rows"])
def _decode(
    codes_ptr, scale_ptr, minimum_ptr, heads_ptr, chunks_ptr, out_ptr, num_rows,
    NUM_HEADS: tl.constexpr, CHUNK: tl.constexpr, NUM_CHANNELS: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, BY_CHANNEL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """codes [n * heads, bytes] to out [rows, channels]: all rows, or where `chunks` is given those of chosen chunks of
    chosen heads. Grid: blocks of rows of the output."""
    PER_BYTE: tl.constexpr = 8 // BITS
    NUM_BYTES: tl.constexpr = (NUM_CHANNELS + PER_BYTE - 1) // PER_BYTE
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    channels = tl.arange(0, BLOCK_C)
    is_row, is_channel = rows < num_rows, channels < NUM_CHANNELS
    mask = is_row[:, None] & is_channel[None, :]
    if chunks_ptr is None:
        token, head = rows // NUM_HEADS, rows % NUM_HEADS
    else:
        token = tl.load(chunks_ptr + rows // CHUNK, mask=is_row, other=0) * CHUNK + rows % CHUNK
        head = tl.load(heads_ptr + rows // CHUNK, mask=is_row, other=0)
    packed = (token * NUM_HEADS + head)[:, None] * NUM_BYTES + (channels // PER_BYTE)[None, :]
    codes = tl.load(codes_ptr + packed, mask=mask, other=0).to(tl.int32)
    codes = (codes >> ((channels % PER_BYTE) * BITS)[None, :]) & ((1 << BITS) - 1)
    group = _group_of(token, head, channels, NUM_HEADS, NUM_CHANNELS, GROUP, BY_CHANNEL)
    scale = tl.load(scale_ptr + group, mask=mask, other=0.0).to(tl.float32)
    minimum = tl.load(minimum_ptr + group, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows[:, None] * NUM_CHANNELS + channels[None, :], codes.to(tl.float32) * scale + minimum, mask)


def quantize(x: Tensor, bits: int, group: int, axis: str) -> tuple[Tensor, Tensor, Tensor]:
    """See `op.quantize`."""
    n, num_channels = x.shape[0], x.shape[-1]
    by_channel = axis == "channel"
    groups = (-(-n // group), *x.shape[1:]) if by_channel else (*x.shape[:-1], -(-num_channels // group))
    codes = torch.empty(*x.shape[:-1], -(-num_channels * bits // 8), dtype=torch.uint8, device=x.device)
    scale, minimum = (torch.empty(groups, dtype=torch.float16, device=x.device) for _ in range(2))
    if not x.numel():
        return codes, scale, minimum
    rows = x if x.dim() == 3 else x.reshape(n, x.shape[1:-1].numel(), num_channels)
    num_heads = rows.shape[1]
    elements = min(MOST_GROUP_ELEMENTS, triton.next_power_of_2(group))
    ranges = RANGE_ELEMENTS // elements
    columns = max(8 // bits, triton.next_power_of_2(num_channels))
    block = max(1, TILE_ELEMENTS // columns)
    shape = {
        "NUM_HEADS": num_heads, "NUM_CHANNELS": num_channels, "BITS": bits, "GROUP": group, "BY_CHANNEL": by_channel,
        "num_warps": 4, "enable_fp_fusion": False,
    }  # fmt: skip
    with torch.cuda.device_of(x):
        _ranges[(-(-scale.numel() // ranges),)](
            rows, scale, minimum, n, scale.numel(), *rows.stride(), BLOCK_E=elements, BLOCK_G=ranges, **shape
        )
        _encode[(-(-n * num_heads // block),)](
            rows, scale, minimum, codes, n * num_heads, *rows.stride(), BLOCK_R=block, BLOCK_C=columns, **shape
        )
    return codes, scale, minimum


def dequantize(
    codes: Tensor, scale: Tensor, minimum: Tensor, bits: int, group: int, axis: str, num_channels: int
) -> Tensor:
    """See `op.dequantize`."""
    out = torch.empty(*codes.shape[:-1], num_channels, dtype=torch.float32, device=codes.device)
    num_heads = codes.shape[1:-1].numel()
    _launch(codes, scale, minimum, None, None, out, num_heads, 1, bits, group, axis)
    return out


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
    """See `op.dequantize_chunks`."""
    out = torch.empty(len(chunks), chunk, num_channels, dtype=torch.float32, device=codes.device)
    _launch(codes, scale, minimum, heads, chunks, out, codes.shape[1], chunk, bits, group, axis)
    return out


def _launch(
    codes: Tensor,
    scale: Tensor,
    minimum: Tensor,
    heads: Tensor | None,
    chunks: Tensor | None,
    out: Tensor,
    num_heads: int,
    chunk: int,
    bits: int,
    group: int,
    axis: str,
) -> None:
    """Fill `out` [..., channels]."""
    if not out.numel():
        return
    num_channels = out.shape[-1]
    columns = triton.next_power_of_2(num_channels)
    rows = max(1, TILE_ELEMENTS // columns)
    num_rows = out.numel() // num_channels
    if heads is not None and chunks is not None:
        heads, chunks = heads.contiguous(), chunks.contiguous()
    # products and sums round separately, as in the reference
    with torch.cuda.device_of(out):
        _decode[(-(-num_rows // rows),)](
            codes.contiguous(), scale.contiguous(), minimum.contiguous(), heads, chunks, out, num_rows,
            NUM_HEADS=num_heads, CHUNK=chunk, NUM_CHANNELS=num_channels, BITS=bits, GROUP=group,
            BY_CHANNEL=axis == "channel", BLOCK_R=rows, BLOCK_C=columns, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
