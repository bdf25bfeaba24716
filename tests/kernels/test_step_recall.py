"""The kernels that bring rows back within a step, against what is chosen and read on the host."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvsluice.compression.codec_slots import Affine
from kvsluice.compression.hidden_rows import pack_hidden
from kvsluice.compression.propagation_slots import RecallPlan
from kvsluice.compression.recalled_chunks import RecalledChunks
from kvsluice.kernels.hot_set import pack_records
from kvsluice.kernels.quantize import dequantize
from kvsluice.kernels.step_attention.recalled import JOB_FIELDS, RecallView, recall_job

triton = pytest.importorskip("triton")

from kvsluice.kernels.step_attention.triton.recall import bring_chunks, rank_hidden, unpack_rows  # noqa: E402

NUM_HIDDEN, FIRST = 37, 3


class Hidden:
    """Chunks that may come back: every second one behind the first few."""

    def __init__(self, plan: RecallPlan, device) -> None:
        self.plan, self.device = plan, device
        self.chunks = (torch.arange(NUM_HIDDEN) * 2 + FIRST + 1).int().to(device)

    def __len__(self) -> int:
        return NUM_HIDDEN

    def position(self, number: int) -> int:
        return (number * 2 + FIRST + 1) * self.plan.chunk


def job_of(hidden, own, packed=None, pages=None, page_chunks=0, codec=None, width=0):
    plan, codec = hidden.plan, codec or Affine(8, "token", 64)
    view = RecallView(
        plan.layer, plan.chunk, plan.a_row, plan.capacity, own.state, own.ids, own.here, hidden.chunks, FIRST, packed,
        pages, page_chunks, codec.bits, codec.group, width, (),
    )  # fmt: skip
    return recall_job(view, 0, 1)


def jobs_of(*jobs, device):
    """The last one is idle."""
    idle = torch.zeros(JOB_FIELDS, dtype=torch.int64)
    idle[0] = -1
    table = torch.stack((*jobs, idle))
    table[: len(jobs), 0] = torch.arange(len(jobs))
    return table.to(device)


def run_step(jobs, plan, mass, position, device):
    """What one row wants that gives the chunks so much. Returns numbers and places."""
    most = 4
    places = torch.arange(NUM_HIDDEN, dtype=torch.int32, device=device) * 2 + 1
    weights = torch.from_numpy(mass).to(device).view(1, 1, -1).repeat(2, 1, 1)
    counts, at = torch.tensor([[NUM_HIDDEN]], dtype=torch.int32, device=device), torch.tensor([position], device=device)
    keys = torch.full((2, 64), -7, dtype=torch.int64, device=device)
    rank_hidden[(2, 4)](
        jobs, at, places, counts, weights, keys, NUM_HIDDEN, 64,
        NUM_KV_HEADS=1, CHUNK=plan.chunk, BLOCK_N=16, BLOCK_K=16,
    )  # fmt: skip
    numbers = torch.full((2, most), -7, dtype=torch.int32, device=device)
    found = torch.full((2, most * plan.chunk, 2), -7, dtype=torch.int64, device=device)
    brought = torch.full((1,), -7, dtype=torch.int64, device=device)
    bring_chunks[(2,)](
        jobs, at, keys.topk(most, dim=1).values, numbers, found, brought, 2,
        CHUNK=plan.chunk, MOST=most, BLOCK_A=16, num_warps=1,
    )  # fmt: skip
    return numbers.cpu(), found.cpu(), int(brought)


@pytest.mark.parametrize("pass_rows", [1, 3])
@pytest.mark.parametrize("a_row", [1, 3])
def test_a_device_brings_back_what_the_host_does(a_row, pass_rows, device) -> None:
    """Masses that are often alike, now and then of nothing; steps that are undone; passes of the host in between."""
    plan = RecallPlan(0, 2, NUM_HIDDEN, 7, a_row, pass_rows)
    hidden, rng = Hidden(plan, device), np.random.default_rng(a_row)
    one, other = RecalledChunks(hidden), RecalledChunks(hidden)
    assert other.make() and not other.make()
    jobs, undone = jobs_of(job_of(hidden, other.on_device), device=device), 0
    for position in range(200, 260):
        mass = (rng.integers(0, 4, NUM_HIDDEN) * (position % 11 > 0) / 128).astype(np.float32)
        one.choose(mass.copy()[None], [position])
        if position % 7 == 0:
            other.catch_up()
            other.choose(mass.copy()[None], [position])
            continue
        other.begin_step()
        numbers, (positions, places), brought = run_step(jobs, plan, mass, position, device)
        assert brought == one.num_brought
        joining = [chunk.number for chunk in one.joining]
        assert numbers[0].tolist() == joining + [-1] * (4 - len(joining))
        rows = [(hidden.position(chunk.number) + i, chunk.slot * 2 + i) for chunk in one.joining for i in range(2)]
        assert list(zip(positions[:, 0].tolist(), places[:, 0].tolist(), strict=True)) == rows + [(-1, -1)] * (
            8 - len(rows)
        )
        assert (numbers[1] == -1).all() and (positions[:, 1] == -1).all() and (places[:, 1] == -1).all()
        if position % 5 == 0:
            other.catch_up()
            assert (other.held, other.num_brought) == (one.held, one.num_brought)
            assert [chunk.slot for chunk in other.all] == [chunk.slot for chunk in one.all]
        if position % 13 == 0:
            other.catch_up()
            back = position - position % 2
            results = one.undo(back), other.undo(back)
            assert results[0] == results[1] and other.held == one.held
            undone += results[0]
    assert undone and one.num_brought > 4 * plan.num_slots


@pytest.mark.parametrize("in_host", [False, True], ids=["on the device", "in host memory"])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_are_unpacked_where_they_lie(bits, in_host, device) -> None:
    chunk, width, most, codec = 4, 80, 2, Affine(bits, "token", 64)
    plan = RecallPlan(0, chunk, NUM_HIDDEN, 7, most, 1)
    hidden, generator = Hidden(plan, device), torch.Generator().manual_seed(bits)
    rows = torch.randn(NUM_HIDDEN * chunk, width, generator=generator).to(device)
    packed = pack_hidden(rows, torch.arange(len(rows), device=device), codec, chunk)
    tensors = (packed["codes"], packed["scale"], packed["minimum"])
    wanted = dequantize(*tensors, bits, 64, "token", width)[:, 0]
    own = SimpleNamespace(state=wanted, ids=torch.zeros(9), here=wanted)
    if in_host:
        records, page_chunks = pack_records(tensors, chunk)[:, 0].cpu(), 5
        parts = [part.contiguous() for part in records.split(page_chunks)]
        held = [part.pin_memory() if device.type == "cuda" else part for part in parts]
        pages = torch.tensor([part.data_ptr() for part in held], device=device)
        job = job_of(hidden, own, None, pages, page_chunks, codec, width)
    else:
        job = job_of(hidden, own, tensors, None, 0, codec, width)
    numbers = torch.tensor([[3, 36], [-1, -1]], dtype=torch.int32, device=device)
    out = torch.full((most * chunk * 2, width), torch.nan, device=device)
    scale_bytes, code_bytes = 4, width * bits // 8
    unpack_rows[(len(out), 2)](
        jobs_of(job, device=device), numbers, out, 2,
        WIDTH=width, BITS=bits, GROUP=64, CHUNK=chunk, MOST=most, CODE_BYTES=code_bytes, SCALE_BYTES=scale_bytes,
        RECORD_BYTES=-(-chunk * (code_bytes + 2 * scale_bytes) // 16) * 16, BLOCK=64,
    )  # fmt: skip
    found = out.view(most * chunk, 2, width)
    expected = torch.cat((wanted[12:16], wanted[36 * 4 : 37 * 4]))
    torch.testing.assert_close(found[:, 0], expected, atol=1e-6, rtol=1e-6)
    assert not found[:, 1].any()
