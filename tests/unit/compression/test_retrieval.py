"""Retrieval over decoded content: landmarks, and keys rotated at the positions they came from."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from kvsluice.compression import slots as s
from kvsluice.compression.recipe import fill, get_recipe, neutral

N, NEW = 700, 140


def test_int8_landmarks_are_within_half_a_step_of_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = 5 * torch.randn(120, 3, 32, generator=generator) * torch.rand(120, 3, 1, generator=generator)
    keys[4:8, 1] = 0
    summary = s.ChunkLandmarks(chunk=4, landmark_bits=8).build().summarize(keys)
    means = keys.view(30, 4, 3, 32).mean(1)
    step = summary["scale"].float()[..., None]
    assert summary["codes"].dtype == torch.int8 and step.gt(0).all()
    assert (summary["codes"] * step - means).abs().le(step / 2 + 1e-6).all()
    # the scale is what the largest entry needs, but for a float16 rounding
    assert step[..., 0].le(means.abs().amax(-1) / 127 * 1.003 + 2.0**-23).all()


def test_bfloat16_landmarks_are_the_rounded_mean() -> None:
    keys = torch.randn(40, 2, 16, generator=torch.Generator().manual_seed(1))
    summary = s.ChunkLandmarks(chunk=8).build().summarize(keys)
    assert torch.equal(summary["means"], keys.view(5, 8, 2, 16).mean(1).bfloat16())


@pytest.mark.parametrize("retrieval", [s.ChunkLandmarks(chunk=4, outliers=0), s.AttendAll()])
@pytest.mark.parametrize("codec", [s.LowRank(rank=32, bits=16), s.Affine(bits=8, axis="channel")])
def test_fine_codecs_at_full_budget_come_close_to_exact_before_and_after_sealing(
    lab: SimpleNamespace, codec: s.CodecFilling, retrieval: s.RetrievalFilling
) -> None:
    """Keys before RoPE are rotated at the position of their own row, in the prompt's part and in sealed blocks."""
    shape = lab.make_shape()
    recipe = fill(get_recipe("sluice"), shape, lab.PROFILE)
    wanted = replace(
        recipe,
        propagation=s.FullPropagation(),
        retrieval=retrieval,
        window=s.ExactEnds(sinks=4, local=12, seal_block=32),
    )
    wanted = replace(neutral(wanted), key_codec=codec)
    prompt = lab.make_prompt(shape, N, NEW)
    encoded, passed = lab.prefill(wanted, prompt)
    outs = lab.decode(lab.load(wanted, prompt, encoded), prompt, N, N + NEW, run=20)
    for layer in range(4):
        expected = torch.stack([lab.dense(prompt, layer, passed[layer], at) for at in range(N, N + NEW)])
        # the codecs' rounding of keys of magnitude 4 moves scores by about 2^-9 * 16 at most
        assert (outs[layer] - expected).norm() < 0.02 * expected.norm()


def test_a_wanted_row_is_found_in_the_prompt_and_in_sealed_blocks(lab: SimpleNamespace) -> None:
    shape = lab.make_shape()
    recipe = fill(get_recipe("sluice"), shape, lab.PROFILE)
    for place in (333, N + 20):
        prompt = lab.make_prompt(shape, N, NEW)
        last = N + NEW - 1
        prompt.k_pre[0][place] *= 0.01
        prompt.k[0][place] = 3 * prompt.q[0][last].view(2, 2, 16).mean(1)
        prompt.k_pre[0][place] = lab.rope(prompt.k[0][place][None], -torch.tensor([place]))[0]
        prompt.v[0][place] = 50.0
        encoded, _ = lab.prefill(replace(recipe, key_codec=s.Affine(bits=4, axis="channel")), prompt)
        cache = lab.load(replace(recipe, key_codec=s.Affine(bits=4, axis="channel")), prompt, encoded)
        outs = lab.decode(cache, prompt, N, N + NEW)
        expected = lab.dense(prompt, 0, torch.arange(N), last)
        assert expected.mean() > 20 and torch.allclose(outs[0][-1], expected, rtol=0.1, atol=2.0)
