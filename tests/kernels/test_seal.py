"""Blocks that are packed together, against plain torch, block by block; and rows that move to the front."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvsluice.kernels.dispatch import REFERENCE, forced
from kvsluice.kernels.seal import SEAL_FIELDS, SealKey, move_rows, seal_blocks, serves
from kvsluice.kernels.step_attention import Layout

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
LOWRANK = Layout("lowrank", bits=8, rank=30)
CHANNEL = Layout("channel", bits=4, group=32)
TOKEN = Layout("token", bits=4, group=64)
DENSE = Layout("dense", dtype=BF16)


def key_of(keys=LOWRANK, values=TOKEN, dtype=F32, rows=32, chunk=4, bits=8, heads=2, dim=64) -> SealKey:
    return SealKey(keys, values, dtype, rows, chunk, bits, keys.kind == "lowrank", heads, dim)


KEYS = {
    "lowrank8": key_of(),
    "lowrank4": key_of(replace(LOWRANK, bits=4), heads=1, dim=128),
    "lowrank16": key_of(replace(LOWRANK, bits=16, rank=160), heads=8, dim=96),
    "channel4": key_of(CHANNEL, dim=96),
    "channel2": key_of(replace(CHANNEL, bits=2), replace(TOKEN, bits=2, group=32), heads=1, dim=128),
    "channel in groups of 16": key_of(replace(CHANNEL, group=16), rows=64, chunk=8, bits=16),
    "token8": key_of(replace(TOKEN, bits=8, group=128), replace(TOKEN, group=16), heads=8),
    "balanced": key_of(replace(TOKEN, bits=2, group=32, balanced=True), dim=96),
    "float8": key_of(Layout("float8"), Layout("float8"), bits=0),
    "dense": key_of(DENSE, Layout("dense", dtype=F32), chunk=1, bits=16),
    "half": key_of(Layout("dense", dtype=F16), DENSE, rows=16, chunk=8),
    "low-rank values": key_of(DENSE, replace(LOWRANK, rank=12), bits=0, rows=128),
    "odd rank": key_of(replace(LOWRANK, bits=16, rank=7), heads=8),
    "tails of float16": key_of(dtype=F16),
    "tails of bfloat16": key_of(dtype=BF16),
}


class Jobs:
    """Blocks with memory to pack them to, and the table that names it."""

    def __init__(self, key: SealKey, count: int, seed: int, device) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (key.num_rows, key.num_kv_heads, key.head_dim)

        def random(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator)

        def shared(layout: Layout) -> torch.Tensor | None:
            if layout.kind == "lowrank":
                return (random(layout.rank, *shape[1:]) / 8).to(BF16).to(device)
            if layout.kind == "float8":
                return torch.tensor([0.004], device=device)
            return (0.1 + random(1, *shape[1:]).abs()).to(device) if layout.balanced else None

        self.key = key
        self.tails = [[random(*shape).to(key.dtype).to(device) for _ in range(2)] for _ in range(count)]
        self.tails[0][1].fill_(0.5)  # groups that are constant
        self.tails[-1][0][:, 0] = 1e-7
        self.shared = [[shared(key.keys), shared(key.values)] for _ in range(count)]
        angles = 9.0 * random(count * key.num_rows, key.head_dim // 2).to(device)
        angles = torch.cat((angles, angles), dim=1)
        self.cos, self.sin = angles.cos(), angles.sin()

    def packed(self, layout: Layout, device) -> list[torch.Tensor]:
        key, lead = self.key, (self.key.num_rows, self.key.num_kv_heads)
        if layout.kind == "dense":
            return [torch.zeros(*lead, key.head_dim, dtype=layout.dtype, device=device)]
        if layout.kind == "float8":
            return [torch.zeros(*lead, key.head_dim, dtype=torch.uint8, device=device)]
        channels, groups = key.head_dim, (*lead, -(-key.head_dim // layout.group) if layout.group else 0)
        if layout.kind == "channel":
            groups = (key.num_rows // layout.group, key.num_kv_heads, key.head_dim)
        if layout.kind == "lowrank":
            lead, channels, groups = lead[:1], layout.rank, (key.num_rows, 1)
            if layout.bits == 16:
                return [torch.zeros(*lead, layout.rank, dtype=BF16, device=device)]
        codes = torch.zeros(*lead, -(-channels * layout.bits // 8), dtype=torch.uint8, device=device)
        return [codes, *(torch.zeros(groups, dtype=F16, device=device) for _ in range(2))]

    def run(self, picked: list[int], device) -> list[list[torch.Tensor]]:
        """Pack some of the blocks; per block all that was written."""
        key, table, out = self.key, [], []
        count = key.num_rows // key.chunk
        for job in picked:
            keys, values = self.packed(key.keys, device), self.packed(key.values, device)
            kind = torch.int8 if key.landmark_bits == 8 else BF16
            marks = [torch.zeros(count, key.num_kv_heads, key.head_dim, dtype=kind, device=device)]
            marks.append(torch.zeros(count, key.num_kv_heads, dtype=F16, device=device))
            places = [t.data_ptr() for t in self.tails[job]] + [job * key.num_rows]
            for tensors, shared in zip((keys, values), self.shared[job], strict=True):
                places += [t.data_ptr() for t in tensors] + [0] * (3 - len(tensors))
                places.append(0 if shared is None else shared.data_ptr())
            table.append(places + [t.data_ptr() for t in marks])
            out.append([*keys, *values, *marks])
        seal_blocks(key, torch.tensor(table, dtype=torch.int64, device=device), self.cos, self.sin)
        return out


@pytest.mark.parametrize("name", KEYS)
def test_blocks_are_packed_as_each_would_be(name, compiled, device):
    key = KEYS[name]
    jobs = Jobs(key, 3, 1, torch.device("cpu"))
    if device.type == "cuda":
        pytest.skip("the reference reads the host's memory; tests/gpu compares with caches")
    with forced(REFERENCE):
        wanted = jobs.run([0, 1, 2], device)
    found = compiled(jobs.run, [0, 1, 2], device)
    exact = "lowrank" not in (key.keys.kind, key.values.kind)
    for one, other in zip(found, wanted, strict=True):
        for place, (got, want) in enumerate(zip(one, other, strict=True)):
            landmarks = place >= len(one) - 2
            if exact and not landmarks:
                assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), place
            else:
                _near(got, want)


def _near(got: torch.Tensor, want: torch.Tensor) -> None:
    """Sums are in another order, which moves few numbers over the edge between two codes."""
    if got.dtype in (torch.uint8, torch.int8):
        off = (got.int() - want.int()).abs()
        # the upper of two 4-bit codes in a byte counts 16 times
        assert set(off.unique().tolist()) <= {0, 1, 15, 16, 17} and (off > 0).float().mean() < 0.01
    else:
        torch.testing.assert_close(got, want, rtol=1e-2 if got.dtype == BF16 else 2e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["lowrank8", "channel4", "balanced"])
def test_a_block_does_not_see_the_others(name, compiled, device):
    jobs = Jobs(KEYS[name], 4, 2, device)
    together = compiled(jobs.run, [0, 1, 2, 3], device)
    for picked in ([2], [3, 2, 0]):
        found = compiled(jobs.run, picked, device)
        for one, job in zip(found, picked, strict=True):
            for got, want in zip(one, together[job], strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize(
    "changes",
    [{"num_rows": 48}, {"num_rows": 8}, {"num_rows": 256}, {"chunk": 64}, {"head_dim": 40}, {"dtype": torch.float64}],
)
def test_other_blocks_are_not_served(changes):
    key = replace(key_of(), **changes)
    assert serves(key_of()) and not serves(key)
    with pytest.raises(ValueError, match="not served"):
        seal_blocks(key, torch.zeros(1, SEAL_FIELDS, dtype=torch.int64), torch.zeros(0), torch.zeros(0))


def test_groups_of_rows_that_cross_blocks_are_not_served():
    assert not serves(key_of(replace(CHANNEL, group=64)))
    assert not serves(key_of(replace(LOWRANK, rank=31)))


@pytest.mark.parametrize("which", ["table", "fields", "angles"])
def test_tensors_that_do_not_fit_are_refused(which):
    table = torch.zeros(1, SEAL_FIELDS, dtype=torch.int32 if which == "table" else torch.int64)
    table = table[:, :-1] if which == "fields" else table
    angles = torch.zeros(32, 32 if which == "angles" else 64)
    with pytest.raises(ValueError, match="table" if which != "angles" else "angles"):
        seal_blocks(key_of(), table, angles, angles)


@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize("least", [1, 32])
def test_rows_move_to_the_front(name, least, device):
    if name == "reference" and device.type == "cuda":
        pytest.skip("the reference reads the host's memory")
    shapes = [(64, 2, 32), (192, 2, 32), (70, 2, 32), (40, 2, 32)]
    spans = [(32, 32), (32, 129), (least, 70 - least), (40, 0)]
    before = [torch.randn(shape, device=device) for shape in shapes]
    after = [rows.clone() for rows in before]
    table = [[rows.data_ptr(), *span] for rows, span in zip(after, spans, strict=True)]
    with forced(name):
        move_rows(torch.tensor(table, device=device), 2 * 32 * 4, least)
    for old, new, (first, count) in zip(before, after, spans, strict=True):
        assert torch.equal(new[:count], old[first : first + count])
        assert torch.equal(new[count:], old[count:])
