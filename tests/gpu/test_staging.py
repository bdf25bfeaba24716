"""Layers of a CUDA device through pinned staging: the same frames as without it, while other work runs."""

from __future__ import annotations

import threading

import pytest
import torch

from kvsluice.compression.interfaces import EncodedLayer, Part
from kvsluice.kvstore.identity import FrameIdent
from kvsluice.services.framing import FramePacker
from kvsluice.services.staging import Staging, make_host_copies
from kvsluice.services.uploads import make_uploads

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

IDENT = FrameIdent(request_id="r", epoch=1, tenant="t", model_fingerprint="ab", recipe_fingerprint="cd")


def layer(index: int, rows: int) -> EncodedLayer:
    keys = torch.randn(rows, 8, 128, device="cuda", dtype=torch.bfloat16)
    codes = torch.randint(0, 255, (rows, 8, 64), device="cuda", dtype=torch.uint8)
    positions = torch.arange(rows, device="cuda", dtype=torch.int32)
    return EncodedLayer(
        index,
        {
            Part.KEYS: {"rows": keys},
            Part.VALUES: {"codes": codes, "scale": keys[:, :, 0].to(torch.float8_e4m3fn)},
            Part.POSITIONS: {"rows": positions},
        },
    )


@pytest.mark.parametrize("rows", [3, 1000, 40_000])
def test_staged_frames_equal_plain_ones(rows):
    copies = make_host_copies(torch.device("cuda"))
    assert isinstance(copies, Staging)
    plain, staged = FramePacker(IDENT, rows), FramePacker(IDENT, rows, copies=copies)
    for index in range(3):
        encoded = layer(index, rows)
        assert staged.add(encoded, copies.mark() if index else None) == plain.add(encoded)
    assert staged.flush() == plain.flush()


def test_layers_packed_on_another_thread_are_complete_and_their_memory_is_not_reused_early():
    copies = make_host_copies(torch.device("cuda"))
    packer, plain = FramePacker(IDENT, 20_000, copies=copies), FramePacker(IDENT, 20_000)
    frames, threads = [[] for _ in range(6)], []
    wanted = []
    work = torch.randn(4096, 4096, device="cuda")
    for index in range(6):
        for _ in range(20):  # the device is busy for a while before a layer is complete
            work = (work @ work).clamp(-1, 1)
        encoded = layer(index, 20_000)
        wanted.append(plain.add(layer_copy(encoded)))
        after = copies.mark()

        def pack(index=index, encoded=encoded, after=after):
            if index:
                threads[index - 1].join()
            frames[index] += packer.add(encoded, after)

        threads.append(threading.Thread(target=pack))
        threads[-1].start()
        del encoded, pack
        # takes the memory of any layer that was let go of too early
        trash = [torch.full((20_000, 8, 128), torch.nan, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        del trash
    for thread in threads:
        thread.join()
    assert frames == wanted


def layer_copy(encoded: EncodedLayer) -> EncodedLayer:
    return EncodedLayer(
        encoded.layer, {part: {n: t.clone() for n, t in group.items()} for part, group in encoded.tensors.items()}
    )


def test_marking_does_not_wait_for_the_device():
    copies = make_host_copies(torch.device("cuda"))
    work = torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    for _ in range(50):
        work = (work @ work).clamp(-1, 1)
    after = copies.mark()
    assert not after.query(), "the device has not come that far yet"
    torch.cuda.synchronize()
    assert after.query()


def test_layers_arrive_beside_running_work() -> None:
    device = torch.device("cuda")
    uploads = make_uploads(device)
    generator = torch.Generator().manual_seed(0)
    layers = [
        EncodedLayer(i, {Part.KEYS: {"rows": torch.randn(70_000 + i, 2, 64, generator=generator).bfloat16()}})
        for i in range(6)
    ]
    a = torch.randn(4096, 4096, device=device)
    arrived = []
    for layer in layers:
        for _ in range(20):
            a = (a @ a).clamp_(-1, 1)
        arrived.append(uploads.upload(layer))
    for layer, (there, wait) in zip(layers, arrived, strict=True):
        wait()
        assert torch.equal(there.tensors[Part.KEYS]["rows"].cpu(), layer.tensors[Part.KEYS]["rows"])
