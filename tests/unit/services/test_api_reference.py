"""The ranges that docs/api.md gives are those that requests are held to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvsluice.errors import InvalidRequest
from kvsluice.protos import generation_pb2 as pb
from kvsluice.services.validation import ServedModel, check_request

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "api.md").read_text()
MODEL = ServedModel("m", 1000, 4096, 512, "balanced", has_chat_template=True)


def words(field: str) -> str:
    table = PAGE.partition("### SamplingParams")[2].partition("###")[0]
    found = re.search(rf"^\| `{field}` \| [^|]+ \| (.*) \|$", table, re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 3.0), ("top_p", 0.0), ("min_p", 2.0), ("repetition_penalty", 0.0), ("presence_penalty", 3.0),
        ("frequency_penalty", -3.0), ("logprobs", 21), ("n", 0), ("logit_bias", {1: 101.0}), ("stop", ["x"] * 17),
        ("stop_token_ids", [1] * 129),
    ],
)  # fmt: skip
def test_what_is_refused_names_the_range_of_the_page(field, value):
    request = pb.GenerateRequest(prompt="x", sampling=pb.SamplingParams(**{field: value}))
    with pytest.raises(InvalidRequest, match=f"sampling.{field}") as refused:
        check_request(request, MODEL, lambda: 0)
    assert refused.value.allowed in words(field)


def test_every_method_and_message_is_on_the_page():
    service = pb.DESCRIPTOR.services_by_name["Generation"]
    assert all(f"| `{method.name}` |" in PAGE for method in service.methods)
    assert all(f"\n### {name}\n" in PAGE for name in pb.DESCRIPTOR.message_types_by_name)
