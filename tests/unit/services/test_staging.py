"""Copies to the host through a few buffers: order, bytes, waiting, errors. A device is played by threads."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import pytest
import torch

from kvsluice.compression.interfaces import EncodedLayer, Part
from kvsluice.kvstore.identity import FrameIdent
from kvsluice.services.framing import FramePacker, LayerAssembler
from kvsluice.services.staging import Event, PlainCopies, Staging, make_host_copies, tensor_bytes

WAIT_S = 10.0
IDENT = FrameIdent(request_id="r", epoch=1, tenant="t", model_fingerprint="ab", recipe_fingerprint="cd")


class FakeEvent:
    """Done once it is waited for; then the copies that it stands for have happened, and not before."""

    def __init__(self, device: FakeDevice, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.device, self.pairs, self.waited_by = device, pairs, threading.get_ident()

    def synchronize(self) -> None:
        if self.device.held is not None:
            assert self.device.held.wait(WAIT_S)
        for source, target in self.pairs:
            target.copy_(source)
        self.pairs = []
        self.waited_by = threading.get_ident()


class FakeDevice:
    """Buffers of its own make, poisoned when they are given out again."""

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []
        self.events: list[FakeEvent] = []
        self.after: list[Event | None] = []
        self.held: threading.Event | None = None
        self.failing = False

    def mark(self) -> FakeEvent:
        return FakeEvent(self, [])

    def buffer(self, size_bytes: int) -> torch.Tensor:
        if self.failing:
            raise RuntimeError("no pinned memory")
        self.buffers.append(torch.full((size_bytes,), 0xAA, dtype=torch.uint8))
        return self.buffers[-1]

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], after: Event | None) -> FakeEvent:
        if self.failing:
            raise RuntimeError("a lost device")
        taken = list(pairs)
        for _, target in taken:
            target.view(torch.uint8).fill_(0xAA)
        self.after.append(after)
        self.events.append(FakeEvent(self, taken))
        return self.events[-1]


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


def groups_of(*sizes: tuple[int, ...]) -> list[list[torch.Tensor]]:
    """Groups of tensors of these many float16 rows of three."""
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(rows, 3, generator=generator).half() for rows in group] for group in sizes]


def fetched(staging: Staging, groups: list[list[torch.Tensor]], after: Event | None = None) -> list[list[bytes]]:
    return [[bytes(data) for data in group] for group in staging.to_host(groups, after)]


def wanted(groups: list[list[torch.Tensor]]) -> list[list[bytes]]:
    return [[bytes(tensor_bytes(tensor)) for tensor in group] for group in groups]


@pytest.mark.parametrize("num_buffers", [1, 2, 5])
@pytest.mark.parametrize(
    "groups",
    [
        groups_of(),
        groups_of((1,)),
        groups_of((0,), (5, 0, 7), ()),
        groups_of(*[(3, 2)] * 40),
        groups_of((4,), (500,), (4,)),
        [[torch.arange(24.0).view(4, 6).t()[::2], torch.randn(5, 4, 3)[:, 1]]],
    ],
    ids=["none", "one", "empty", "many", "large", "strided"],
)
def test_bytes_come_in_order_whatever_the_buffers(device: FakeDevice, groups, num_buffers: int) -> None:
    staging = Staging(device, buffer_bytes=256, num_buffers=num_buffers)
    after = staging.mark()
    for _ in range(3):
        assert (
            fetched(staging, groups, after)
            == wanted(groups)
            == [list(map(bytes, g)) for g in PlainCopies().to_host(groups)]
        )
    assert len(device.buffers) <= min(num_buffers, 2)
    assert set(device.after) <= {after}


def test_the_next_copy_runs_while_a_group_is_read(device: FakeDevice) -> None:
    staging = Staging(device, buffer_bytes=128, num_buffers=2)
    reading = staging.to_host(groups_of((20,), (20,), (20,)), None)
    next(reading)
    assert len(device.events) == 2
    assert device.events[1].pairs, "it is not waited for yet"
    reading.close()


def test_marking_and_starting_wait_for_nothing(device: FakeDevice) -> None:
    device.held = threading.Event()
    staging = Staging(device)
    assert staging.mark().pairs == []
    got: list[list[list[bytes]]] = []
    groups = groups_of((20,), (30,))
    packing = threading.Thread(target=lambda: got.append(fetched(staging, groups)))
    packing.start()
    assert not got
    device.held.set()
    packing.join(WAIT_S)
    assert got == [wanted(groups)]
    assert device.events[0].waited_by != threading.get_ident()


def test_copies_follow_the_calling_threads_work_where_no_mark_is_given(device: FakeDevice) -> None:
    assert fetched(Staging(device), groups_of((3,))) == wanted(groups_of((3,)))
    assert len(device.after) == 1 and device.after[0] is not None


def test_more_threads_than_buffers_take_turns(device: FakeDevice) -> None:
    staging = Staging(device, buffer_bytes=64, num_buffers=2)
    groups = groups_of(*[(7,)] * 30)
    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda: results.append(fetched(staging, groups) == wanted(groups))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert results == [True] * 8
    assert len(device.buffers) <= 2


def test_one_who_stops_early_gives_its_buffers_back_when_their_copies_are_done(device: FakeDevice) -> None:
    staging = Staging(device, buffer_bytes=64, num_buffers=2)
    for _ in range(5):
        reading = staging.to_host(groups_of(*[(7,)] * 10), None)
        next(reading)
        reading.close()
        assert all(not event.pairs for event in device.events)
    assert fetched(staging, groups_of((7,), (7,))) == wanted(groups_of((7,), (7,)))


def test_a_fault_loses_no_buffer(device: FakeDevice) -> None:
    staging = Staging(device, buffer_bytes=64, num_buffers=1)
    device.failing = True
    with pytest.raises(RuntimeError, match="pinned"):
        fetched(staging, groups_of((7,)))
    device.failing = False
    assert fetched(staging, groups_of((7,))) == wanted(groups_of((7,)))
    device.failing = True
    with pytest.raises(RuntimeError, match="lost device"):
        fetched(staging, groups_of((7,)))
    device.failing = False
    assert fetched(staging, groups_of((7,))) == wanted(groups_of((7,)))
    assert len(device.buffers) == 1


def encoded(layer: int, rows: int) -> EncodedLayer:
    generator = torch.Generator().manual_seed(layer)
    keys = torch.randint(0, 255, (rows, 8), generator=generator, dtype=torch.uint8)
    return EncodedLayer(layer, {Part.KEYS: {"codes": keys}, Part.VALUES: {"rows": keys.float() / 3}})


def test_staged_frames_equal_plain_ones_and_hold_nothing_of_a_layer(device: FakeDevice) -> None:
    sizes = (3, 5, 4000, 2, 2, 700)
    staging = Staging(device, buffer_bytes=8192, num_buffers=2)
    plain = FramePacker(IDENT, 40, target_payload_bytes=4096, pack_bytes=1024)
    staged = FramePacker(IDENT, 40, target_payload_bytes=4096, pack_bytes=1024, copies=staging)
    assembler = LayerAssembler(IDENT, len(sizes), 10**6)
    arrived = []
    for index, rows in enumerate(sizes):
        layer = encoded(index, rows)
        frames = staged.add(layer, staging.mark())
        assert frames == plain.add(layer)
        for tensors in layer.tensors.values():
            for tensor in tensors.values():
                tensor.fill_(7)
        for buffer in device.buffers:
            buffer.fill_(0xBB)
        arrived += [done for frame in frames for done in assembler.add(frame)]
    frames = staged.flush()
    assert frames == plain.flush()
    arrived += [done for frame in frames for done in assembler.add(frame)]
    for got in arrived:
        want = encoded(got.layer, sizes[got.layer])
        for part, group in want.tensors.items():
            for name, tensor in group.items():
                assert torch.equal(got.tensors[part][name], tensor)


def test_tensors_in_host_memory_are_not_staged() -> None:
    copies = make_host_copies(torch.device("cpu"))
    assert isinstance(copies, PlainCopies) and copies.mark() is None
    tensor = torch.arange(12, dtype=torch.int32)
    ((data,),) = copies.to_host([[tensor]], None)
    tensor[0] = 9
    assert bytes(data[:4]) == b"\x09\0\0\0", "a view, not a copy"
