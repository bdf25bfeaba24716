"""Load tests over both doors of a gateway with scripted workers, all in this process."""

from __future__ import annotations

import asyncio

import pytest

from kvsluice.errors import InvalidRequest
from kvsluice.loadtest.arrivals import RateProfile
from kvsluice.loadtest.lengths import Fixed, Uniform
from kvsluice.loadtest.options import parse_options
from kvsluice.loadtest.runner import exit_status, run
from kvsluice.loadtest.vocabulary import Vocabulary
from kvsluice.loadtest.workload import Lengths, Mix, Workload

DOORS = ("grpc", "http")
VOCABULARY = Vocabulary.of_size(200)


@pytest.fixture
def drive(fleet):
    """Runs a load through a door; gives the results' last run. The workers' answers go on for as long as asked."""
    fleet.script.eos = False

    async def drive(door: str, **given):
        address = fleet.address if door == "grpc" else fleet.gateway.http_address
        # all run in one process here, so the client may well be late
        always = {"address": address, "backend": door, "vocab_size": "200", "late_after_ms": "60000"}
        return (await run(parse_options(always | given), [], {})).last

    return drive


@pytest.mark.parametrize("door", DOORS)
async def test_both_doors_tell_the_same_load(drive, door):
    found = await drive(
        door, num_prompts="40", num_warmups="2", request_rate="400", input_len="uniform:5..50", output_len="9", seed="3"
    )
    outcomes = found.outcomes()
    assert (found.figures["completed"], found.figures["total_output_tokens"]) == (40, 360)
    # lengths are those that were drawn, by the server's own count
    lengths = Lengths(RateProfile.constant(400.0), 1.0, Uniform(5, 50), Fixed(9))
    drawn = [turn.input_tokens for one in Workload(lengths, Mix(), VOCABULARY, seed=3, count=42) for turn in one.turns]
    assert [one.input_tokens for one in outcomes] == drawn
    for one in outcomes:
        assert one.arrival_s <= one.sent_s <= one.first_s <= one.last_s <= one.end_s
    assert sum(count for _, count in found.itl) >= 40
    assert found.invalid is None


@pytest.mark.parametrize("door", DOORS)
async def test_so_many_streams_are_open_at_once_and_no_more(drive, fleet, until, door):
    waiting, go_on = [], asyncio.Event()

    async def gate() -> None:
        waiting.append(True)
        await go_on.wait()

    fleet.script.gate = gate
    task = asyncio.create_task(
        drive(door, closed_loop=True, max_concurrency="16", num_prompts="40", input_len="8", output_len="2")
    )
    await until(lambda: len(waiting) >= 16)
    go_on.set()
    found = await task
    assert found.figures["completed"] == 40
    assert found.figures["max_concurrent_requests"] == 16


async def test_conversations_send_what_was_said_before(drive):
    found = await drive(
        "grpc", closed_loop=True, max_concurrency="3", num_prompts="9", turns="3", history=True, input_len="16",
        output_len="4",
    )  # fmt: skip
    # turn k sends 16 and 4 for each earlier turn, and its own 16
    turns = sorted((one.turn, one.input_tokens) for one in found.outcomes())
    assert turns == sorted([(0, 16), (1, 36), (2, 56)] * 3)


@pytest.mark.parametrize("door", DOORS)
async def test_what_is_cancelled_ends_at_the_workers_as_well(drive, fleet, until, door):
    async def never() -> None:
        await asyncio.Event().wait()

    fleet.script.gate = never
    found = await drive(door, num_prompts="5", input_len="8", output_len="50", cancel_rate="1", cancel_after_s="0.2")
    assert found.figures["counts"]["cancelled"] == 5
    await until(lambda: len(fleet.script.cancels) >= 5)


@pytest.mark.parametrize("door", DOORS)
async def test_what_is_shed_is_counted_and_misses_the_goals(make_fleet, door):
    fleet = await make_fleet(max_queue=0, max_num_seqs=1)
    fleet.script.eos = False
    address = fleet.address if door == "grpc" else fleet.gateway.http_address
    given = {"address": address, "backend": door, "vocab_size": "200", "num_prompts": "30", "input_len": "8",
             "output_len": "50", "slo": "errors=0%", "late_after_ms": "60000"}  # fmt: skip
    found = (await run(parse_options(given), [], {})).last
    counts = found.figures["counts"]
    assert counts["served"] + counts["shed"] == 30
    assert counts["shed"] > 0
    assert not found.is_met
    assert found.figures["errors"] == {"Overloaded": counts["shed"]}


async def test_the_search_reports_the_run_at_the_rate_that_it_found(fleet, capsys):
    fleet.script.eos = False
    given = {"address": fleet.address, "find_max_rate": True, "slo": "ttft_p99=60s,errors=0%", "request_rate": "150",
             "max_rate": "600", "num_prompts": "20", "input_len": "8", "output_len": "3", "late_after_ms": "60000",
             "seed": "2"}  # fmt: skip
    results = await run(parse_options(given), [], {})
    assert results.search["max_rate"] == 600
    assert [trial["rate"] for trial in results.search["trials"]] == [150, 300, 600]
    assert [one.rate for one in results.runs] == ["150", "300", "600"]
    assert [bool(one.requests) for one in results.runs] == [False, False, True]
    assert exit_status(results) == 0
    assert "trial 3: 600 req/s: met (ttft_p99 " in capsys.readouterr().err

    never = await run(parse_options(given | {"slo": "ttft_p99=0.001ms", "max_trials": "2"}), [], {})
    assert never.search["max_rate"] is None
    assert exit_status(never) == 3


async def test_a_recipe_that_is_not_there_ends_it_before_any_load(drive, fleet):
    with pytest.raises(InvalidRequest, match="recipe"):
        await drive("grpc", recipes="nosuch")
    assert fleet.script.prefills == []
