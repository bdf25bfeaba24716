"""`mikv`: MiKV (arXiv 2402.18096), demote instead of drop.

H2O decides what matters: half of a budget of 10 % goes to the rows that received the most attention from all queries
of the prompt, half to the most recent ones. These stay in bfloat16; all others are kept in 4 bits per token, in groups
of 32 channels. Every row is attended to. Generated rows are demoted as they leave the last 32, and the important rows
of the prompt stay what they are.

Accumulated attention needs a second pass over every layer's keys while the prompt runs, about as much work as the
attention itself.

Deviations:
- 4 bits without the paper's balancer b = sqrt(max|q| / max|k|), which helps at 2 bits and not at 4; the slot
  `evicted` {"kind": "demote", "key_bits": 2, "value_bits": 2, "balanced": true} turns it on.
- Important rows are chosen once, at the end of prefill; the paper re-ranks while decoding.
- Scores are summed over the GQA group.
"""

from __future__ import annotations

from .. import slots as s
from ..spec import Recipe

MIKV = Recipe(
    name="mikv",
    scorer=s.AccumulatedScorer(),
    budget=s.UniformBudget(rate=0.1, recent=0.5),
    evicted=s.Demote(key_bits=4, value_bits=4, key_axis="token", group=32),
    key_codec=s.Dense("bfloat16"),
    value_codec=s.Dense("bfloat16"),
    window=s.ExactEnds(local=32, seal_block=32, dtype="bfloat16"),
)
