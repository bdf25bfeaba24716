"""Encodes finished layers: at once on a CPU, beside the next layer on a GPU.

    engine thread, its stream:     layer L ─ ready ─> layer L+1 …                      take: waits for `done`
    encoder thread, side stream:             └──────> compress layer L ─ done ──────────┘

A compressor launches many small operations that leave most of the device idle, so on a GPU it runs on a stream of its
own, and on a thread of its own, one layer after the other: the engine goes on launching, whatever a compressor may wait
for. Everything that a compressor keeps between layers is made and used on the side stream alone. What crosses streams
is announced to the allocator, so that nobody is given memory that another stream still reads; that is why numbers are
the same bits either way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from ...compression.interfaces import Compressor, EncodedLayer, LayerObs

Result = tuple[list[EncodedLayer], Tensor | None]
"""What `Compressor.finish_layer` returns."""


class Encoding(Protocol):
    """A layer that is being encoded."""

    def done(self) -> bool:
        """Whether `take` would return at once."""
        ...

    def take(self) -> Result:
        """The result, for the calling thread's stream. Raises what the compressor raised."""
        ...


class Encoder(Protocol):
    """Where compressors run.

    Attributes:
        overlaps: whether `start` returns before the layer is encoded.
    """

    overlaps: bool

    def start(self, compressor: Compressor, obs: LayerObs) -> Encoding:
        """Begin to encode a layer whose computation the calling thread has launched; takes `obs` over."""
        ...


def make_encoder(device: torch.device) -> Encoder:
    """Beside the engine on a CUDA device, in the engine's thread otherwise."""
    return SideEncoder(CudaSide(device)) if device.type == "cuda" else InlineEncoder()


class _Done:
    def __init__(self, result: Result) -> None:
        self._result = result

    def done(self) -> bool:
        return True

    def take(self) -> Result:
        return self._result


class InlineEncoder:
    """Encodes in the calling thread."""

    overlaps = False

    def start(self, compressor: Compressor, obs: LayerObs) -> Encoding:
        """See `Encoder`. Raises what the compressor raises."""
        return _Done(compressor.finish_layer(obs))


class Event(Protocol):
    """A point in a stream."""


class Side(Protocol):
    """A second stream of a device."""

    def leave(self, tensors: Iterable[Tensor]) -> Event:
        """The calling thread's stream has launched what makes these tensors, which go to the side stream."""
        ...

    def working(self, ready: Event) -> AbstractContextManager[None]:
        """Work launched within runs on the side stream, behind `ready`."""
        ...

    def finish(self) -> Event:
        """Behind what was launched on the side stream."""
        ...

    def join(self, done: Event, tensors: Iterable[Tensor]) -> None:
        """The calling thread's stream goes on behind `done`, and takes over these tensors."""
        ...


class CudaSide:
    """A side stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def leave(self, tensors: Iterable[Tensor]) -> Event:
        """See `Side`."""
        for tensor in tensors:
            tensor.record_stream(self._stream)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record(torch.cuda.current_stream(self._device))
        return ready

    @contextmanager
    def working(self, ready: Event) -> Iterator[None]:
        """See `Side`."""
        assert isinstance(ready, torch.cuda.Event), "made by `leave`"
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            yield

    def finish(self) -> Event:
        """See `Side`."""
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(self._stream)
        return done

    def join(self, done: Event, tensors: Iterable[Tensor]) -> None:
        """See `Side`."""
        assert isinstance(done, torch.cuda.Event), "made by `finish`"
        current = torch.cuda.current_stream(self._device)
        current.wait_event(done)
        for tensor in tensors:
            tensor.record_stream(current)


class _Beside:
    def __init__(self, side: Side, future: Future[tuple[Result, Event]]) -> None:
        self._side = side
        self._future = future

    def done(self) -> bool:
        return self._future.done()

    def take(self) -> Result:
        (encoded, selected), done = self._future.result()
        tensors = [tensor for layer in encoded for group in layer.tensors.values() for tensor in group.values()]
        self._side.join(done, tensors if selected is None else [*tensors, selected])
        return encoded, selected


class SideEncoder:
    """Encodes on one thread and one stream beside the caller's."""

    overlaps = True

    def __init__(self, side: Side) -> None:
        self._side = side
        self._thread = ThreadPoolExecutor(1, "prefill-encoder")

    def start(self, compressor: Compressor, obs: LayerObs) -> Encoding:
        """See `Encoder`."""
        ready = self._side.leave(_tensors(obs))
        return _Beside(self._side, self._thread.submit(self._run, compressor, obs, ready))

    @torch.no_grad()
    def _run(self, compressor: Compressor, obs: LayerObs, ready: Event) -> tuple[Result, Event]:
        with self._side.working(ready):
            result = compressor.finish_layer(obs)
            return result, self._side.finish()


def _tensors(obs: LayerObs) -> list[Tensor]:
    """Everything that a compressor reads of a layer."""
    always = [obs.positions, obs.k_pre, obs.k, obs.v, obs.q_window]
    return always + [tensor for tensor in (obs.mass, obs.query_peak, obs.hidden) if tensor is not None]
