"""`fastkv`, `shadowkv` and `sluice` against plain re-tellings of what they are published, or meant, to do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvsluice.compression.interfaces import Part
from kvsluice.compression.layout import sealed_end
from kvsluice.compression.recipe import ModelShape, fill, get_recipe, resolve
from kvsluice.compression.sizes import encoded_nbytes

N = 437
AFFINE_KEYS = {"kind": "affine", "bits": 4, "axis": "channel", "group": 32}


def snap(q: Tensor, k: Tensor) -> Tensor:
    """FastKV's score of the prefix: q [w, H, d], k [n, Hkv, d] -> [Hkv, n - w]."""
    n, w, group = len(k), len(q), q.shape[1] // k.shape[1]
    scores = torch.einsum("whd,nhd->hwn", q, k.repeat_interleave(group, 1)) / q.shape[-1] ** 0.5
    mask = torch.arange(n) > torch.arange(n - w, n)[:, None]
    mass = torch.softmax(scores.masked_fill(mask, -torch.inf), -1)[..., : n - w].sum(1)
    pooled = F.max_pool1d(mass[None], 7, stride=1, padding=3)[0]
    return pooled.view(k.shape[1], group, -1).sum(1)


def ranked(scores: Tensor, count: int) -> list[int]:
    return sorted(torch.sort(scores, descending=True, stable=True).indices[:count].tolist())


def test_fastkv_keeps_and_passes_what_the_paper_says(lab: SimpleNamespace) -> None:
    shape = lab.make_shape(heads=6, kv_heads=2)
    recipe = resolve(get_recipe("fastkv"), shape, N, lab.PROFILE).recipe
    prompt = lab.make_prompt(shape, N)
    encoded, passed = lab.prefill(recipe, prompt)
    window = list(range(N - 8, N))
    selected = ranked(snap(prompt.q[1][N - 8 : N], prompt.k[1]).sum(0), int(N * 0.2) - 8) + window
    assert [rows.tolist() for rows in passed] == [list(range(N))] * 2 + [selected] * 2
    for layer, (one, rows) in enumerate(zip(encoded, passed, strict=True)):
        scores = snap(prompt.q[layer][N - 8 : N], prompt.k[layer][rows])
        kept = one.tensors[Part.POSITIONS]["rows"]
        assert kept.shape == (int(N * 0.1), 2)  # the same count in late layers
        for head in range(2):
            expected = [int(rows[i]) for i in ranked(scores[head], int(N * 0.1) - 8)] + window
            assert kept[:, head].tolist() == expected
            at = torch.tensor(expected)
            assert torch.equal(one.tensors[Part.KEYS]["rows"][:, head], prompt.k[layer][at, head].bfloat16())
            assert torch.equal(one.tensors[Part.VALUES]["rows"][:, head], prompt.v[layer][at, head].bfloat16())


def test_fastkv_decodes_over_the_kept_rows_and_every_generated_one(lab: SimpleNamespace) -> None:
    shape = lab.make_shape(heads=6, kv_heads=2)
    recipe = resolve(get_recipe("fastkv"), shape, N, lab.PROFILE).recipe
    prompt = lab.make_prompt(shape, N, 70)
    encoded, _ = lab.prefill(recipe, prompt)
    outs = lab.decode(lab.load(recipe, prompt, encoded), prompt, N, N + 70)
    for layer in range(4):
        kept = encoded[layer].tensors[Part.POSITIONS]["rows"].long()
        for head in range(2):
            rows = torch.cat((prompt.k[layer][kept[:, head], head].bfloat16().float(), prompt.k[layer][N:, head]))
            vals = torch.cat((prompt.v[layer][kept[:, head], head].bfloat16().float(), prompt.v[layer][N:, head]))
            weights = torch.softmax(prompt.q[layer][N + 69, head * 3 : head * 3 + 3] @ rows.T / 4, dim=-1)
            assert torch.allclose(outs[layer][69, head * 3 : head * 3 + 3], weights @ vals, atol=1e-5)


def test_fastkv_sends_at_most_an_eighth_of_bf16() -> None:
    shape = ModelShape(30, 9, 3, 64, 8192, (None,) * 30)
    for n in (1000, 4096):
        recipe = resolve(get_recipe("fastkv"), shape, n, {}).recipe
        assert encoded_nbytes(recipe, shape, n, 4) <= shape.bf16_kv_bytes(n) / 8


def test_shadowkv_decodes_as_the_paper_says(lab: SimpleNamespace) -> None:
    shape, n = lab.make_shape(heads=6, kv_heads=2, layers=1), 1003
    recipe = resolve(get_recipe("shadowkv"), shape, n, {}).recipe
    prompt = lab.make_prompt(shape, n, 3)
    (one,), _ = lab.prefill(recipe, prompt)
    (out,) = lab.decode(lab.load(recipe, prompt, [one]), prompt, n, n + 3)

    chunks = n // 8 - 4
    end, rank = chunks * 8, recipe.key_codec.rank
    assert one.tensors[Part.TAIL]["k"].shape[0] == n - end and 32 <= n - end < 40
    whole = prompt.k_pre[0][:end].flatten(1)
    basis = one.tensors[Part.BASIS]["basis"].float().flatten(1)
    low = (whole @ basis.T) @ basis
    # as close as the truncated SVD but for what iterations and bfloat16 leave
    assert (whole - low).norm() < 1.02 * torch.linalg.svdvals(whole)[rank:].norm() + 2**-8 * whole.norm()
    keys = lab.rope(low.view(end, 2, 16), torch.arange(end))
    exact = prompt.k[0][:end].view(chunks, 8, 2, 16)
    cosine = F.cosine_similarity(exact, exact.mean(1, keepdim=True), dim=-1).amin(1)
    landmarks = keys.view(chunks, 8, 2, 16).mean(1)
    for position in range(n, n + 3):
        for head in range(2):
            q = prompt.q[0][position, head * 3 : head * 3 + 3]
            outliers = cosine[:, head].argsort()[:48]
            assert sorted(outliers.tolist()) == one.tensors[Part.OUTLIERS]["chunks"][:, head].tolist()
            shares = (q @ landmarks[:, head].T / 4).index_fill(1, outliers, -torch.inf).softmax(-1).amax(0)
            chosen = shares.topk(256 // 8).indices
            rows = [(c[:, None] * 8 + torch.arange(8)).flatten() for c in (chosen, outliers)]
            rest = torch.arange(end, position + 1)
            k = torch.cat((keys[rows[0], head], prompt.k[0][rows[1], head], prompt.k[0][rest, head]))
            v = prompt.v[0][torch.cat((*rows, rest)), head]
            v[: -len(rest)][: len(rows[0])] = v[: len(rows[0])].bfloat16().float()
            expected = torch.softmax(q @ k.T / 4, dim=-1) @ v
            # bfloat16 factors, basis and landmarks: 2^-8 of scores of magnitude up to 16
            assert torch.allclose(out[position - n, head * 3 : head * 3 + 3], expected, atol=0.06)


@pytest.mark.parametrize("codec", [AFFINE_KEYS, {"kind": "lowrank", "bits": 8}])
def test_sluice_passes_whole_chunks_and_seals_on_one_grid(lab: SimpleNamespace, codec: dict[str, object]) -> None:
    shape, n = lab.make_shape(), 1503
    recipe = resolve(get_recipe("sluice"), shape, n, lab.PROFILE | {"key_codec": codec}).recipe
    prompt = lab.make_prompt(shape, n)
    encoded, passed = lab.prefill(recipe, prompt)
    deep, begin = passed[3], (n - 64) // 4 * 4
    assert deep[:4].tolist() == [0, 1, 2, 3] and deep[deep >= begin].tolist() == list(range(begin, n))
    middle = deep[4 : len(deep) - (n - begin)].view(-1, 4)
    assert (middle[:, 0] % 4).eq(0).all() and middle.diff(dim=1).eq(1).all()
    assert len(deep) <= int(n * 0.3) < len(deep) + 4
    end = sealed_end(recipe, n, n)
    assert end % 32 == 0 and 32 <= n - end < 64
    ids = encoded[3].tensors[Part.POSITIONS]["chunks"].long()
    assert torch.equal((ids[:, None] * 4 + torch.arange(4)).flatten(), deep[(deep >= 4) & (deep < end)])
    assert Part.POSITIONS not in encoded[0].tensors


def test_sluice_selects_the_chunks_the_window_attends_to_most(lab: SimpleNamespace) -> None:
    shape, n = lab.make_shape(heads=6, kv_heads=2), 1003
    recipe = fill(get_recipe("sluice"), shape, lab.PROFILE)
    prompt = lab.make_prompt(shape, n)
    prompt.q[1][n - 60 : n - 50] = 3.0
    prompt.k[1][402] = 9.0  # chunk 100; the question that asks for it is 50 rows before the end
    _, passed = lab.prefill(recipe, prompt)
    begin = (n - 64) // 4 * 4
    tokens = snap(prompt.q[1][n - 64 :], prompt.k[1]).sum(0)
    chunks = tokens[:begin].view(-1, 4).amax(1)[1:]  # the first holds the sinks
    expected = [chunk + 1 for chunk in ranked(chunks, (int(n * 0.3) - (n - begin) - 4) // 4)]
    chosen = passed[2][(passed[2] >= 4) & (passed[2] < begin)][::4] // 4
    assert chosen.tolist() == expected and 100 in expected


@pytest.mark.parametrize("codec", [AFFINE_KEYS, {"kind": "lowrank", "bits": 8}])
@pytest.mark.parametrize("n", [3900, 4096, 4127])
def test_sluice_sends_at_most_a_quarter_of_bf16(lab: SimpleNamespace, codec: dict[str, object], n: int) -> None:
    """Sinks, tails, positions, scales and bases included, as the encoded layers themselves count it."""
    shape = ModelShape(30, 9, 3, 64, 8192, (None,) * 30)
    recipe = resolve(get_recipe("sluice"), shape, n, {"tsp_layer": 19, "key_codec": codec}).recipe
    prompt = lab.make_prompt(lab.replace(shape, num_layers=1, layer_windows=(None,)), n)
    prompt = lab.replace(prompt, shape=shape, **{name: getattr(prompt, name) * 30 for name in ("q", "k_pre", "k", "v")})
    encoded, _ = lab.prefill(recipe, prompt)
    sent = sum(one.nbytes() for one in encoded)
    assert sent == encoded_nbytes(recipe, shape, n, 4)
    assert sent <= shape.bf16_kv_bytes(n) * 0.235  # headers of frames and of gRPC come on top
