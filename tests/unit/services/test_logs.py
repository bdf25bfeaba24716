"""Log lines as JSON: what they hold, and what they must not."""

from __future__ import annotations

import json
import logging

import pytest

from kvsluice.services.telemetry import about, configure_logging, current_request_id


@pytest.fixture
def log():
    root = logging.getLogger("kvsluice")
    before = root.handlers[:], root.level, root.propagate
    yield logging.getLogger("kvsluice.test")
    root.handlers[:], root.level, root.propagate = before


def test_a_line_is_a_json_object_that_names_the_request(log, capsys):
    configure_logging("info", "json", "decode-0")
    log.info("layer %d\nis “here”", 3)
    token = current_request_id.set("of-the-context")
    log.warning("from a handler")
    log.warning("from a thread of many", extra=about("named"))
    current_request_id.reset(token)
    log.debug("not worth a line")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line.get("request_id") for line in lines] == [None, "of-the-context", "named"]
    assert lines[0]["message"] == "layer 3\nis “here”"
    assert {line["process"] for line in lines} == {"decode-0"}
    assert [line["level"] for line in lines] == ["info", "warning", "warning"]
    assert set(lines[0]) == {"time", "level", "logger", "process", "message"}


def test_an_exception_is_named_and_its_text_left_out(log, capsys):
    configure_logging("info", "json")
    try:
        raise ValueError("the prompt said: hunter2")
    except ValueError:
        log.exception("it failed")
    (line,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert line["error"].startswith("ValueError at test_an_exception_is_named")
    assert "hunter2" not in json.dumps(line)


def test_text_is_what_it_was(log, capsys):
    configure_logging("warning")
    log.warning("plain")
    assert capsys.readouterr().err.endswith("WARNING kvsluice.test: plain\n")
