"""Packed affine integers: layout against plain Python, error bounds, partial groups, chunk reads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsluice.kernels.quantize import dequantize, dequantize_chunks, quantize, reference

SHAPES = [(1, 1, 64), (33, 3, 64), (70, 2, 96), (5, 1, 128), (8, 2, 17)]


def spread(groups: torch.Tensor, axis: str, group: int, shape: torch.Size) -> torch.Tensor:
    """Each element's group number, element by element."""
    out = torch.empty(shape)
    for index in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        at = list(index)
        dim = 0 if axis == "channel" else len(shape) - 1
        at[dim] //= group
        out[tuple(index)] = groups[tuple(at)]
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("group", [16, 32, 64])
def test_error_is_at_most_half_a_step(shape: tuple[int, ...], bits: int, axis: str, group: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3 + 40
    codes, scale, minimum = quantize(x, bits, group, axis)
    back = dequantize(codes, scale, minimum, bits, group, axis, shape[-1])
    step = spread(scale.float(), axis, group, x.shape)
    assert (back - x).abs().le(step / 2 + 1e-5 * x.abs()).all()
    # the scale is what the range needs, not more: a few float16 roundings above it
    low = spread(minimum.float(), axis, group, x.shape)
    assert (low <= x).all() and (x <= low + step * (2**bits - 1) + 1e-5 * x.abs()).all()


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-6e4, 6e4, width=32), min_size=1, max_size=40),
    bits=st.sampled_from([8, 4, 2]),
    group=st.sampled_from([1, 3, 16]),
)
def test_any_finite_group_comes_back_within_half_a_step(values: list[float], bits: int, group: int) -> None:
    x = torch.tensor(values)[None]
    codes, scale, minimum = quantize(x, bits, group, "token")
    back = dequantize(codes, scale, minimum, bits, group, "token", len(values))
    step = scale.float().repeat_interleave(group, dim=1)[:, : len(values)]
    assert (back - x).abs().le(step / 2 + 1e-5 * x.abs() + 1e-7).all()


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_packed_bytes_are_those_of_plain_python(bits: int) -> None:
    x = torch.randn(3, 2, 21, generator=torch.Generator().manual_seed(2))
    codes, scale, minimum = quantize(x, bits, 16, "token")
    per_byte = 8 // bits
    assert codes.shape == (3, 2, -(-21 // per_byte)) and codes.dtype == torch.uint8
    for row in range(3):
        for head in range(2):
            expected = [0] * codes.shape[-1]
            for channel in range(21):
                low, step = minimum[row, head, channel // 16].float(), scale[row, head, channel // 16].float()
                code = int(((x[row, head, channel] - low) / step).round().clamp(0, 2**bits - 1))
                expected[channel // per_byte] |= code << (channel % per_byte * bits)
            assert codes[row, head].tolist() == expected


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_chunk_reads_equal_a_full_decode_and_touch_nothing_else(axis: str, bits: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(88, 3, 24, generator=generator)
    codes, scale, minimum = quantize(x, bits, 16, axis)
    full = dequantize(codes, scale, minimum, bits, 16, axis, 24)
    heads, chunks = torch.tensor([0, 2, 1, 2]), torch.tensor([0, 7, 21, 7])
    poisoned = torch.full_like(scale, torch.nan)
    for head, chunk in zip(heads, chunks, strict=True):
        rows = slice(chunk * 4 // 16, chunk * 4 // 16 + 1) if axis == "channel" else slice(chunk * 4, chunk * 4 + 4)
        poisoned[rows, head] = scale[rows, head]
    got = dequantize_chunks(codes, poisoned, minimum, heads, chunks, 4, bits, 16, axis, 24)
    for entry, (head, chunk) in enumerate(zip(heads.tolist(), chunks.tolist(), strict=True)):
        assert torch.equal(got[entry], full[chunk * 4 : chunk * 4 + 4, head])


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("group", [3, 16, 64])
def test_blocks_of_rows_give_what_one_pass_gives(monkeypatch: pytest.MonkeyPatch, axis: str, group: int) -> None:
    x = torch.randn(150, 2, 24, generator=torch.Generator().manual_seed(5))
    whole = quantize(x, 4, group, axis)
    monkeypatch.setattr(reference, "BLOCK_ROWS", 32)
    assert all(torch.equal(a, b) for a, b in zip(whole, quantize(x, 4, group, axis), strict=True))


def test_groups_of_rows_do_not_depend_on_rows_after_them() -> None:
    x = torch.randn(80, 1, 8, generator=torch.Generator().manual_seed(4))
    whole = quantize(x, 4, 32, "channel")
    first = quantize(x[:64], 4, 32, "channel")
    assert torch.equal(whole[0][:64], first[0]) and torch.equal(whole[1][:2], first[1])


@pytest.mark.parametrize(
    ("bits", "group", "axis"), [(3, 16, "token"), (4, 0, "token"), (4, 16, "row"), (16, 16, "channel")]
)
def test_refuses_what_it_cannot_do(bits: int, group: int, axis: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        quantize(torch.zeros(4, 4), bits, group, axis)


def test_refuses_tensors_of_other_arguments() -> None:
    codes, scale, minimum = quantize(torch.randn(32, 2, 16), 4, 16, "token")
    with pytest.raises(ValueError, match="channels"):
        dequantize(codes, scale, minimum, 4, 16, "token", 20)
    with pytest.raises(ValueError, match="scale"):
        dequantize(codes, scale, minimum, 4, 16, "channel", 16)
    with pytest.raises(ValueError, match="whole chunks"):
        dequantize_chunks(codes, scale, minimum, torch.tensor([0]), torch.tensor([0]), 5, 4, 16, "token", 16)
