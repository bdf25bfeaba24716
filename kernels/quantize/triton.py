"""Decoding in one launch, of all rows or of chosen chunks. Packing runs as the reference does: it is done once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import quantize

__all__ = ["dequantize", "dequantize_chunks", "quantize"]

TILE_ELEMENTS = 1024


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
    if BY_CHANNEL:
        group = ((token // GROUP) * NUM_HEADS + head)[:, None] * NUM_CHANNELS + channels[None, :]
    else:
        NUM_GROUPS: tl.constexpr = (NUM_CHANNELS + GROUP - 1) // GROUP
        group = (token * NUM_HEADS + head)[:, None] * NUM_GROUPS + (channels // GROUP)[None, :]
    scale = tl.load(scale_ptr + group, mask=mask, other=0.0).to(tl.float32)
    minimum = tl.load(minimum_ptr + group, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows[:, None] * NUM_CHANNELS + channels[None, :], codes.to(tl.float32) * scale + minimum, mask)


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
