"""`fp8`: keys and values in 8-bit floating point, e4m3, with one scale for a layer's keys and one for its values.

What other engines offer as `--kv-cache-dtype fp8`. Post-RoPE keys; every row is kept and attended to; generated rows
are rounded in blocks of 32 with the prompt's scales.

Deviations: scales come from the prompt itself (its largest key and value map to 448), where engines take 1 or a
calibrated number; up to 31 rows at the end wait exact for their block.
"""

from __future__ import annotations

from .. import slots as s
from ..spec import Recipe

FP8 = Recipe(
    name="fp8",
    key_codec=s.Float8(),
    value_codec=s.Float8(),
    window=s.ExactEnds(seal_block=32, dtype="bfloat16"),
)
