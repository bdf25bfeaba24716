"""Landmarks: means, the chunks they describe worst, scores and the choice of chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kvsluice.kernels.landmarks import chunk_means, min_cosine_outliers, score_landmarks, select_chunks


def test_means_are_those_of_each_chunk_and_head() -> None:
    k = torch.randn(24, 3, 16, generator=torch.Generator().manual_seed(1))
    means = chunk_means(k, 8)
    for chunk in range(3):
        assert torch.allclose(means[chunk], k[chunk * 8 : chunk * 8 + 8].mean(dim=0))


def test_outliers_are_the_least_minimum_cosines_of_each_head() -> None:
    generator = torch.Generator().manual_seed(2)
    k = torch.randn(1, 2, 16, generator=generator) + 0.1 * torch.randn(80, 2, 16, generator=generator)
    k[13, 0] *= -1  # chunk 3 of head 0
    k[72, 1] *= -1  # chunk 18 of head 1
    got = min_cosine_outliers(k, 4, 5)
    assert got.shape == (5, 2) and got[:, 0].diff().gt(0).all() and got[:, 1].diff().gt(0).all()
    assert 3 in got[:, 0] and 18 in got[:, 1]
    for head in range(2):
        worst = []
        for keys in k[:, head].split(4):
            worst.append(torch.stack([F.cosine_similarity(key, keys.mean(0), dim=0) for key in keys]).min())
        assert sorted(torch.stack(worst).argsort()[:5].tolist()) == got[:, head].tolist()


def test_outliers_are_at_most_all_chunks_and_ties_go_to_the_lower() -> None:
    assert min_cosine_outliers(torch.ones(12, 1, 4), 4, 2)[:, 0].tolist() == [0, 1]
    assert min_cosine_outliers(torch.ones(12, 1, 4), 4, 48)[:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_scores_are_scaled_products_with_the_groups_landmark(group: int) -> None:
    generator = torch.Generator().manual_seed(3)
    q, marks = torch.randn(3, 2 * group, 96, generator=generator), torch.randn(11, 2, 96, generator=generator)
    expected = torch.einsum("qhd,nhd->qhn", q, marks.repeat_interleave(group, dim=1)) / 96**0.5
    assert torch.allclose(score_landmarks(q, marks), expected, atol=1e-5)
    codes = torch.randint(-127, 128, (11, 2, 96), generator=generator).to(torch.int8)
    scale = torch.rand(11, 2, generator=generator).half()
    expected = score_landmarks(q, codes.float() * scale.float()[..., None])
    assert torch.allclose(score_landmarks(q, codes, scale), expected, atol=1e-4)


def test_choice_is_the_groups_maximum_of_softmaxes_per_head() -> None:
    generator = torch.Generator().manual_seed(4)
    scores = 3 * torch.randn(2, 6, 40, generator=generator)
    hidden = torch.rand(2, 2, 40, generator=generator) < 0.3
    chunks, valid = select_chunks(scores, 2, 7, hidden)
    assert valid.all()
    for row in range(2):
        for head in range(2):
            shares = scores[row, head * 3 : head * 3 + 3].masked_fill(hidden[row, head], -torch.inf).softmax(-1)
            best = shares.amax(0).masked_fill(hidden[row, head], -1).topk(7).indices
            assert chunks[row, head].tolist() == sorted(best.tolist())


def test_equal_scores_choose_the_lower_chunks() -> None:
    chunks, valid = select_chunks(torch.zeros(1, 2, 9), 1, 4, None)
    assert chunks[0, 0].tolist() == [0, 1, 2, 3] and valid is None


def test_hidden_chunks_are_never_valid_even_where_the_softmax_underflows() -> None:
    scores = torch.full((1, 1, 5), -1e4)
    scores[0, 0, 1] = 1e4
    hidden = torch.tensor([[[True, False, True, False, True]]])
    chunks, valid = select_chunks(scores, 1, 4, hidden)
    assert chunks[valid].tolist() == [1, 3] and valid.sum() == 2
    nothing = select_chunks(scores, 1, 4, torch.ones(1, 1, 5, dtype=torch.bool))
    assert not nothing[1].any() and nothing[0].max() < 5


def test_no_more_chunks_than_there_are() -> None:
    chunks, valid = select_chunks(torch.randn(1, 1, 3), 1, 99, None)
    assert chunks[0, 0].tolist() == [0, 1, 2] and valid is None


def test_refuses_ragged_chunks() -> None:
    with pytest.raises(ValueError, match="whole chunks"):
        chunk_means(torch.randn(9, 1, 4), 4)
    with pytest.raises(ValueError, match="whole chunks"):
        min_cosine_outliers(torch.randn(9, 1, 4), 4, 1)
