"""`xkv` (keys) and `xkv-kv` (keys and values): xKV (arXiv 2503.18893), one SVD for four neighbouring layers.

The pre-RoPE keys of four layers stand side by side and are factored together: one set of factor rows for the four, and
a basis for each. Rank is an eighth of the joint width for keys (512 of 4,096 in the paper) and three sixteenths for
values (768 of 4,096). Every row is attended to; generated rows stay exact.

A group's frames leave when its fourth layer is final, so less of the transfer hides behind prefill, and prefill holds
the keys (and values) of up to four layers.

Deviations:
- Factor rows carry the singular values, and rows and bases are in bfloat16.
- Singular vectors come from orthogonal iteration on the Gram matrix (`subspace.py`), of sealed rows only.
- Where the number of layers is no multiple of four, the last group has fewer layers and proportionally less rank.
"""

from __future__ import annotations

from .. import slots as s
from ..spec import Recipe

XKV = Recipe(
    name="xkv",
    key_codec=s.LowRank(share=0.125, bits=16),
    value_codec=s.Dense("bfloat16"),
    sharing=s.LayerGroups(layers=4),
    window=s.ExactEnds(dtype="bfloat16"),
)
XKV_KV = Recipe(
    name="xkv-kv",
    key_codec=s.LowRank(share=0.125, bits=16),
    value_codec=s.LowRank(share=0.1875, bits=16),
    sharing=s.LayerGroups(layers=4, values=True),
    window=s.ExactEnds(dtype="bfloat16"),
)
