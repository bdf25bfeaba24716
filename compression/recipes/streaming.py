"""`streaming`: StreamingLLM (arXiv 2309.17453): the first 4 rows and the last tenth of the prompt, nothing between.

As generation goes on, the oldest local rows are forgotten in blocks of 16, so memory stays the same however long the
answer gets. Positions are those inside the cache: the sinks stand right before the local rows.

Deviations:
- Prefill is dense: the rows of the prompt have seen all rows before them. The paper's rolling cache never does, so it
  can read without end; here the prompt has to fit prefill.
- The window is a share of the prompt, so that it can be compared at equal bytes; `local` gives a fixed one. Where the
  share is less than a block, which is so below 200 tokens, the prompt runs `exact`.
- In-cache positions turn the sinks alone, since only differences of positions matter to RoPE.
"""

from __future__ import annotations

from .. import slots as s
from ..spec import Recipe

STREAMING = Recipe(
    name="streaming",
    budget=s.EndsBudget(),
    window=s.ExactEnds(sinks=4, local_rate=0.1, seal_block=16, dtype="bfloat16", positions="cache"),
)
