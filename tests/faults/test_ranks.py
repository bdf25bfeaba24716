"""A running service whose decode worker is three processes that hold the model together."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from kvsluice.client import Client
from kvsluice.evals.service_process import running_service
from kvsluice.services.processes import descendants, wait_gone

PROMPT = "A function that computes the n-th Fibonacci number, with a docstring and two examples of its use:\n"
OPTIONS = {"max_tokens": 40, "temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def of_ranks():
    with running_service("--decode-tensor-parallel-size", "3", "--worker-wait-s", "120") as service:
        yield service


def ranks_below(pid: int) -> list:
    """Processes of a service that are ranks of a model, but those that lead."""
    found = descendants(pid)
    return [p for p in found if b"kvsluice.services.ranks" in Path(f"/proc/{p.pid}/cmdline").read_bytes()]


@pytest.mark.acceptance
def test_ranks_say_what_one_process_says_and_end_and_begin_together(service, of_ranks) -> None:
    with Client(service.address) as one, Client(of_ranks.address, timeout_s=180.0) as several:
        # long enough for `sluice` to pack, choose and seal
        prompt = PROMPT * 12
        expected = {name: one.generate(prompt, recipe=name, **OPTIONS).token_ids for name in ("exact", "sluice")}
        for name, token_ids in expected.items():
            assert several.generate(prompt, recipe=name, **OPTIONS).token_ids == token_ids
        before = ranks_below(of_ranks.process.pid)
        assert len(before) == 2
        stream = several.stream(prompt, recipe="exact", **OPTIONS)
        taken = [token for _ in range(3) for token in next(stream).token_ids]
        os.kill(before[0].pid, signal.SIGKILL)
        taken += [token for chunk in stream for token in chunk.token_ids]
        assert tuple(taken) == expected["exact"], "the stream went on with the ranks that came after"
        assert stream.completion.durability.migrations >= 1
        assert wait_gone(before, 10.0) == [], "a rank that is left alone ends"
        assert len(ranks_below(of_ranks.process.pid)) == 2
