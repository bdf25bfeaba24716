"""`sluice`, the project's own recipe (preset `balanced`): whole chunks at every depth, and nothing dropped within one.
`sluice-full` is the same without selective propagation: every layer holds every row.

Token-selective propagation after a calibrated layer, of whole position-aligned chunks, which have 4 rows unless the
model's profile says otherwise; the scoring window, of 64 unless it does, covers the question, not only its last words.
Keys are packed as the profile says (4-bit per channel, or low-rank at 8 bits), values in 4 bits per token; decode
scores an int8 landmark a chunk and attends to 6 % of the prompt, at least 1,024 tokens. 4 sinks and the last 32 rows
(up to 63) stay exact, in bfloat16. Generated rows are sealed in blocks of 32 at positions that are multiples of 32, so
long answers stay bounded.

A chunk's score is the maximum of its tokens' pooled scores. Chunks that were not propagated are missing from the
deep layers, and none come back (recall 0) unless the profile says so; the layers up to T hold every token.

Sources: FastKV (propagation), KIVI (axes of the integer codecs), ShadowKV (landmarks, low-rank keys), StreamingLLM
(sinks). Deviations from them: TSP selects chunks instead of tokens; landmarks are int8 and come from decoded keys;
small chunks leave few outliers, so none are kept unless the profile says so; groups of 64 channels a scale for values;
low-rank keys are those of `shadowkv`, at 8 bits with their basis rotated (`lowrank.py`).
"""

from __future__ import annotations

from dataclasses import replace

from .. import slots as s
from ..spec import Recipe

SLUICE = Recipe(
    name="sluice",
    propagation=s.TspPropagation(window=None, kernel=7, chunk_aligned=True, recall=None),
    key_codec=s.ProfileKeys(),
    value_codec=s.Affine(bits=4, axis="token", group=64),
    retrieval=s.ChunkLandmarks(chunk=None, outliers=None, budget_tokens=1024, budget_rate=0.06, landmark_bits=8),
    window=s.ExactEnds(sinks=4, local=32, seal_block=32, dtype="bfloat16"),
)
SLUICE_FULL = replace(SLUICE, name="sluice-full", propagation=s.FullPropagation())
