"""Peak memory of the prefill engine against prompt length and depth.

    python -m kvsluice.benchmarks.prefill_memory --tokens 2048 4096 8192 --layers 4 8 --recipe sluice

Prefill is layer-major, so beside the weights it should hold no more than

    c x max_pack_tokens  +  N x (one hidden row + one layer's Q, K and V)

for a prompt of N tokens, a few bytes a token aside: nothing that grows with N x layers. What a recipe needs to encode
one layer it makes in blocks of about 2,048 rows, which count as part of c. One line of JSON a run: `bytes_per_token`
compares with the shorter prompt of the same depth, `row_bytes` is the bracket above, `kv_cache_bytes` what the prompt's
whole KV takes in the compute dtype.

On a GPU the allocator's peak counts; elsewhere `LiveBytes`, which does not see what one operation allocates within
itself. Where attention takes an explicit mask (CPU), that adds up to 5 x chunk_tokens bytes a token.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..compression.interfaces import EncodedLayer
from ..compression.recipe import Recipe, get_recipe, resolve
from ..errors import KvsluiceError
from ..models.config import SHAPES, ModelConfig
from ..models.model import Model
from ..models.sampling import Sampled, SamplingParams
from ..models.weights import random_weights
from ..services.prefill.engine import PrefillEngine, PrefillJob
from .live_bytes import LiveBytes


class DiscardingSink:
    """Takes layers and lets go of them, as a publisher does that has sent them."""

    def __init__(self) -> None:
        self.error: KvsluiceError | None = None

    def ready(self) -> bool:
        return True

    def on_layer_start(self, layer: int) -> None:
        """Nothing to prepare."""

    def on_layer(self, encoded: EncodedLayer) -> None:
        """Not kept."""

    def on_first_tokens(self, sampled: list[Sampled]) -> None:
        """Not kept."""

    def on_done(self) -> None:
        """Nothing to close."""

    def on_error(self, error: KvsluiceError) -> None:
        self.error = error


@dataclass(frozen=True)
class Measurement:
    """One run.

    Attributes:
        peak_bytes: the most that was alive at once beside the weights.
        row_bytes: bytes of one hidden row and one layer's Q, K and V rows.
        kv_cache_bytes: the prompt's KV over all layers in the compute dtype.
    """

    num_tokens: int
    num_layers: int
    recipe: str
    peak_bytes: int
    row_bytes: int
    kv_cache_bytes: int


def measure(
    config: ModelConfig, num_tokens: int, recipe: Recipe, chunk_tokens: int, max_pack_tokens: int, device: torch.device
) -> Measurement:
    """Run one prompt of random tokens through a model of random weights.

    Args:
        recipe: with open numbers, or resolved.

    Raises:
        KvsluiceError: whatever prefill failed with.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = Model(config, random_weights(config, dtype, device, seed=0), fingerprint="random")
    engine = PrefillEngine(model, chunk_tokens, max_pack_tokens)
    generator = torch.Generator().manual_seed(0)
    ids = tuple(torch.randint(config.vocab_size, (num_tokens,), generator=generator).tolist())
    effective = resolve(recipe, engine.shape, num_tokens, {}).recipe
    sink = DiscardingSink()
    # two tokens are asked for, so that the last layer is encoded as well
    job = PrefillJob("measured", 1, ids, effective, SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
    peak_bytes = _peak_bytes(engine, job, sink, device)
    if sink.error is not None:
        raise sink.error
    kv_row = 2 * config.num_kv_heads * config.head_dim
    row = config.hidden_size + config.num_heads * config.head_dim + kv_row
    return Measurement(
        num_tokens=num_tokens,
        num_layers=config.num_layers,
        recipe=effective.name,
        peak_bytes=peak_bytes,
        row_bytes=row * dtype.itemsize,
        kv_cache_bytes=num_tokens * config.num_layers * kv_row * dtype.itemsize,
    )


def _peak_bytes(engine: PrefillEngine, job: PrefillJob, sink: DiscardingSink, device: torch.device) -> int:
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        _run(engine, job, sink)
        return int(torch.cuda.max_memory_allocated(device)) - before
    counter = LiveBytes()
    with counter:
        _run(engine, job, sink)
    return counter.peak_bytes


def _run(engine: PrefillEngine, job: PrefillJob, sink: DiscardingSink) -> None:
    engine.submit(job, sink)
    while engine.step():
        pass


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print one line of JSON a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.2-1b", choices=sorted(SHAPES), help="shape; weights are random")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096], help="prompt lengths, ascending")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4], help="depths to cut the model to")
    parser.add_argument("--recipe", default="exact")
    parser.add_argument("--chunk-tokens", type=int, default=128)
    parser.add_argument("--max-pack-tokens", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    shape = SHAPES[options.model]
    for num_layers in options.layers:
        config = replace(shape, num_layers=num_layers, layer_windows=shape.layer_windows[:num_layers])
        last: Measurement | None = None
        for num_tokens in options.tokens:
            run = measure(
                config,
                num_tokens,
                get_recipe(options.recipe),
                options.chunk_tokens,
                options.max_pack_tokens,
                torch.device(options.device),
            )
            growth = None if last is None else (run.peak_bytes - last.peak_bytes) / (run.num_tokens - last.num_tokens)
            print(json.dumps(vars(run) | {"bytes_per_token": growth}), flush=True)
            last = run


if __name__ == "__main__":
    main()
