"""`kvsluice loadtest` against the running service, as the command is run."""

from __future__ import annotations

import re
import sys

import pytest

from kvsluice.loadtest.results import load
from kvsluice.services import cli

SMALL = ("--input-len", "uniform:24..48", "--output-len", "6", "--request-rate", "20")


@pytest.fixture
def loadtest(service, monkeypatch, capfd):
    """Runs the command; gives status, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kvsluice", "loadtest", *arguments])
        code: object = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        said = capfd.readouterr()
        assert isinstance(code, int)
        return code, said.out, said.err

    return lambda *arguments: run("--address", service.address, *arguments)


def test_a_load_of_two_recipes_is_served_counted_and_reported(loadtest, tmp_path):
    file, page = tmp_path / "a.json", tmp_path / "a.html"
    arguments = (*SMALL, "--num-prompts", "10", "--num-warmups", "2", "--recipes", "exact=1,balanced=1", "--seed", "5")
    # a machine that is busy with other tests may send late; that is not what is tested here
    patient = ("--late-after-ms", "60000", "--slo", "ttft_p99=600s,errors=0%")
    code, out, err = loadtest(*arguments, *patient, "--json", str(file), "--html", str(page))
    assert code == 0, out + err
    assert re.search(r"^Successful requests: +10$", out, re.M)
    assert re.search(r"^Total generated tokens: +60$", out, re.M)
    assert "SLO ttft_p99" in out
    assert "errors: 0.00%, wanted at most 0.00%: met" in out

    run = load(file).last
    outcomes = run.outcomes()
    assert [one.warm_up for one in outcomes] == [True, True, *[False] * 10]
    assert all(24 <= one.input_tokens <= 48 and one.output_tokens == 6 for one in outcomes)
    assert {one.recipe for one in outcomes} == {"exact", "balanced"}
    for one in outcomes:
        assert one.arrival_s <= one.sent_s <= one.first_s <= one.last_s <= one.end_s
    assert load(file).settings["service"]["model"] == "smollm2-135m-longctx"
    assert page.read_text().count("data:image/svg+xml") == 4

    code, out, _ = loadtest(*arguments, "--slo", "ttft_p50=0.001ms", "--late-after-ms", "60000")
    assert code == 3
    assert "wanted at most 0.00 ms: MISSED" in out


def test_what_the_service_refuses_ends_the_command_before_any_load(loadtest):
    code, out, err = loadtest(*SMALL, "--recipes", "nosuch")
    assert (code, out) == (1, "")
    assert err.startswith("kvsluice: recipe")
