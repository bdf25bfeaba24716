"""A fixed port of workers is for machines, or pods, that have one each."""

from __future__ import annotations

import pytest

from kvsluice.errors import ConfigError
from kvsluice.services.config import ServeConfig
from kvsluice.services.fleet.wanted import cluster_of, parse_cluster, wanted_fleet


@pytest.mark.parametrize("given", [{}, {"role": "both", "decode_workers": 2}])
def test_workers_of_one_machine_cannot_share_it(given):
    with pytest.raises(ConfigError, match=r"worker_port: several workers cannot share 8034 .* allowed: 0"):
        cluster_of(ServeConfig(worker_port=8034, **given), 0.0)


def test_one_worker_may_have_it_as_may_each_of_a_cluster():
    assert len(cluster_of(ServeConfig(worker_port=8034, role="both"), 0.0).groups) == 1
    roles = ({"name": role, "role": role, "replicas": 2} for role in ("prefill", "decode"))
    fleet = wanted_fleet(parse_cluster({"settings": {"worker_port": 8034}, "groups": list(roles)}))
    assert all('"worker_port":8034' in group.config_json for group in fleet.groups)
