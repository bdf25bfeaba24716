"""`kvsluice bench handoff`: what it takes to bring a prompt's encoded layers from prefill into a decode cache.

    to host    tensors of all layers to the host's memory
    frames     packed into frames: serialised and hashed, from tensors on the host
    layers     frames checked and put together to layers again
    cache      layers into a decode engine, to the device and with landmarks built
    gRPC       all of it as the service does it: publisher and receiver over a loopback connection, both in this process

The first four run one after another, so that each has its own rate. The service overlaps them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..compression.interfaces import EncodedLayer
from ..compression.recipe import Recipe
from ..models.sampling import SamplingParams
from ..services.decode.engine import DecodeEngine, DecodeRequest, EmittedChoice
from ..services.staging import make_host_copies
from .bench_results import Floor, Row, Timing
from .rows import measured
from .sequences import fill_layers, told
from .subject import Bench, bench_ident
from .timing import summarize, time_once

STAGES = ("to host", "frames", "layers", "cache")
GRPC = "gRPC"
REQUEST = "handed-over"
NEW_TOKENS = 2
FRAME_BYTES = 1 << 20  # of the service


def measure(bench: Bench) -> list[Row]:
    """A row for every recipe, context and stage."""
    options, rows = bench.options, []
    bench.progress.expect(len(options.contexts) * len(bench.subject.recipes))
    for context in options.contexts:
        for label, recipe in bench.subject.recipes.items():
            bench.progress.begin(f"handoff of {context} tokens, {label}")
            rows += _rows(bench, label, recipe, context)
    return rows


def absent_library(module: str) -> str | None:
    """The library that a module of this package lacks, or None."""
    try:
        importlib.import_module(module, __package__)
    except ModuleNotFoundError as exc:
        return exc.name
    return None


def _cut(tensor: Tensor) -> list[Tensor]:
    """The rows, as many together as a frame holds."""
    step = max(1, FRAME_BYTES * len(tensor) // max(1, tensor.nbytes))
    return [tensor[begin : begin + step] for begin in range(0, len(tensor), step)]


def _rows(bench: Bench, label: str, recipe: Recipe, context: int) -> list[Row]:
    layers: list[EncodedLayer] = []
    with torch.inference_mode():
        fill_layers(bench, recipe, context, 0, layers.append)

    def row(stage: str) -> Row:
        return Row(
            what=f"handoff: {stage}",
            side=label,
            model=bench.subject.name,
            recipe_fingerprint=recipe.fingerprint,
            context=context,
            batch=1,
            conditions={"kv": bench.options.kv},
        )

    absent = absent_library("..services.framing")
    if absent is not None:
        return [replace(row(stage), not_run=f"{absent} is not installed") for stage in (*STAGES, GRPC)]
    handoff = Handoff(bench, recipe, context, layers)
    rows = [measured(bench, row(stage), partial(handoff.time_stage, stage)) for stage in STAGES]
    absent = absent_library(".handoff_grpc")
    if absent is not None:
        return [*rows, replace(row(GRPC), not_run=f"{absent} is not installed")]
    return [*rows, measured(bench, row(GRPC), handoff.time_grpc)]


@dataclass
class Handoff:
    """One prompt's layers and the ways that they go.

    Attributes:
        layers: as prefill hands them over, on the device.
    """

    bench: Bench
    recipe: Recipe
    context: int
    layers: list[EncodedLayer]

    def __post_init__(self) -> None:
        self.ident = bench_ident(REQUEST, self.bench.model.fingerprint, self.recipe.fingerprint)
        self.copies = make_host_copies(self.bench.device)
        self.on_host = [_on_host(layer) for layer in self.layers]
        self.frames = self.pack(self.on_host)
        sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
        self.request = DecodeRequest(REQUEST, 1, self.context, self.recipe, sampling)
        bound = DecodeEngine(self.bench.model, 1).demand(self.request).total_bytes
        self.capacity_bytes = bound

    def pack(self, layers: list[EncodedLayer]) -> list[bytes]:
        """All frames of the layers."""
        from ..services.framing import FramePacker

        packer = FramePacker(self.ident, self.context)
        return [frame for layer in layers for frame in packer.add(layer)] + packer.flush()

    def copy_out(self) -> None:
        """Every tensor's bytes to the host, through the buffers that the service copies through."""
        tensors = [t for layer in self.layers for group in layer.tensors.values() for t in group.values()]
        for _ in self.copies.to_host(([rows] for t in tensors for rows in _cut(t)), self.copies.mark()):
            pass

    def assemble(self) -> list[EncodedLayer]:
        """The layers again, out of their frames."""
        from ..services.framing import LayerAssembler

        assembler = LayerAssembler(self.ident, self.bench.subject.shape.num_layers, self.capacity_bytes)
        return [layer for frame in self.frames for layer in assembler.add(frame)]

    def open(self) -> DecodeEngine:
        """A decode engine that waits for the layers."""
        engine = DecodeEngine(self.bench.model, self.capacity_bytes)
        engine.open(self.request)
        told(engine.step())
        return engine

    def place(self, engine: DecodeEngine, layers: list[EncodedLayer]) -> None:
        """Layers into the engine, and the start of the sequence."""
        for layer in layers:
            engine.add_layer(REQUEST, layer)
        engine.commit(REQUEST, self.bench.prompt(self.context), [EmittedChoice((0,))])

    def time_stage(self, stage: str, empty: Row) -> Row:
        """Time one of `STAGES`."""
        actions: Mapping[str, Callable[[], Callable[[], object]]] = {
            "to host": lambda: self.copy_out,
            "frames": lambda: lambda: self.pack(self.on_host),
            "layers": lambda: self.assemble,
            "cache": lambda: partial(self.place, self.open(), self.assemble()),
        }
        return self.finished(empty, self._time(actions[stage]))

    def time_grpc(self, empty: Row) -> Row:
        """Time the way through gRPC, from the first layer on to the last acknowledgement."""
        from .handoff_grpc import Loopback

        loopback = Loopback(self)
        samples_s = loopback.run(self.bench.options.warmup + self.bench.options.repeats)
        return self.finished(empty, summarize(samples_s[self.bench.options.warmup :]))

    def finished(self, empty: Row, time: Timing) -> Row:
        """The row with its rate and floor, and how many bytes they are about."""
        framed, limits = sum(map(len, self.frames)), self.bench.limits
        encoded, whole = sum(layer.nbytes() for layer in self.layers), self._bf16_bytes
        figures = {"gb_per_s": framed / time.median_s / 1e9, "frame_bytes": float(framed)}
        crosses = empty.what.endswith(("to host", "cache"))
        floor = Floor.between(limits, encoded) if crosses else Floor.on_host(limits, 2 * framed)
        if empty.what.endswith("frames"):
            figures |= {
                "encoded_bytes": float(encoded),
                "frames": float(len(self.frames)),
                "encoded_over_bf16": encoded / whole,
                "frames_over_bf16": framed / whole,
            }
        return replace(empty, time=time, figures=figures, floor=floor)

    @property
    def _bf16_bytes(self) -> int:
        """Of the whole prompt's keys and values."""
        return self.bench.subject.shape.bf16_kv_bytes(self.context)

    def _time(self, prepare: Callable[[], Callable[[], object]]) -> Timing:
        options, samples_s = self.bench.options, []
        for index in range(options.warmup + options.repeats):
            action = prepare()
            took_s = time_once(self.bench.device, action)
            del action  # an engine may hang on it, with caches that the next one needs the room of
            if index >= options.warmup:
                samples_s.append(took_s)
        return summarize(samples_s)


def _on_host(encoded: EncodedLayer) -> EncodedLayer:
    def copied(group: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: tensor.cpu() for name, tensor in group.items()}

    return replace(encoded, tensors={part: copied(group) for part, group in encoded.tensors.items()})
