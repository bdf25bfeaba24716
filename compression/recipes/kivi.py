"""`kivi` (4 bits) and `kivi-2bit`: KIVI (arXiv 2402.02750).

Post-RoPE keys are quantized per channel in groups of 32 rows, values per token in groups of 32 channels, each group
with a float16 scale and minimum, so 2 bits cost 3 and 4 bits cost 5. The last 128 rows stay exact, and generated rows
are quantized as they leave that window. Every row is kept and attended to.

Deviations:
- Keys and values share one exact window of 128 to 159 rows; the paper keeps the last 0 to 127 keys (what does not fill
  a block) and the last 128 values.
- Exact rows are in bfloat16. Minimum and scale are rounded outward, so that no code is clipped.
"""

from __future__ import annotations

from .. import slots as s
from ..spec import Recipe

WINDOW = s.ExactEnds(local=128, seal_block=32, dtype="bfloat16")


def kivi(name: str, bits: int) -> Recipe:
    """The recipe at a number of bits."""
    return Recipe(
        name=name,
        key_codec=s.Affine(bits=bits, axis="channel", group=32),
        value_codec=s.Affine(bits=bits, axis="token", group=32),
        window=WINDOW,
    )


KIVI = kivi("kivi", 4)
KIVI_2BIT = kivi("kivi-2bit", 2)
