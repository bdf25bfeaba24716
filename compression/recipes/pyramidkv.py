"""`pyramidkv`: PyramidKV (arXiv 2406.02069), a tenth of the prompt on average over the layers.

SnapKV's scores (window 8, max-pool 7) with budgets that fall linearly from the first layer to the last: with C the
average, w the window and m = C - w, the last layer keeps w + m / 20 rows and the first w + 2 m - m / 20 (beta = 20),
but no layer more than the prompt has; the sum stays the same.

Deviations: those of `snapkv`.
"""

from __future__ import annotations

from .. import slots as s
from ..spec import Recipe

PYRAMIDKV = Recipe(
    name="pyramidkv",
    scorer=s.SnapScorer(window=8, kernel=7, pool="max"),
    budget=s.PyramidBudget(rate=0.1, beta=20.0),
    key_codec=s.Dense("bfloat16"),
    value_codec=s.Dense("bfloat16"),
    window=s.ExactEnds(dtype="bfloat16"),
)
