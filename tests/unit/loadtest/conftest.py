"""Outcomes without a run."""

from __future__ import annotations

import pytest

from kvsluice.loadtest.outcomes import SERVED, Outcome


@pytest.fixture
def outcome():
    """Makes an outcome: due, then a first token, then more, then the end."""

    def make(index=0, arrival_s=0.0, ttft_s=0.1, tpot_s=0.01, tokens=11, status=SERVED, **more) -> Outcome:
        first_s = arrival_s + ttft_s
        last_s = first_s + tpot_s * (tokens - 1)
        values = {
            "index": index, "turn": 0, "recipe": "", "arrival_s": arrival_s, "sent_s": arrival_s, "first_s": first_s,
            "last_s": last_s, "end_s": last_s, "status": status, "error": "", "input_tokens": 8,
            "output_tokens": tokens, "cached_tokens": 0, "late_s": 0.0, "warm_up": False,
        }  # fmt: skip
        return Outcome(**{**values, **more})

    return make
