"""Devices that are not there are refused by name, before anything is started."""

from __future__ import annotations

import pytest
import torch

from kvsluice.errors import ConfigError, InternalError
from kvsluice.services import cluster, one_machine
from kvsluice.services.config import ServeConfig
from kvsluice.services.device import check_device


@pytest.mark.parametrize(
    ("count", "cuda", "device", "said"),
    [
        (0, None, "cuda", "a build for CPUs; allowed: cpu$"),
        (0, "13.0", "cuda:1", "torch finds 0 GPUs here; allowed: cpu$"),
        (2, "13.0", "cuda:2", "torch finds 2 GPUs here; allowed: cpu, cuda:0 to cuda:1$"),
    ],
)
def test_a_device_that_is_not_there(monkeypatch, count, cuda, device, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(ConfigError, match=f"^device: got {device}, and .*{said}"):
        check_device(device)


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:0", "cuda:1"])
def test_a_device_that_is_there(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device(device)


def test_a_service_without_its_device_starts_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(cluster, "start_ray", lambda *args: pytest.fail("Ray was started"))
    fleet = one_machine.Fleet(ServeConfig(device="cuda"))
    with pytest.raises(ConfigError, match=r"^device: got cuda"):
        fleet.start(lambda: False, lambda: None)


def test_a_ray_that_does_not_start_is_said_in_a_line(monkeypatch, tmp_path):
    def fail(**options):
        raise TimeoutError("Timed out while waiting for the node\nand more")

    monkeypatch.setattr(cluster.ray, "init", fail)
    with pytest.raises(InternalError) as caught:
        cluster.start_ray(ServeConfig(), str(tmp_path), 2)
    assert caught.value.message == "Ray did not start here (TimeoutError: Timed out while waiting for the node)"
