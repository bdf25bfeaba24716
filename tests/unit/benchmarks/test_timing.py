"""Steps that follow each other are timed by their returns, and nothing of them is left out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kvsluice.benchmarks import timing


class Device:
    """One that takes `STEP_S` for every step, beside a host that takes `HOST_S` to launch one; both are simulated."""

    STEP_S, HOST_S = 1.0, 0.25

    def __init__(self, lookahead: bool) -> None:
        self.lookahead = lookahead
        self.now_s = self.done_s = 0.0

    def wait(self, until_s: float) -> None:
        self.now_s = max(self.now_s, until_s)

    def step(self) -> None:
        before_s = self.done_s
        self.now_s += self.HOST_S
        self.done_s = max(self.now_s, self.done_s) + self.STEP_S
        self.wait(before_s if self.lookahead else self.done_s)


@pytest.mark.parametrize(("lookahead", "each_s"), [(False, 1.25), (True, 1.0)])
def test_samples_of_steps_add_up_to_all_the_time_they_took(monkeypatch, lookahead, each_s):
    device = Device(lookahead)
    monkeypatch.setattr(timing, "synchronize", lambda _: device.wait(device.done_s))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: device.now_s))
    for _ in range(3):
        device.step()
    device.wait(device.done_s)
    began_s = device.now_s
    samples_s = timing.time_steps(torch.device("cpu"), device.step, 5)
    assert samples_s == pytest.approx([1.25, *[each_s] * 4]), "the first one's launch finds the device at rest"
    assert sum(samples_s) == pytest.approx(device.done_s - began_s)
