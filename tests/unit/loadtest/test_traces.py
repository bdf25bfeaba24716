"""Recorded loads: what the formats hold, and what becomes of it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kvsluice.errors import InvalidRequest
from kvsluice.loadtest.arrivals import RateProfile
from kvsluice.loadtest.lengths import Fixed
from kvsluice.loadtest.traces import read_trace
from kvsluice.loadtest.vocabulary import Vocabulary
from kvsluice.loadtest.workload import Mix, Trace, Workload

MOONCAKE = [
    {"timestamp": 2000, "input_length": 1200, "output_length": 40, "hash_ids": [7, 8, 9]},
    {"timestamp": 1000, "input_length": 1100, "output_length": 20, "hash_ids": [7, 8, 10]},
    {"timestamp": 4500, "input_length": 600, "output_length": 1, "hash_ids": [11, 8]},
]
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:05.0299600,110,27
"""


@pytest.fixture
def file(tmp_path):
    def write(text: str):
        path = tmp_path / "trace"
        path.write_text(text)
        return path

    return write


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def conversations(rows, count=100, **scaled):
    source = Trace(rows, RateProfile.constant(1.0), 1.0, Fixed(16), **scaled)
    return list(Workload(source, Mix(), Vocabulary.of_size(5000), seed=3, count=count))


def test_a_mooncake_trace_keeps_times_lengths_and_shared_beginnings(file):
    made = conversations(read_trace("mooncake", file(lines(MOONCAKE))))
    assert [one.arrival_s for one in made] == [0.0, 1.0, 3.5]
    (early,), (late,), (other,) = (one.turns for one in made)
    assert [len(turn.prompt) for turn in (early, late, other)] == [1100, 1200, 600]
    assert [turn.max_tokens for turn in (early, late, other)] == [20, 40, 1]
    # two blocks of 512 in common, then no longer
    assert early.prompt[:1024] == late.prompt[:1024]
    assert early.prompt[1024:1100] != late.prompt[1024:1100]
    # block 8 is the same tokens wherever it stands
    assert other.prompt[512:] == early.prompt[512:600]


def test_a_trace_is_scaled_in_time_rate_and_length(file):
    rows = read_trace("mooncake", file(lines(MOONCAKE)))
    fast = conversations(rows, speed=10.0, length_scale=0.1)
    assert [one.arrival_s for one in fast] == pytest.approx([0.0, 0.1, 0.35])
    (early,), (late,), _ = (one.turns for one in fast)
    assert (len(early.prompt), early.max_tokens) == (110, 2)
    # a block is 51 tokens now, so that what is shared stays in proportion
    assert early.prompt[:102] == late.prompt[:102]
    assert early.prompt[102:] != late.prompt[102:110]

    many = [row for row in rows for _ in range(1000)]
    kept = conversations(many, 10_000, keep=0.2)
    assert abs(len(kept) - 600) < 5 * np.sqrt(3000 * 0.2 * 0.8)


def test_an_azure_trace_has_times_and_lengths(file):
    rows = read_trace("azure", file(AZURE))
    assert [row.time_s for row in rows] == pytest.approx([0.0, 1.05])
    assert [(row.input_tokens, row.output_tokens) for row in rows] == [(4808, 10), (110, 27)]
    # the published files of 2024 name the zone
    text = AZURE.replace("03.9799600", "03.979960+00:00").replace("05.0299600", "05.029960+00:00")
    assert [row.time_s for row in read_trace("azure", file(text))] == pytest.approx([0.0, 1.05])


def test_own_prompts_are_sent_as_they_are(file):
    rows = read_trace(
        "custom",
        file(lines([{"prompt": "Hi"}, {"prompt": [5, 6], "max_tokens": 3, "recipe": "fast"},
                    {"prompt": [{"role": "user", "content": "Hi"}]}])),
    )  # fmt: skip
    turns = [one.turns[0] for one in conversations(rows)]
    assert [turn.prompt for turn in turns] == ["Hi", (5, 6), ({"role": "user", "content": "Hi"},)]
    assert [turn.max_tokens for turn in turns] == [16, 3, 16]
    assert [turn.recipe for turn in turns] == ["", "fast", ""]


def test_requests_longer_than_the_model_takes_are_left_out_and_counted(file):
    source = Trace(read_trace("mooncake", file(lines(MOONCAKE))), RateProfile.constant(1.0), 1.0, Fixed(1))
    workload = Workload(source, Mix(), Vocabulary.of_size(5000), seed=3, count=9, most_tokens=1150)
    assert [len(one.turns[0].prompt) for one in workload] == [1100, 600]
    assert workload.num_left_out == 1


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("mooncake", "", "holds no request"),
        ("mooncake", "{", "line 1 is not JSON"),
        ("mooncake", "[" * 100_000, "line 1 is not JSON"),
        ("mooncake", "[]", "line 1 is no JSON object"),
        ("mooncake", lines([MOONCAKE[0], {**MOONCAKE[0], "input_length": -1}]), "line 2: input_length is -1"),
        ("mooncake", lines([{**MOONCAKE[0], "output_length": 2.5}]), "output_length is 2.5"),
        ("mooncake", lines([{**MOONCAKE[0], "timestamp": None}]), "timestamp is None"),
        ("mooncake", '{"timestamp": NaN, "input_length": 1, "output_length": 1}', "timestamp is nan"),
        ("mooncake", lines([{**MOONCAKE[0], "hash_ids": ["a"]}]), "hash_ids"),
        ("mooncake", lines([{**MOONCAKE[0], "hash_ids": [1, 2, 3, 4]}]), "4 hash_ids for 1200 tokens"),
        ("azure", "TIMESTAMP,ContextTokens\n", "no column GeneratedTokens"),
        ("azure", AZURE + "yesterday,1,1\n", "line 4"),
        ("azure", AZURE + "2023-11-16 18:17:05,1\n", "line 4"),
        ("custom", lines([{"prompt": ""}]), "line 1: prompt"),
        ("custom", lines([{"text": "x"}]), "unknown 'text'"),
        ("custom", lines([{"prompt": "a", "timestamp": 1}, {"prompt": "b"}]), "a time for all or for none"),
    ],
)
def test_a_broken_trace_is_refused_by_the_place_of_its_fault(file, kind, text, said):
    with pytest.raises(InvalidRequest) as refused:
        read_trace(kind, file(text))
    assert said in refused.value.message
    assert refused.value.field == "--dataset-path"
