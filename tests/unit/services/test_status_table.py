"""What `kvsluice status` shows of a fleet, once and again."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from kvsluice.services import fleet_commands
from kvsluice.services.fleet_commands import _watch
from kvsluice.services.status_table import status_table

STARTING = {
    "fleet": "tea",
    "converged": False,
    "generation": 3,
    "groups": [
        {
            "group": "decode", "role": "decode", "model": "m", "version": "abc", "serving": 1, "wanted": 2, "min": 1,
            "max": 4, "draining": 1, "queue_s": 0.25, "usage": 0.5,
        }
    ],
    "workers": [
        {
            "worker": "decode-0", "role": "decode", "version": "abc", "state": "serving", "state_s": 90.0,
            "restarts": 1, "waits_for": "", "error": None, "address": "10.0.0.1:1", "package": "0.1",
            "running": 3, "waiting": 0, "pending_tokens": 9, "cache_usage": 0.25,
        },
        {
            "worker": "decode-1", "role": "decode", "version": "abc", "state": "starting", "state_s": 1.0,
            "restarts": 0, "waits_for": "1 GPU", "error": None,
        },
    ],
}  # fmt: skip
SERVING = STARTING | {"converged": True, "generation": 4}


def test_a_table_names_groups_workers_and_what_they_wait_for():
    console = Console(file=io.StringIO(), width=200)
    console.print(status_table(STARTING))
    text = console.file.getvalue()
    for part in ("fleet tea: on its way", "membership 3", "1 of 2 (1–4)", "decode-0", "decode-1: 1 GPU"):
        assert part in text


@pytest.mark.parametrize("as_json", [True, False])
def test_watching_shows_every_look_until_it_is_interrupted(as_json, monkeypatch, capsys):
    monkeypatch.setattr(fleet_commands, "WATCH_S", 0.0)
    states = iter((STARTING, SERVING))

    def look():
        found = next(states, None)
        if found is None:
            raise KeyboardInterrupt
        return found

    with pytest.raises(KeyboardInterrupt):
        _watch(look, as_json)
    said = capsys.readouterr().out
    if as_json:
        assert [json.loads(line)["generation"] for line in said.splitlines()] == [3, 4]
    else:
        assert "membership 4" in said
