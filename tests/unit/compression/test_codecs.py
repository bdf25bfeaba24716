"""Codecs: what comes back, how much it takes, and the orderings that published methods rest on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvsluice.compression import slots as s
from kvsluice.compression.codecs import compact, owned

HEADS, DIM = 2, 24
CODECS = [
    s.Native(),
    s.Dense("bfloat16"),
    s.Dense("float16"),
    *(s.Affine(bits=bits, axis=axis, group=16) for bits in (8, 4, 2) for axis in ("channel", "token")),
    s.Affine(bits=4, axis="token", group=64),
    *(s.LowRank(rank=rank, bits=bits) for rank in (7, 48) for bits in (16, 8, 4)),
]


def channel_outlier_keys(n: int = 512) -> Tensor:
    """Keys as models make them: a few channels far from zero, the same sign in every row."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(n, HEADS, DIM, generator=generator)
    keys[:, :, [1, 7, 20]] = keys[:, :, [1, 7, 20]] * 0.5 + torch.tensor([12.0, -9.0, 7.0])
    return keys


def error(codec: s.CodecFilling, rows: Tensor) -> float:
    built = codec.build()
    basis = built.fit(rows)
    back = built.reader(built.encode(rows, basis), basis, DIM, 1).read_all()
    return float((back.float() - rows).norm() / rows.norm())


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("n", [4, 68])
def test_tensors_are_those_of_the_spec_and_chunks_equal_a_full_decode(codec: s.CodecFilling, n: int) -> None:
    rows = channel_outlier_keys(n)
    built = codec.build()
    basis = built.fit(rows)
    tensors = built.encode(rows, basis)
    for got, want in (
        (tensors, codec.tensor_specs(n, HEADS, DIM, "float32")),
        (basis, codec.basis_specs(HEADS, DIM)),
    ):
        assert {k: (str(t.dtype)[6:], tuple(t.shape)) for k, t in got.items()} == {
            k: (spec.dtype, spec.shape) for k, spec in want.items()
        }
        assert all(t.untyped_storage().nbytes() == t.nbytes == want[k].nbytes for k, t in got.items())
    reader = built.reader(tensors, basis, DIM, 4)
    full = reader.read_all().float()
    heads, chunks = torch.tensor([1, 0, 1]), torch.tensor([n // 4 - 1, 0, 0])
    for entry, head, chunk in zip(reader.read(heads, chunks), heads, chunks, strict=True):
        # a product of a few rows may round differently than one of all rows
        assert torch.allclose(entry, full[chunk * 4 : chunk * 4 + 4, head], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_blocks_encoded_one_by_one_equal_all_at_once(codec: s.CodecFilling) -> None:
    rows = channel_outlier_keys(96)
    built = codec.build()
    basis = built.fit(rows)
    whole = built.encode(rows, basis)
    block = max(32, codec.append_block)
    parts = [built.encode(rows[i : i + block], basis) for i in range(0, 96, block)]
    for name, tensor in whole.items():
        joined = torch.cat([part[name] for part in parts])
        if codec.kind != "lowrank":
            assert torch.equal(joined, tensor)
        else:
            assert joined.shape == tensor.shape


def test_native_returns_the_same_bits() -> None:
    rows = channel_outlier_keys(40)
    assert error(s.Native(), rows) == 0


def test_low_rank_is_exact_at_full_rank() -> None:
    # bfloat16 rounds rows and basis by 2^-9 each; the errors of 48 terms add up incoherently
    assert error(s.LowRank(rank=HEADS * DIM, bits=16), channel_outlier_keys()) < 2**-8


def test_low_rank_is_the_truncated_svd() -> None:
    rows = channel_outlier_keys()
    u, sv, vh = torch.linalg.svd(rows.flatten(1), full_matrices=False)
    best = (u[:, :7] * sv[:7]) @ vh[:7]
    optimum = float((best - rows.flatten(1)).norm() / rows.norm())
    assert optimum <= error(s.LowRank(rank=7, bits=16), rows) < optimum + 2**-8


def test_low_rank_error_falls_with_rank_and_bits() -> None:
    rows = channel_outlier_keys()
    errors = [error(s.LowRank(rank=rank, bits=16), rows) for rank in (4, 12, 30, 48)]
    assert errors == sorted(errors, reverse=True)
    errors = [error(s.LowRank(rank=12, bits=bits), rows) for bits in (4, 8, 16)]
    assert errors == sorted(errors, reverse=True)


def test_low_rank_basis_does_not_depend_on_a_sign() -> None:
    rows = channel_outlier_keys()
    built = s.LowRank(rank=6).build()
    basis = built.fit(rows)["basis"]
    assert torch.equal(basis, built.fit(-rows)["basis"])
    assert basis.flatten(1).gather(1, basis.flatten(1).abs().argmax(1, keepdim=True)).gt(0).all()


def test_keys_with_channel_outliers_want_groups_along_channels() -> None:
    """The ordering that KIVI rests on, for 2 and 4 bits."""
    rows = channel_outlier_keys()
    for bits in (2, 4):
        per_channel = error(s.Affine(bits=bits, axis="channel", group=32), rows)
        assert per_channel < 0.7 * error(s.Affine(bits=bits, axis="token", group=64), rows)


def test_rows_with_outlier_tokens_want_groups_along_tokens() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(512, HEADS, DIM, generator=generator)
    rows *= torch.exp(1.5 * torch.randn(512, 1, 1, generator=generator))
    small, large = (s.Affine(bits=2, axis=axis, group=32) for axis in ("token", "channel"))

    def relative(codec: s.Affine) -> Tensor:
        built = codec.build()
        back = built.reader(built.encode(rows, {}), {}, DIM, 1).read_all()
        return ((back - rows).norm(dim=-1) / rows.norm(dim=-1)).mean()

    assert relative(small) < 0.7 * relative(large)


def test_owned_and_compact_keep_no_larger_storage_alive() -> None:
    x = torch.randn(10, 4)
    for view in (x[2:5], x.T, x[:, 1:3]):
        for out in (owned(view, torch.float32), owned(view, torch.bfloat16), compact(view)):
            assert out.is_contiguous() and out.untyped_storage().nbytes() == out.nbytes
    assert owned(x, torch.float32).data_ptr() != x.data_ptr() and compact(x) is x
