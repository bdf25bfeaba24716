"""`quantized-pruning`: more tokens, lower precision (arXiv 2412.12706).

At the bytes of 10 % of the rows in 16 bits it keeps 40 % of them in 4: SnapKV (window 32, max-pool 7) prunes each layer
and KV head, then KIVI packs what survived, keys per channel and values per token in groups of 32. Generated rows are
packed as they leave the last 32.

Deviations:
- Groups of 32 surviving keys are consecutive survivors of one head, not consecutive positions; eviction comes before
  packing, nothing is packed twice.
- Scales and minima cost a bit an element, which the paper does not count: 40 % of the rows at 4 bits take 12.5 % of
  the 16-bit bytes, and positions come on top.
"""

from __future__ import annotations

from .. import slots as s
from ..spec import Recipe

QUANTIZED_PRUNING = Recipe(
    name="quantized-pruning",
    scorer=s.SnapScorer(window=32, kernel=7, pool="max"),
    budget=s.UniformBudget(rate=0.4),
    key_codec=s.Affine(bits=4, axis="channel", group=32),
    value_codec=s.Affine(bits=4, axis="token", group=32),
    window=s.ExactEnds(local=32, seal_block=32, dtype="bfloat16"),
)
