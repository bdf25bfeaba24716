"""Checks and dispatch of `quantize` and its inverses."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..dispatch import REFERENCE, TRITON, Modules, backend, require

_IMPLEMENTATIONS = Modules(__package__, REFERENCE, TRITON)

Axis = Literal["channel", "token"]


def quantize(x: Tensor, bits: int, group: int, axis: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """code = round((x - minimum) / scale) per group (KIVI, arXiv 2402.02750 §3).

    The float16 minimum is rounded down and the float16 scale up, so that no code is clipped: a finite x returns
    within half a scale of its value, plus float32 rounding.

    Args:
        x: [n, ..., c], floating point, magnitudes below 65,000.
        bits: 8, 4 or 2.
        group: elements that share a scale.
        axis: `channel` groups rows (axis 0) of one channel, `token` groups channels (last axis) of one row. A last
            group may be partial.

    Returns:
        codes: uint8 [n, ..., ceil(c * bits / 8)], the lowest bits hold the first channel.
        scale, minimum: float16, [ceil(n / group), ..., c] for `channel`, [n, ..., ceil(c / group)] for `token`.

    Raises:
        ValueError: anything else.
    """
    _check(bits, group, axis)
    require(x.dim() >= 2 and x.is_floating_point(), f"x must be [n, ..., c] of floats, got {tuple(x.shape)} {x.dtype}")
    return backend(x.device, _IMPLEMENTATIONS).quantize(x, bits, group, axis)


def dequantize(
    codes: Tensor, scale: Tensor, minimum: Tensor, bits: int, group: int, axis: Axis, num_channels: int
) -> Tensor:
    """The inverse of `quantize`: float32 [n, ..., num_channels].

    Raises:
        ValueError: tensors that are no output of `quantize` with these arguments.
    """
    _check(bits, group, axis)
    _check_codes(codes, scale, minimum, bits, group, axis, num_channels)
    return backend(codes.device, _IMPLEMENTATIONS).dequantize(codes, scale, minimum, bits, group, axis, num_channels)


def dequantize_chunks(
    codes: Tensor,
    scale: Tensor,
    minimum: Tensor,
    heads: Tensor,
    chunks: Tensor,
    chunk: int,
    bits: int,
    group: int,
    axis: Axis,
    num_channels: int,
) -> Tensor:
    """Decode chosen chunks of chosen heads and touch nothing else.

    Args:
        codes, scale, minimum: of x [n, h, num_channels], n a multiple of `chunk`.
        heads, chunks: int64 [M].
        chunk: rows a chunk; for `channel` it divides `group`, so that one scale row serves a chunk.

    Returns:
        float32 [M, chunk, num_channels].

    Raises:
        ValueError: tensors that do not fit together.
    """
    _check(bits, group, axis)
    _check_codes(codes, scale, minimum, bits, group, axis, num_channels)
    require(codes.dim() == 3, f"codes must be [n, h, bytes], got {tuple(codes.shape)}")
    require(heads.shape == chunks.shape and heads.dim() == 1, "heads and chunks must be [M]")
    require(codes.shape[0] % chunk == 0, f"{codes.shape[0]} rows are no whole chunks of {chunk}")
    require(axis == "token" or group % chunk == 0, f"chunks of {chunk} cross groups of {group} rows")
    return backend(codes.device, _IMPLEMENTATIONS).dequantize_chunks(
        codes, scale, minimum, heads, chunks, chunk, bits, group, axis, num_channels
    )


def _check(bits: int, group: int, axis: str) -> None:
    require(bits in (8, 4, 2), f"bits must be 8, 4 or 2, got {bits}")
    require(group > 0, f"group must be positive, got {group}")
    require(axis in ("channel", "token"), f"axis must be channel or token, got {axis!r}")


def _check_codes(
    codes: Tensor, scale: Tensor, minimum: Tensor, bits: int, group: int, axis: str, num_channels: int
) -> None:
    lead, packed = tuple(codes.shape[:-1]), -(-num_channels * bits // 8)
    require(codes.shape[-1] == packed, f"{num_channels} channels of {bits} bits take {packed} bytes, got {codes.shape}")
    if axis == "channel":
        expected = (-(-lead[0] // group), *lead[1:], num_channels)
    else:
        expected = (*lead, -(-num_channels // group))
    require(scale.shape == minimum.shape == expected, f"scale must be {expected}, got {tuple(scale.shape)}")
