"""What the gateway and the workers count, read as a monitoring system reads it, after real traffic."""

from __future__ import annotations

import asyncio
from hashlib import sha256

import httpx
import pytest
import torch
import yaml
from prometheus_client.parser import text_string_to_metric_families

from kvsluice.errors import ConfigError, Overloaded, RequestCancelled
from kvsluice.kvstore.memory import MemoryStore
from kvsluice.services.gateway.attempt import Attempt
from kvsluice.services.metrics.catalog import GATEWAY, GATEWAY_LABELS, WORKER, WORKER_LABELS

LIBRARY = ("_created",)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(2, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Exported:
    """The output of `/metrics`, checked against the catalogue."""

    def __init__(self, text: bytes, catalogue, common) -> None:
        self.values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        known = {metric.exported_name: metric for metric in catalogue}
        for family in text_string_to_metric_families(text.decode()):
            for sample in family.samples:
                if sample.name.endswith(LIBRARY):
                    continue
                name = family.name + ("_total" if family.type == "counter" else "")
                metric = known[name]
                assert metric.kind == family.type
                labels = {k: v for k, v in sample.labels.items() if k != "le"}
                assert set(labels) == {*common, *metric.labels}, sample
                self.values[sample.name, frozenset((k, v) for k, v in labels.items() if k not in common)] = sample.value

    def __call__(self, name: str, **labels: str) -> float:
        return self.values["kvsluice_" + name, frozenset(labels.items())]

    def names(self) -> set[str]:
        return {name for name, _ in self.values}


def of_worker(fleet) -> Exported:
    return Exported(fleet.metrics.render(), WORKER, WORKER_LABELS)


def of_gateway(fleet) -> Exported:
    return Exported(fleet.gateway.metrics.render(), GATEWAY, GATEWAY_LABELS)


async def test_a_gateway_counts_requests_from_the_door_to_the_last_token(real_fleet):
    options = {"temperature": 0, "max_tokens": 5, "ignore_eos": True, "recipe": "exact", "n": 2}
    done = await real_fleet.client.generate(prompt(40), **options)
    await real_fleet.client.generate(prompt(30), **options | {"max_tokens": 1})
    await real_fleet.until_idle()
    now = of_gateway(real_fleet)
    assert now("prompt_tokens_total") == now("prefix_cache_queries_total") == 70
    assert now("generation_tokens_total") == 12
    assert now("request_success_total", finished_reason="length") == 2
    assert now("inter_token_latency_seconds_count") == 8
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_inference_time"):
        assert now(f"{name}_seconds_count") == 2, name
    # one token has no time between tokens, and ends the request before anything is handed over
    assert now("request_time_per_output_token_seconds_count") == 1
    assert now("request_time_per_output_token_seconds_sum") == pytest.approx(
        now("request_decode_time_seconds_sum") / 4, rel=1e-6
    )
    assert now("handoff_seconds_count") == now("handoff_exposed_seconds_count") == 1
    assert now("handoff_exposed_seconds_sum") <= now("handoff_seconds_sum")
    assert now("handoff_bytes_total", recipe="exact") == done.recipe.handoff_bytes
    ratio = now("handoff_compression_ratio_sum", recipe="exact")
    assert ratio == done.recipe.handoff_bytes / now("handoff_bf16_bytes_total", recipe="exact")
    assert now("request_inference_time_seconds_sum") == pytest.approx(
        now("request_prefill_time_seconds_sum") + now("request_decode_time_seconds_sum")
    )
    assert (now("workers", role="prefill"), now("workers", role="decode")) == (1, 1)
    assert now("num_requests_running") == now("num_requests_waiting") == now("recall_rows_total") == 0
    assert now("tier_capacity_bytes", worker="worker-0", tier="device") == real_fleet.decode.capacity_bytes


async def test_rows_that_came_back_are_counted_when_their_request_ends(real_fleet, recalling):
    options = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    await real_fleet.client.generate(prompt(300), recipe="exact", **options)
    assert of_gateway(real_fleet)("recall_rows_total") == 0
    await real_fleet.client.generate(prompt(300), recipe=recalling, n=2, **options)
    assert 0 < of_gateway(real_fleet)("recall_rows_total") <= 2 * 11 * 4


async def test_a_worker_counts_what_its_engines_do(make_real_fleet):
    fleet = await make_real_fleet(store=MemoryStore(1 << 26))
    options = {"temperature": 0, "max_tokens": 5, "ignore_eos": True, "recipe": "exact", "durability": "tokens"}
    done = await fleet.client.generate(prompt(40), **options)
    with pytest.raises(RequestCancelled):
        async for _ in fleet.client.stream(prompt(20), request_id="gone", **options | {"max_tokens": 400}):
            if fleet.recorder.events("decode.committed", request_id="gone"):
                await fleet.client.cancel("gone")
    await fleet.until_idle()
    now = of_worker(fleet)
    assert now("worker_prefill_prompts_total") == now("worker_received_handoffs_total") == 2
    assert now("worker_prefill_prompt_tokens_total") == 60
    assert now("worker_prefill_pack_rows_sum") == 60 * 4  # layers
    assert now("worker_prefill_pack_rows_count") == now("worker_prefill_pack_seconds_count") >= 2 * 4
    assert now("worker_received_bytes_total") <= now("worker_sent_bytes_total")  # manifests are no frames
    assert now("worker_sent_bytes_total") >= done.recipe.handoff_bytes
    # the other one may have been cancelled before its last acknowledgement came
    assert now("worker_handoff_seconds_count") == now("worker_sent_handoffs_total") in (1, 2)
    assert now("worker_decode_batch_size_sum") == now("worker_decode_batch_size_count") >= 4
    assert now("worker_decode_tokens_total") >= 4
    assert now("worker_out_of_memory_total", engine="decode") == 0
    assert now("worker_decode_running") == now("worker_tier_used_bytes", tier="device") == 0
    assert now("worker_store_operation_seconds_count", operation="put") >= 2
    # who gave up is no failure of an engine
    assert not {name for name in now.names() if name.startswith("kvsluice_worker_failures")}


async def test_a_worker_answers_scrapes_at_its_own_address(make_real_fleet):
    fleet = await make_real_fleet()
    config = fleet.config.model_copy(update={"worker_metrics_port": 0})
    port = fleet.metrics.serve(config, "127.0.0.1")
    async with httpx.AsyncClient() as client:
        answer = await client.get(f"http://127.0.0.1:{port}/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
    assert b"kvsluice_worker_prefill_pending_tokens" in answer.content
    with pytest.raises(ConfigError, match=f"worker_metrics_port: cannot listen on 127.0.0.1 port {port}"):
        fleet.metrics.serve(config.model_copy(update={"worker_metrics_port": port}), "127.0.0.1")
    with pytest.raises(ConfigError, match="worker_metrics_port: anybody could read"):
        fleet.metrics.serve(config, "0.0.0.0")
    assert fleet.metrics.serve(fleet.config, "127.0.0.1") is None


async def test_a_worker_shows_its_metrics_to_those_with_a_key_for_them(make_real_fleet, tmp_path):
    keys = tmp_path / "keys.yaml"
    entries = [
        {"tenant": "prometheus", "sha256": sha256(b"scrape-" + b"x" * 32).hexdigest(), "role": "monitor"},
        {"tenant": "alice", "sha256": sha256(b"client-" + b"x" * 32).hexdigest()},
    ]
    keys.write_text(yaml.safe_dump({"keys": entries}))
    fleet = await make_real_fleet()
    config = fleet.config.model_copy(update={"worker_metrics_port": 0, "api_keys_file": str(keys)})
    url = f"http://127.0.0.1:{fleet.metrics.serve(config, '127.0.0.1')}"
    async with httpx.AsyncClient(base_url=url) as client:
        answers = [
            await client.get("/metrics"),
            await client.get("/metrics", headers={"authorization": "Bearer guessed"}),
            await client.get("/metrics", headers={"authorization": f"Bearer client-{'x' * 32}"}),
            await client.get("/metrics", headers={"authorization": f"Bearer scrape-{'x' * 32}"}),
            await client.get("/"),
        ]
    assert [answer.status_code for answer in answers] == [401, 401, 403, 200, 404]


async def test_what_is_shed_and_what_fails_is_counted_by_its_reason(make_fleet, until):
    fleet = await make_fleet(max_num_seqs=1, max_queue=0)
    held = asyncio.Event()
    fleet.script.gate = held.wait
    running = asyncio.create_task(fleet.client.generate("hi", max_tokens=3))
    await until(lambda: fleet.script.opens)
    with pytest.raises(Overloaded):
        await fleet.client.generate("hi", max_tokens=3)
    held.set()
    await running
    now = of_gateway(fleet)
    assert now("requests_shed_total", reason="queue_full") == now("request_failure_total", error_type="Overloaded") == 1


async def test_a_handoff_that_breaks_is_counted_as_one(make_fleet, monkeypatch):
    fleet = await make_fleet()
    is_open, read = asyncio.Event(), Attempt._read_prefill

    async def reading(self, *args) -> None:
        is_open.set()
        await read(self, *args)

    monkeypatch.setattr(Attempt, "_read_prefill", reading)

    async def die(request) -> None:
        await is_open.wait()  # before that the worker has not taken the prompt
        raise RuntimeError("the worker's own words")

    fleet.script.prefill = die
    with pytest.raises(Exception, match="internal"):
        await fleet.client.generate("hi", max_tokens=3)
    now = of_gateway(fleet)
    assert now("handoff_failures_total", error_type="InternalError") == 1
    assert "words" not in fleet.gateway.metrics.render().decode()
