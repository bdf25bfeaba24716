"""`lowrank`: keys at half rank, nothing else changed.

Pre-RoPE keys of all heads of a layer together are factored by truncated SVD at half of their width and rebuilt whenever
they are read. Values stay in bfloat16, every row is kept and attended to, generated rows stay exact. It shows what the
low-rank part of `shadowkv` costs on its own (ShadowKV, arXiv 2410.21465 §4.1, at rank 160 of 1,024).

Deviations: those of `shadowkv` that concern its SVD.
"""

from __future__ import annotations

from .. import slots as s
from ..spec import Recipe

LOWRANK = Recipe(
    name="lowrank",
    key_codec=s.LowRank(share=0.5, bits=16),
    value_codec=s.Dense("bfloat16"),
    window=s.ExactEnds(dtype="bfloat16"),
)
