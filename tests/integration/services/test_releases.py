"""Releases that cannot work together: neither misreads the other, and requests go to workers of the gateway's own."""

from __future__ import annotations

import pytest

from kvsluice.errors import WorkerLost
from kvsluice.services.worker import PROTOCOL


@pytest.mark.parametrize(("role", "version"), [("decode", 0), ("decode", PROTOCOL + 1), ("prefill", PROTOCOL + 1)])
async def test_workers_of_another_release_are_left_out_until_they_are_replaced(
    make_fleet, until, caplog, role, version
):
    fleet = await make_fleet(worker_wait_s=0.2)
    other = f"{role}-1"
    fleet.script.protocols[other] = version  # 0 is what a release says that knows of no versions
    await fleet.add_worker(other, role)
    said = f"{role} worker {other} is left out: it speaks version {version} of the workers' protocol"
    await until(lambda: said in caplog.text)
    assert (await fleet.client.generate("abc")).text == fleet.script.text[:-1]
    await fleet.kill_worker(f"{role}-0")
    await until(lambda: not fleet.gateway.ready)
    with pytest.raises(WorkerLost, match=f"no {role} worker is there"):
        await fleet.client.generate("abc")
    assert caplog.text.count(said) == 1
    del fleet.script.protocols[other]
    await fleet.until_ready()
    assert (await fleet.client.generate("abc")).text == fleet.script.text[:-1]
