"""kvpress's presses against our recipes on one small model in float32: budgets, kept rows, answers.

Needs kvpress, which is no dependency; `benchmarks/README.md` says how to install it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvsluice.benchmarks.kvpress_match import NAMES, kept_rows, make_press, our_recipe
from kvsluice.benchmarks.kvpress_side import PeerMissing, PeerModel, load_press
from kvsluice.compression import make_compressor
from kvsluice.compression.interfaces import LayerObs, Part
from kvsluice.compression.recipe import ModelShape, fill

try:
    load_press("base_press", "BasePress")
except PeerMissing as missing:
    pytest.skip(str(missing), allow_module_level=True)

SHARE = 0.1
SHAPE = ModelShape(
    num_layers=6, num_heads=8, num_kv_heads=2, head_dim=16, max_position_embeddings=4096, layer_windows=(None,) * 6
)


@pytest.fixture(scope="module")
def tiny() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=SHAPE.num_layers,
        num_attention_heads=SHAPE.num_heads,
        num_key_value_heads=SHAPE.num_kv_heads,
        vocab_size=503,
        max_position_embeddings=SHAPE.max_position_embeddings,
        initializer_range=0.2,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def tokens(count: int) -> list[int]:
    return torch.randint(3, 503, (count,), generator=torch.Generator().manual_seed(1)).tolist()


def seen_by(model: Any, press: Any, ids: list[int], name: str) -> list[dict[str, Any]]:
    """What each layer's press is given, and the rows that it keeps for every KV head."""
    from transformers import DynamicCache

    seen = []
    score = press.score

    def watched(module: Any, hidden: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Any:
        scores = score(module, hidden, keys, values, attentions, kwargs)
        seen.append({"module": module, "hidden": hidden, "k": keys, "v": values, "scores": scores, **kwargs})
        return scores

    press.score = watched
    cache = DynamicCache()
    with torch.no_grad(), press(model):
        positions = torch.arange(len(ids))
        model.model(input_ids=torch.tensor([ids]), past_key_values=cache, cache_position=positions)
    for layer, one in enumerate(seen):
        count = cache.layers[layer].keys.shape[2]
        one["kept"] = one["scores"][0].topk(count, dim=-1).indices.sort(dim=-1).values
    return seen


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv"])
def test_the_same_rows_are_kept_of_the_same_keys(tiny: Any, name: str) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    ids = tokens(1000)
    recipe = fill(our_recipe(name, SHARE), SHAPE, {})
    press = make_press(name, SHARE, kept_rows(recipe, SHAPE, len(ids), {}), len(ids))
    compressor = make_compressor(recipe, SHAPE)
    for layer, one in enumerate(seen_by(tiny, press, ids, name)):
        q = one["module"].q_proj(one["hidden"]).view(1, len(ids), SHAPE.num_heads, -1).transpose(1, 2)
        q, _ = apply_rotary_pos_emb(q, q, *one["position_embeddings"])
        window = compressor.query_window(layer)
        obs = LayerObs(
            layer=layer,
            positions=torch.arange(len(ids)),
            num_prompt_tokens=len(ids),
            k_pre=torch.empty(0, SHAPE.num_kv_heads, SHAPE.head_dim),
            k=one["k"][0].transpose(0, 1).contiguous(),
            v=one["v"][0].transpose(0, 1).contiguous(),
            q_window=q[0, :, -window:].transpose(0, 1).contiguous(),
        )
        ((encoded,), _) = compressor.finish_layer(obs)
        rows = encoded.tensors[Part.POSITIONS]["rows"].T
        ends = torch.arange(len(ids) - (one["kept"].shape[1] - rows.shape[1]), len(ids))
        ours = torch.cat((rows, ends.expand(SHAPE.num_kv_heads, -1)), dim=1).sort(dim=-1).values
        assert torch.equal(ours, one["kept"]), f"layer {layer}"


@pytest.mark.parametrize("name", NAMES[1:])
def test_presses_keep_as_many_rows_as_the_recipes(tiny: Any, name: str) -> None:
    recipe = fill(our_recipe(name, SHARE), SHAPE, {})
    peer = PeerModel(tiny)
    for num_tokens in (801, 1000):
        wanted = kept_rows(recipe, SHAPE, num_tokens, {})
        press = make_press(name, SHARE, wanted, num_tokens)
        assert peer.force(tokens(num_tokens), [5], press).kept_rows == wanted


@pytest.mark.parametrize("share", [0.1, 0.3, 0.45])
def test_budgets_of_pyramids_differ_by_rounding_at_most(share: float) -> None:
    recipe = fill(our_recipe("pyramidkv", share), SHAPE, {})
    for num_tokens in range(400, 17_000, 83):
        wanted = kept_rows(recipe, SHAPE, num_tokens, {})
        press = make_press("pyramidkv", share, wanted, num_tokens)
        for layer, rows in enumerate(wanted):
            module = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=SHAPE.num_layers), layer_idx=layer)
            assert abs(press.get_layer_budget(module, num_tokens) - rows) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_in_one_pass_says_what_it_says_token_by_token(tiny: Any, name: str) -> None:
    """The loop is that of kvpress's pipeline: stock attention, one token a pass, positions that go on."""
    from transformers import DynamicCache

    ids, answer = tokens(801), tokens(812)[801:]
    recipe = fill(our_recipe(name, SHARE), SHAPE, {})
    kept = kept_rows(recipe, SHAPE, len(ids), {})
    moved = name == "streaming"
    forced = PeerModel(tiny).force(ids, answer, make_press(name, SHARE, kept, len(ids)), moved=moved)

    tiny.set_attn_implementation("sdpa")
    press, cache, positions = make_press(name, SHARE, kept, len(ids)), DynamicCache(), torch.arange(len(ids))
    with torch.no_grad():
        if press is None:
            hidden = tiny.model(torch.tensor([ids]), past_key_values=cache)[0]
        else:
            with press(tiny):
                hidden = tiny.model(torch.tensor([ids]), past_key_values=cache, cache_position=positions)[0]
        start = kept[0] if moved else len(ids)
        best = [int(tiny.lm_head(hidden[0, -1]).argmax())]
        for step, token in enumerate(answer[:-1]):
            at = torch.tensor([[start + step]])
            hidden = tiny.model(torch.tensor([[token]]), past_key_values=cache, position_ids=at)[0]
            best.append(int(tiny.lm_head(hidden[0, -1]).argmax()))
    assert list(forced.predicted) == best
