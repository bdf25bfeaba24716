"""The decode benchmark on a GPU: captured steps attend to the chunks that are forced."""

from __future__ import annotations

import pytest
import torch

from kvsluice.benchmarks.options import parse_options
from kvsluice.benchmarks.runner import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("share", [0.0, 0.75])
def test_captured_steps_fetch_as_often_as_the_hit_rate_says(share):
    options = {
        "model": "smollm2-135m",
        "random_weights": True,
        "context": "8192",
        "recipe": "sluice-full",
        "selected": "256",
        "batch": "3",
        "hit_rate": str(share),
        "kv_offloading_gib": "0.25",
        "cache_gib": "2",
        "steps": "48",  # past a seal
        "profile": True,
        "warmup": "8",
        "device": "cuda",
    }
    (row,) = run(parse_options("decode", options)).rows
    assert row.not_run is None
    assert row.figures["hit_rate"] == pytest.approx(share, abs=0.02)
    assert row.figures["fetched_bytes"] > 0
    assert {"step_attention.attend", "hot_set", "matrix products"} <= row.parts.keys()
    assert 0 < sum(row.parts.values()) < 10 * row.time.median_s
