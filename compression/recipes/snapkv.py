"""`snapkv`: SnapKV (arXiv 2404.14469), a tenth of the prompt.

Every layer and KV head keeps 10 % of the prompt's rows: the last 32, and those that the last 32 queries attend to
most, by softmax over all keys, summed over the 32, max-pooled over 7 neighbours and summed over the GQA group. Keys
keep their original positions. Prefill is dense; generated rows are appended and never evicted.

Deviations:
- The paper keeps a constant number of rows; here it is a share of the prompt.
- Scores are summed over the GQA group, so that a KV head stores its rows once; the published code repeats keys and
  values for every query head.
- Kept rows are in bfloat16.
"""

from __future__ import annotations

from .. import slots as s
from ..spec import Recipe

SNAPKV = Recipe(
    name="snapkv",
    scorer=s.SnapScorer(window=32, kernel=7, pool="max"),
    budget=s.UniformBudget(rate=0.1),
    key_codec=s.Dense("bfloat16"),
    value_codec=s.Dense("bfloat16"),
    window=s.ExactEnds(dtype="bfloat16"),
)
