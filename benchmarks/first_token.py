"""Runs a prompt through a prefill engine to its end, and says when its first token came."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..compression.interfaces import EncodedLayer
from ..compression.recipe import Recipe
from ..errors import InvalidRequest, KvsluiceError
from ..evals.report import write_results
from ..models.checkpoint import DEFAULT_MODEL
from ..models.model import Model
from ..models.sampling import Sampled, SamplingParams
from ..services.prefill.engine import PrefillEngine, PrefillJob


@dataclass
class FirstToken:
    """What a prompt gave; the sink of its prefill.

    Attributes:
        layers: where they are kept.
        at_s: when the first token came, by `time.perf_counter`.
        found_tokens: of the prompt, that did not run.
        seconds: from when the prompt was given to the engine to its first token.
    """

    keeps_layers: bool
    layers: list[EncodedLayer] = field(default_factory=list)
    sampled: tuple[Sampled, ...] = ()
    at_s: float = 0.0
    found_tokens: int = 0
    seconds: float = 0.0
    error: KvsluiceError | None = None

    def ready(self) -> bool:
        return True

    def on_layer_start(self, layer: int) -> None:
        """Nothing to prepare."""

    def on_layer(self, encoded: EncodedLayer) -> None:
        if self.keeps_layers:
            self.layers.append(encoded)

    def on_first_tokens(self, sampled: list[Sampled]) -> None:
        self.at_s, self.sampled = time.perf_counter(), tuple(sampled)

    def on_found(self, num_tokens: int) -> None:
        self.found_tokens = num_tokens

    def on_done(self) -> None:
        """Nothing to close."""

    def on_error(self, error: KvsluiceError) -> None:
        self.error = error


def first_token(
    engine: PrefillEngine, ids: Sequence[int], recipe: Recipe, sampling: SamplingParams, keeps_layers: bool = False
) -> FirstToken:
    """Run a prompt.

    Args:
        recipe: resolved for prompts of this length.
        sampling: with more than one token, or the last layer is not encoded.

    Raises:
        KvsluiceError: whatever prefill failed with.
    """
    sink, begun_s = FirstToken(keeps_layers), time.perf_counter()
    engine.submit(PrefillJob("measured", 1, tuple(ids), recipe, sampling), sink, sink.on_found)
    while engine.step():
        pass
    if sink.error is not None:
        raise sink.error
    sink.seconds = sink.at_s - begun_s
    return sink


def add_options(parser: argparse.ArgumentParser) -> None:
    """What commands that measure first tokens have in common."""
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--recipes", nargs="+", default=["exact", "sluice"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="JSON file with all that was measured")


def check_counts(options: argparse.Namespace, *names: str) -> None:
    """Refuse numbers below 1.

    Raises:
        InvalidRequest: names the option.
    """
    for name in (*names, "rounds", "chunk_tokens"):
        if getattr(options, name) < 1:
            raise InvalidRequest(f"--{name.replace('_', '-')}", f"is {getattr(options, name)}", "at least 1")


def write(options: argparse.Namespace, model: Model, results: Sequence[dict[str, Any]]) -> None:
    """Write the file that was asked for, if one was."""
    if options.out is not None:
        device = {"type": model.device.type, "dtype": str(model.dtype).removeprefix("torch.")}
        write_results(options.out, {"model": options.model, "device": device, "results": results})
