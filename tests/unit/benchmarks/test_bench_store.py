"""`bench store`: sides that do the same, rows that say what was moved, and a server that is gone afterwards."""

from __future__ import annotations

import pytest

from kvsluice.benchmarks import bench_store, performance, store_sides, timing
from kvsluice.benchmarks.bench_store import HEAD, READ, WRITE
from kvsluice.benchmarks.performance import File
from kvsluice.benchmarks.store_sides import LIBRARY, OURS, TOOL, open_sides
from kvsluice.errors import InternalError
from kvsluice.evals.service_process import running_redis
from kvsluice.kvstore.identity import HeadKey, ManifestKey, StoreKey
from kvsluice.kvstore.store import Head
from kvsluice.tests.faults.rig.redis_server import needs_redis


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    monkeypatch.setattr(timing, "CPU_COPY_BYTES", 1 << 16)
    monkeypatch.setattr(timing, "CPU_GEMM_SIZE", 16)
    monkeypatch.setattr(bench_store, "LEAST_SECONDS", 0.01)
    needs_redis()


@pytest.mark.parametrize("tool", [True, False])
def test_all_sides_move_the_same_bytes(bench, monkeypatch, tool):
    if not tool:
        monkeypatch.setattr(store_sides, "has_tool", lambda: False)
    elif not store_sides.has_tool():
        pytest.skip("no redis-benchmark on this machine; on Debian: apt-get install redis-tools")
    results = bench("store", batch="1,3", steps="4", random_weights=None)
    sides = {OURS, LIBRARY, *([TOOL] if tool else [])}
    assert {row.batch for row in results.rows} == {1, 3}
    for what in {row.what for row in results.rows}:
        rows = [row for row in results.rows if row.what == what and row.batch == 3]
        assert {row.side for row in rows} == (sides if what != HEAD else {OURS, LIBRARY})
        assert len({row.figures.get("value_bytes") for row in rows}) == 1
        ours, library = (next(row for row in rows if row.side == side) for side in (OURS, LIBRARY))
        assert ours.ratios[LIBRARY] == pytest.approx(library.time.median_s / ours.time.median_s)
        assert ours.figures["latency_p99_s"] > 0 and ours.time.repeats == 2
    assert {row.what.partition(",")[0] for row in results.rows} == {WRITE, READ, HEAD}
    text = performance.store_table([File("bench_store", results)])
    assert text.count("\n") == 1 + 2 * 7 and "| write, frame of a prompt |" in text


async def test_no_side_tells_stories():
    """What is compared has the same effect."""
    before, after = (Head(1, ManifestKey(StoreKey(f"kvsluice:manifest:{'0' * 64}:{i}"))) for i in (1, 2))
    with running_redis() as address:
        async with open_sides(address, 2) as sides:
            for name, side in sides.items():
                key, head = StoreKey(f"kvsluice:frame:{name}"), HeadKey(f"kvsluice:head:{name}")
                assert await side.read(key) is None
                await side.write(key, b"value")
                assert await side.read(key) == b"value"
                await side.move_head(head, None, before)
                with pytest.raises(InternalError, match="head"):
                    await side.move_head(head, None, after)
                await side.move_head(head, before, after)
                await side.remove([key, head])
                assert await side.read(key) is None
        if store_sides.has_tool():
            assert store_sides.run_tool(address, "get", 100, 2, 2000) > 0
            with pytest.raises(InternalError, match="redis-benchmark failed"):
                store_sides.run_tool(address, "no-such-test", 100, 1, 1)
