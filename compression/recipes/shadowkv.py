"""`shadowkv`: ShadowKV as published (arXiv 2410.21465; the accuracy path of its code).

Pre-RoPE keys of all heads together are factored by truncated SVD, per prompt and layer (rank 160 of 1024 in the
paper; 0.156 x KV heads x head size for other shapes). Landmarks are means of 8 post-RoPE keys; the 48 chunks per
KV head that their landmark describes worst (least cosine) stay exact and are never scored, as do the last 4
chunks and the remainder. A decode step softmaxes q . landmarks / sqrt(d) over the other chunks, takes the maximum
over the GQA group and attends to the best chunks of each KV head: 1/64 of the prompt (2,048 of 128K), at least
256 tokens. Generated tokens stay exact for ever. Values are kept whole.

Deviations:
- Singular vectors come from orthogonal iteration on the Gram matrix (`subspace.py`), whose error is up to 1 % larger
  than the exact ones', and the factor rows carry the singular values (K V and V^T instead of U and S V^T), both in
  bfloat16.
- The SVD is fitted on the sealed rows alone, those that it will stand for; the code factors all rows of the prompt,
  the exact last ones included.
- Landmarks are rebuilt where decode runs, from the decoded keys, and never sent; the paper takes the mean of the
  exact keys. Outliers are chosen on the exact keys during prefill.
- The share 1/64 with a floor of 256 tokens replaces a constant budget of 2,048, which the paper uses at >= 122K.
- The code takes its dense path for prompts up to 4,096 tokens; here only prompts that the budget, the outliers and
  the local rows cover anyway run `exact`.
- Chunks are reconstructed in each step: selected keys are always decoded ones (the CPU class of the published code
  keeps exact keys for chunks that stay selected, so its logits depend on hits).
- Where the values lie (device or host) is the decode worker's business and changes no result.
"""

from __future__ import annotations

from .. import slots as s
from ..spec import Recipe

SHADOWKV = Recipe(
    name="shadowkv",
    key_codec=s.LowRank(share=0.156, bits=16),
    value_codec=s.Dense("bfloat16"),
    retrieval=s.ChunkLandmarks(chunk=8, outliers=48, budget_tokens=256, budget_rate=0.015625, landmark_bits=16),
    window=s.ExactEnds(sinks=0, local=32, seal_block=0),
)
