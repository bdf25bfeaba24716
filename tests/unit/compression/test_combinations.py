"""Any slots that go together: a step attends to exactly the rows that they keep, whatever packs them.

Codecs are at their best here, so that only rows, positions and rotations can be wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvsluice.compression import bound_nbytes
from kvsluice.compression.interfaces import EncodedLayer, Part
from kvsluice.compression.layout import layer_layout, sealed_end
from kvsluice.compression.recipe import Recipe, get_recipe, resolve
from kvsluice.compression.sizes import encoded_nbytes
from kvsluice.errors import InvalidRecipe

LOSSLESS = ({"kind": "native"}, {"kind": "dense", "dtype": "float32"}, {"kind": "lowrank", "share": 1.0})
FINE = [{"kind": "affine", "bits": 8, "axis": axis, "group": 16} for axis in ("channel", "token")]
CODECS = st.sampled_from((*LOSSLESS, *FINE))
KEY_CODECS = st.sampled_from((*LOSSLESS, *FINE, FINE[1] | {"balanced": True}))
LOW_RANK = st.just(LOSSLESS[-1])
SCORERS = st.sampled_from([{"kind": "snap", "window": 8, "kernel": 7}, {"kind": "accumulated"}])
DROP = {"kind": "drop"}
DEMOTE = [{"kind": "demote", "key_bits": 8, "value_bits": 8, "key_axis": a, "group": 16} for a in ("channel", "token")]


def filling(kind: str, **numbers: Any) -> st.SearchStrategy[dict[str, Any]]:
    """A slot with numbers out of the given ones."""
    return st.fixed_dictionaries({"kind": st.just(kind)} | {name: st.sampled_from(of) for name, of in numbers.items()})


WINDOW = {"sinks": (0, 4), "local": (0, 5, 20)}
BLOCKS = (0, 1, 7, 16)
SEALED = filling("ends", seal_block=BLOCKS, **WINDOW)


def ranked(key_codecs: st.SearchStrategy[dict[str, Any]], heads: str) -> st.SearchStrategy[dict[str, Any]]:
    """Slots that keep rows by score and drop or demote the others."""
    budgets = [filling(kind, rate=(0.4, 0.6, 0.9), heads=(heads,)) for kind in ("uniform", "pyramid")]
    return st.fixed_dictionaries(
        {
            "key_codec": key_codecs,
            "value_codec": st.sampled_from((LOSSLESS[0], *FINE)),
            "scorer": SCORERS,
            "budget": st.one_of(budgets),
            "evicted": st.sampled_from((DROP, *DEMOTE)),
            "window": SEALED,
        }
    )


FAMILIES = {
    "packed": st.fixed_dictionaries({"key_codec": KEY_CODECS, "value_codec": CODECS, "window": SEALED}),
    "own": ranked(st.sampled_from((*LOSSLESS[:2], *FINE)), "own"),
    "shared": ranked(LOW_RANK, "shared"),
    "ends": st.fixed_dictionaries(
        {
            "key_codec": KEY_CODECS,
            "budget": filling("ends"),
            "window": filling("ends", seal_block=BLOCKS[1:], positions=("original", "cache"), **WINDOW),
        }
    ),
    "joined": st.fixed_dictionaries(
        {
            "key_codec": LOW_RANK,
            "value_codec": LOW_RANK,
            "sharing": filling("groups", layers=(2, 3), values=(False, True)),
            "window": filling("ends", **WINDOW),
        }
    ),
}


def kept_rows(recipe: Recipe, encoded: EncodedLayer, num_tokens: int, num_heads: int) -> Tensor:
    """Positions between the exact ends that each head has: [n, Hkv]."""
    at = layer_layout(recipe, num_tokens, encoded.layer)
    positions = encoded.tensors.get(Part.POSITIONS, {})
    if recipe.evicted.keeps or at.contiguous:
        rows = torch.arange(at.num_sinks, at.sealed_end)
    else:
        rows = positions.get("rows", positions.get("chunks", torch.zeros(0))).long()
    return rows if rows.dim() == 2 else rows[:, None].expand(-1, num_heads)


def expected(recipe: Recipe, prompt: Any, encoded: EncodedLayer, position: int, lab: Any) -> Tensor:
    """Plain attention of the query at `position` over the rows that the recipe keeps until then: [H, d]."""
    shape, layer, num_tokens = prompt.shape, encoded.layer, prompt.num_tokens
    begin = sealed_end(recipe, num_tokens, position) if recipe.window.seal_block else 0
    first_end = layer_layout(recipe, num_tokens, layer).sealed_end
    begin, sinks = max(begin, first_end), torch.arange(recipe.window.sinks)
    late = torch.arange(begin if recipe.budget.fixed else first_end, position + 1)
    places = sinks + begin - len(sinks) if recipe.window.positions == "cache" else sinks
    between = kept_rows(recipe, encoded, num_tokens, shape.num_kv_heads)
    outs = []
    for head in range(shape.num_heads):
        kv_head = head * shape.num_kv_heads // shape.num_heads
        rows = torch.cat((sinks, between[:, kv_head], late))
        at = torch.cat((places, rows[len(sinks) :]))
        k = lab.rope(prompt.k_pre[layer][rows][:, [kv_head]], at)[:, 0]
        weights = torch.softmax(k @ prompt.q[layer][position, head] / k.shape[1] ** 0.5, dim=0)
        outs.append(weights @ prompt.v[layer][rows, kv_head])
    return torch.stack(outs)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_step_attends_to_the_rows_that_the_slots_keep(family: str, data: st.DataObject, lab: Any) -> None:
    slots = data.draw(FAMILIES[family])
    heads = data.draw(st.sampled_from([(4, 2), (3, 3), (2, 1)]))
    num_tokens, num_new = data.draw(st.sampled_from([97, 128, 150])), data.draw(st.sampled_from([1, 40, 64]))
    shape = lab.make_shape(*heads, dim=10, layers=3)
    try:
        resolved = resolve(get_recipe("exact", json.dumps(slots)), shape, num_tokens, {})
    except InvalidRecipe:
        assume(False)
    assume(resolved.fallback_reason is None)
    recipe, prompt = resolved.recipe, lab.make_prompt(shape, num_tokens, num_new)
    encoded, _ = lab.prefill(recipe, prompt)
    assert sum(one.nbytes() for one in encoded) == encoded_nbytes(recipe, shape, num_tokens, 4)
    cache = lab.load(recipe, prompt, encoded)
    outs = lab.decode(cache, prompt, num_tokens, num_tokens + num_new, run=data.draw(st.sampled_from([1, 3, 64])))
    assert cache.nbytes() <= bound_nbytes(recipe, shape, num_tokens, num_new, 1, 4)
    for one in encoded:
        for step in {0, num_new // 2, num_new - 1}:
            wanted = expected(recipe, prompt, one, num_tokens + step, lab)
            assert float((outs[one.layer][step] - wanted).norm() / wanted.norm()) < 0.15  # what 8 bits may lose
