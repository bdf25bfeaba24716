"""Prefill on a GPU: layers encoded beside the next one are the same bits as those encoded in turn."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from kvsluice.compression.recipe import get_recipe, recipe_names, resolve
from kvsluice.models.config import SHAPES
from kvsluice.models.model import Model
from kvsluice.models.sampling import SamplingParams
from kvsluice.models.weights import random_weights
from kvsluice.services.framing import FrameIdent, FramePacker
from kvsluice.services.prefill.encoding import InlineEncoder, SideEncoder
from kvsluice.services.prefill.engine import PrefillEngine, PrefillJob
from kvsluice.services.prefill.warm_up import plan_attention
from kvsluice.services.staging import make_host_copies

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

IDENT = FrameIdent(request_id="r", epoch=1, tenant="t", model_fingerprint="ab", recipe_fingerprint="cd")
PARAMS = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


class FrameSink:
    """Packs layers as they come, through pinned memory."""

    def __init__(self, num_tokens):
        self.copies = make_host_copies(torch.device("cuda"))
        self.packer = FramePacker(IDENT, num_tokens, copies=self.copies)
        self.frames, self.tokens, self.error = [], [], None

    def ready(self):
        return True

    def on_layer_start(self, layer):
        pass

    def on_layer(self, encoded):
        self.frames += self.packer.add(encoded, self.copies.mark())

    def on_first_tokens(self, sampled):
        self.tokens = [token.token_id for token in sampled]

    def on_done(self):
        self.frames += self.packer.flush()

    def on_error(self, error):
        self.error = error


@pytest.fixture(scope="module")
def model() -> Model:
    config = SHAPES["llama-3.1-8b"]
    config = replace(config, num_layers=6, vocab_size=1024, layer_windows=config.layer_windows[:6])
    return Model(config, random_weights(config, torch.bfloat16, torch.device("cuda"), 0), fingerprint="heads-of-8b")


def run(model, recipe, lengths, encoder):
    engine = PrefillEngine(model, 2048, 4096, encoder=encoder)
    sinks = [FrameSink(length) for length in lengths]
    for length, sink in zip(lengths, sinks, strict=True):
        generator = torch.Generator().manual_seed(length)
        ids = tuple(torch.randint(2, 1024, (length,), generator=generator).tolist())
        profile = {"tsp_layer": 2, "fastkv_layer": 2, "tsp_rate": 0.2}
        resolved = resolve(get_recipe(recipe), engine.shape, length, profile)
        assert resolved.fallback_reason is None
        engine.submit(PrefillJob(f"r{length}", 1, ids, resolved.recipe, PARAMS), sink)
    while engine.step():
        pass
    assert [sink.error for sink in sinks] == [None] * len(sinks)
    return sinks


@pytest.mark.parametrize("recipe", recipe_names())
def test_layers_are_the_same_bits(model, recipe):
    lengths = (6000, 9001)
    inline = run(model, recipe, lengths, InlineEncoder())
    for _ in range(2):
        beside = run(model, recipe, lengths, None)
        for got, want in zip(beside, inline, strict=True):
            assert got.tokens == want.tokens
            assert got.frames == want.frames


def test_a_gpu_encodes_beside_the_engine(model):
    assert isinstance(PrefillEngine(model)._encoder, SideEncoder)


def test_memory_comes_back(model):
    held = []
    for _ in range(2):
        run(model, "sluice", (6000,), None)
        gc.collect()  # what earlier tests left behind is not counted at one of the two times alone
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()  # one for each stream, which no engine gives back
        held.append(torch.cuda.memory_allocated())
    assert held[1] <= held[0]


def test_attention_can_be_planned_ahead(model):
    plan_attention(model, 2048)
