"""The sealing ops in plain torch, job by job. Addresses are those of this process's memory, so it runs on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..dispatch import require
from ..landmarks.reference import chunk_means
from ..quantize.reference import dequantize, quantize
from ..rope.reference import apply_rope
from ..step_attention import Layout

if TYPE_CHECKING:
    from .op import SealKey

FLOAT8_MAX = 448.0  # of e4m3


def at_address(address: int, dtype: torch.dtype, *shape: int) -> Tensor:
    """The tensor that lies at an address; whoever asks keeps it alive."""
    count = 1
    for size in shape:
        count *= size
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


def _check_device(table: Tensor) -> None:
    require(table.device.type == "cpu", f"the reference reads the host's memory, the table is on {table.device}")


def seal_blocks(key: SealKey, table: Tensor, cos: Tensor, sin: Tensor) -> None:
    """See `op.seal_blocks`."""
    _check_device(table)
    rows = (key.num_rows, key.num_kv_heads, key.head_dim)
    for job in table.tolist():
        k, v = (at_address(address, key.dtype, *rows) for address in job[:2])
        decoded = _pack(key.keys, k, job[3:6], job[6])
        _pack(key.values, v, job[7:10], job[10])
        if key.landmark_bits:
            if key.rotates:
                angles = slice(job[2], job[2] + key.num_rows)
                decoded = apply_rope(decoded, cos[angles, None], sin[angles, None])
            _summarize(key, decoded, *job[11:])


def _pack(layout: Layout, rows: Tensor, places: Sequence[int], shared: int) -> Tensor:
    """Pack rows [n, Hkv, d] to addresses. Returns float32 [n, Hkv, d], what is read from there."""
    n, heads, dim = rows.shape
    if layout.kind == "dense":
        assert layout.dtype is not None
        return at_address(places[0], layout.dtype, n, heads, dim).copy_(rows).float()
    if layout.kind == "float8":
        scale = at_address(shared, torch.float32, 1)
        codes = (rows.float() / scale).clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)
        at_address(places[0], torch.uint8, n, heads, dim).copy_(codes.view(torch.uint8))
        return codes.float() * scale
    if layout.kind == "lowrank":
        basis = at_address(shared, torch.bfloat16, layout.rank, heads * dim).float()
        factors = rows.flatten(1).float() @ basis.T
        if layout.bits == 16:
            factors = at_address(places[0], torch.bfloat16, n, layout.rank).copy_(factors).float()
        else:
            factors = _integers(factors, layout.bits, layout.rank, "token", places)
        return (factors @ basis).view(rows.shape)
    if not layout.balanced:
        return _integers(rows, layout.bits, layout.group, layout.kind, places)
    balance = at_address(shared, torch.float32, 1, heads, dim)
    return _integers(rows * balance, layout.bits, layout.group, layout.kind, places) / balance


def _integers(rows: Tensor, bits: int, group: int, axis: str, places: Sequence[int]) -> Tensor:
    packed = quantize(rows, bits, group, axis)
    for tensor, place in zip(packed, places, strict=True):
        at_address(place, tensor.dtype, *tensor.shape).copy_(tensor)
    return dequantize(*packed, bits, group, axis, rows.shape[-1])


def _summarize(key: SealKey, keys: Tensor, place: int, scale_place: int) -> None:
    means = chunk_means(keys, key.chunk)
    if key.landmark_bits == 16:
        at_address(place, torch.bfloat16, *means.shape).copy_(means)
        return
    # as `compression.retrieval` rounds them
    scale = (means.abs().amax(dim=-1) * ((1 + 2.0**-10) / 127)).clamp(2.0**-24, 65504.0).half()
    at_address(scale_place, torch.float16, *scale.shape).copy_(scale)
    codes = (means / scale.float()[..., None]).round_().clamp_(-127, 127)
    at_address(place, torch.int8, *codes.shape).copy_(codes)


def move_rows(table: Tensor, row_nbytes: int, least: int) -> None:
    """See `op.move_rows`."""
    _check_device(table)
    for address, first, count in table.tolist():
        rows = at_address(address, torch.uint8, first + count, row_nbytes)
        rows[:count] = rows[first:].clone()
