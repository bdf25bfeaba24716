"""What the processes of a service give to Ray's monitoring, read where Ray's dashboard gets it from."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from kvsluice.client import Client
from kvsluice.services.processes import descendants

WAIT_S = 60.0


def export_port(service) -> int:
    """Where Ray answers scrapes, as it notes in the folder of its session."""
    raylet = next(p for p in descendants(service.process.pid) if p.name == "raylet")
    command = Path(f"/proc/{raylet.pid}/cmdline").read_text().split("\0")
    folder = next(word for word in command if word.startswith("--session_dir=")).partition("=")[2]
    (noted,) = Path(folder).glob("metrics_export_port_*")
    return int(noted.read_text())


def read(port: int) -> dict[tuple[str, str], float]:
    """Value of every series of ours, by its name and what it says of a worker or a finish reason."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=10.0).text
    return {
        (sample.name, sample.labels.get("worker", sample.labels.get("finished_reason", ""))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("ray_kvsluice_")
    }


def test_ray_shows_what_gateway_and_workers_count(service):
    with Client(service.address, timeout_s=120.0) as client:
        done = client.generate("The capital of France is", temperature=0, max_tokens=6, recipe="exact")
    wanted = {
        ("ray_kvsluice_worker_decode_tokens_total", "decode-0"),
        ("ray_kvsluice_worker_prefill_prompts_total", "prefill-0"),
        ("ray_kvsluice_request_success_total", done.choices[0].finish_reason),
        ("ray_kvsluice_time_to_first_token_seconds_count", ""),
    }
    # both processes and Ray itself publish every few seconds
    port, deadline, found = export_port(service), time.monotonic() + WAIT_S, {}
    while not all(found.get(key, 0) > 0 for key in wanted) and time.monotonic() < deadline:
        time.sleep(0.5)
        found = read(port)
    assert {key: found.get(key, 0) > 0 for key in wanted} == dict.fromkeys(wanted, True)
