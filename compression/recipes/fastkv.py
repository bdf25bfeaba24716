"""`fastkv`: FastKV as published (arXiv 2502.01068, proportional mode of its current code).

Saliency of the last 8 queries, softmax over all keys in fp32, summed over the 8, max-pooled over 7, summed over
the GQA group. After layer T's MLP the top 20 % of the rows (window included, one set for all heads) go on with
their original positions; every layer caches 10 % of the prompt per KV head, the late layers the same absolute
count. Attention in prefill always uses uncompressed K and V. T comes from the model's profile (`fastkv_layer`;
published: 15 of 32, 17 of 36, 19 of 40), else num_layers // 2 - 1; a profile that was calibrated may also name another
share and another number of queries (`fastkv_rate`, `fastkv_window`), none that ships does. Decode appends, nothing more
is evicted.

Deviations:
- Kept rows are stored and sent in bfloat16, also where the model computes in float32.
- Prompts with no room beside the window (10 % of the prompt <= 8 rows) run `exact`.
- Ties between scores go to the lower position (the published top-k leaves them open).
"""

from __future__ import annotations

from .. import slots as s
from ..spec import Recipe

FASTKV = Recipe(
    name="fastkv",
    propagation=s.TspPropagation(window=None, kernel=7),
    scorer=s.SnapScorer(window=8, kernel=7, pool="max"),
    budget=s.UniformBudget(rate=0.1),
    key_codec=s.Dense("bfloat16"),
    value_codec=s.Dense("bfloat16"),
)
