"""Layers to a device through a few buffers: bytes, reuse, threads. A device is played by copies that happen late."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import pytest
import torch

from kvsluice.compression.interfaces import EncodedLayer, Part
from kvsluice.services.staging import Event
from kvsluice.services.uploads import BufferedUploads, make_uploads

CPU = torch.device("cpu")


class LateEvent:
    def __init__(self, device: LateDevice, place: int) -> None:
        self.device, self.place = device, place

    def synchronize(self) -> None:
        self.device.run_to(self.place)


class LateDevice:
    """Copies happen in order, when something waits for them."""

    def __init__(self) -> None:
        self.queue: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.done = 0
        self.buffers: list[torch.Tensor] = []
        self.joined: list[int] = []
        self.failing = False

    def run_to(self, place: int) -> None:
        while self.done < place:
            source, target = self.queue[self.done]
            target.copy_(source)
            self.done += 1

    def mark(self) -> LateEvent:
        return LateEvent(self, 0)

    def buffer(self, size_bytes: int) -> torch.Tensor:
        self.buffers.append(torch.full((size_bytes,), 0xAA, dtype=torch.uint8))
        return self.buffers[-1]

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], after: Event) -> LateEvent:
        if self.failing:
            raise RuntimeError("a lost device")
        self.queue += pairs
        return LateEvent(self, len(self.queue))

    def join(self, done: Event, tensors: Iterable[torch.Tensor]) -> None:
        assert isinstance(done, LateEvent)
        self.run_to(done.place)
        self.joined.append(len(list(tensors)))


@pytest.fixture
def device() -> LateDevice:
    return LateDevice()


def layer_of(seed: int, *shapes: tuple[int, ...]) -> EncodedLayer:
    generator = torch.Generator().manual_seed(seed)
    rows = {f"t{i}": torch.randn(shape, generator=generator).bfloat16() for i, shape in enumerate(shapes)}
    return EncodedLayer(seed, {Part.KEYS: rows, Part.POSITIONS: {"rows": torch.arange(7, dtype=torch.int32)}})


def same(one: EncodedLayer, other: EncodedLayer) -> bool:
    return one.layer == other.layer and all(
        torch.equal(tensor, other.tensors[part][name])
        for part, group in one.tensors.items()
        for name, tensor in group.items()
    )


@pytest.mark.parametrize("num_buffers", [1, 2, 3])
@pytest.mark.parametrize("shapes", [((3, 2),), ((500, 3), (1,), (0, 4)), ((64, 2), (4096,))])
def test_layers_arrive_whole_whatever_the_buffers(device: LateDevice, shapes, num_buffers: int) -> None:
    uploads = BufferedUploads(CPU, device, buffer_bytes=256, num_buffers=num_buffers)
    layers = [layer_of(seed, *shapes) for seed in range(4)]
    arrived = [uploads.upload(layer) for layer in layers]
    for layer, (there, wait) in zip(layers, arrived, strict=True):
        wait()
        assert same(layer, there)
        assert there.tensors[Part.KEYS]["t0"].data_ptr() != layer.tensors[Part.KEYS]["t0"].data_ptr()
    assert len(device.buffers) <= num_buffers
    assert device.joined == [len(shapes) + 1] * 4


def test_nothing_is_waited_for_while_buffers_are_free(device: LateDevice) -> None:
    uploads = BufferedUploads(CPU, device, buffer_bytes=1 << 16, num_buffers=2)
    uploads.upload(layer_of(0, (3, 2)))
    assert device.done == 0


def test_threads_do_not_mix_their_layers(device: LateDevice) -> None:
    uploads = BufferedUploads(CPU, device, buffer_bytes=128)
    layers = [layer_of(seed, (97, 5), (33,)) for seed in range(12)]
    found: dict[int, EncodedLayer] = {}

    def run(layer: EncodedLayer) -> None:
        there, wait = uploads.upload(layer)
        with uploads._lock:  # the device that is played has no order of its own
            wait()
        found[layer.layer] = there

    threads = [threading.Thread(target=run, args=(layer,)) for layer in layers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(layer, found[layer.layer]) for layer in layers)


def test_a_copy_that_fails_leaves_the_way_open(device: LateDevice) -> None:
    uploads = BufferedUploads(CPU, device, buffer_bytes=128)
    device.failing = True
    with pytest.raises(RuntimeError, match="a lost device"):
        uploads.upload(layer_of(0, (97, 5)))
    device.failing = False
    layer = layer_of(1, (97, 5))
    there, wait = uploads.upload(layer)
    wait()
    assert same(layer, there)


def test_on_a_cpu_the_layer_is_there_already() -> None:
    layer = layer_of(0, (3, 2))
    there, wait = make_uploads(CPU).upload(layer)
    wait()
    assert there is layer
