"""Properties of the rotary tables that the comparison with transformers does not show."""

from __future__ import annotations

import pytest
import torch

from kvsluice.models.rope import RotaryEmbedding
from kvsluice.models.rope_config import RopeConfig

CPU = torch.device("cpu")
DYNAMIC = RopeConfig("dynamic", 100.0, factor=2.0, original_max_position_embeddings=16)


def test_dynamic_base_follows_prompt_and_position_not_the_batch() -> None:
    rotary = RotaryEmbedding(DYNAMIC, 8, CPU)
    positions = torch.arange(40)
    whole = rotary.tables(positions, 20)

    for start, stop in ((0, 7), (7, 21), (21, 40)):
        for part, full in zip(rotary.tables(positions[start:stop], 20), whole, strict=True):
            assert torch.equal(part, full[start:stop])
    # within the prompt every row has the prompt's base
    assert torch.equal(whole[0][5], rotary.tables(positions[5:6], 20)[0][0])
    assert not torch.equal(whole[0][5], rotary.tables(positions[5:6], 30)[0][0])
    # beyond it, its own
    assert torch.equal(whole[0][35], rotary.tables(positions[35:36], 36)[0][0])


def test_dynamic_base_is_plain_within_the_trained_length() -> None:
    rotary, plain = RotaryEmbedding(DYNAMIC, 8, CPU), RotaryEmbedding(RopeConfig("default", 100.0), 8, CPU)
    positions = torch.arange(16)

    # frequencies of float64 and float32 powers differ in their last bit, times positions up to 16
    torch.testing.assert_close(rotary.tables(positions, 10)[1], plain.tables(positions, 10)[1], rtol=0, atol=4e-6)


def test_prompt_lengths_may_differ_between_rows() -> None:
    rotary = RotaryEmbedding(DYNAMIC, 8, CPU)
    positions, lengths = torch.tensor([3, 3, 39]), torch.tensor([20, 33, 20])

    cos, _ = rotary.tables(positions, lengths)

    for row in range(3):
        assert torch.equal(cos[row], rotary.tables(positions[row : row + 1], int(lengths[row]))[0][0])


@pytest.mark.parametrize("kind", ["default", "dynamic"])
def test_positions_of_each_head(kind: str) -> None:
    config = DYNAMIC if kind == "dynamic" else RopeConfig("default", 100.0)
    rotary = RotaryEmbedding(config, 8, CPU)
    positions = torch.tensor([[0, 5, 30], [17, 2, 2]])

    cos, sin = rotary.tables(positions, 20)

    assert cos.shape == sin.shape == (2, 3, 8)
    assert torch.equal(cos[1, 0], rotary.tables(positions[1, :1], 20)[0][0])
