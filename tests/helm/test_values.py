"""Values that make no sense are refused, by a message that names the key."""

from __future__ import annotations

import re

import pytest
from helm_python.errors import HelmError

from .conftest import render

GROUP = {"role": "decode", "replicas": 1, "cpus": 1, "resources": {}}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"colour": "red"}, "colour"),
        ({"gateway": {"replica": 2}}, "replica"),
        ({"gateway": {"replicas": 0}}, "gateway.replicas"),
        ({"gateway": {"replicas": "two"}}, "gateway.replicas"),
        ({"groups": {"decode": {"role": "decoder"}}}, "groups.decode.role"),
        ({"groups": {"decode": {"gpus": 17}}}, "groups.decode.gpus"),
        ({"groups": {"Decode_2": GROUP}}, "groups"),
        ({"groups": {"more": {"role": "decode"}}}, "groups.more"),
        ({"groups": {"decode": {"resources": {"limits": {"memory": "lots"}}}}}, "decode.resources.limits.memory"),
        ({"image": {"repository": "kvsluice:1"}, "shmSize": "big"}, "shmSize"),
        ({"image": {"pullPolicy": "Sometimes"}}, "image.pullPolicy"),
        ({"service": {"grpcPort": 80}}, "service.grpcPort"),
        ({"service": {"type": "Ingress"}}, "service.type"),
        ({"redis": {"maxMemory": "8GiB"}}, "redis.maxMemory"),
        ({"redis": {"enabled": False, "external": {"url": "redis://user:secret@host"}}}, "redis.external.url"),
        ({"redis": {"enabled": False, "external": {"url": "http://host"}}}, "redis.external.url"),
        ({"networkPolicy": {"clients": []}}, "networkPolicy.clients"),
        ({"networkPolicy": {"apiServerCIDR": "everywhere"}}, "networkPolicy.apiServerCIDR"),
        ({"podSecurityContext": {"runAsNonRoot": False}}, "podSecurityContext.runAsNonRoot"),
        ({"podSecurityContext": {"runAsUser": 0}}, "podSecurityContext.runAsUser"),
        ({"settings": {"max-model-len": 1}}, "settings"),
        ({"settings": {"model": ["a"]}}, "settings.model"),
        ({"modelCache": {"accessModes": ["Shared"]}}, "modelCache.accessModes"),
        ({"autoscaling": {"idleTimeoutSeconds": 0}}, "autoscaling.idleTimeoutSeconds"),
        ({"groups": {"decode": {"scaling": {"target_token_usage": 2}}}}, "target_token_usage"),
        # what no schema says, or not readably
        ({"auth": {"generate": False}}, "auth: nobody could call; allowed:"),
        ({"auth": {"existingSecret": "keys", "allowAnonymous": True}}, "auth.allowAnonymous: .* allowed: one of them"),
        ({"tls": {"clientCA": True}}, "tls.clientCA: connections are plaintext; allowed: with tls.existingSecret"),
        ({"redis": {"external": {"url": "redis://other:6379"}}}, "redis.external.url: .* allowed: one of them"),
        ({"groups": {"prefill": None}}, "groups: none has the role prefill; allowed:"),
        ({"groups": {"gateway": GROUP}}, "groups.gateway: is taken"),
        ({"groups": {"decode": {"gpus": 2}}}, "groups.decode.gpus: got 2 for a worker of 1 ranks; allowed: 1, or"),
        ({"groups": {"decode": {"gpus": 1, "settings": {"tensor_parallel_size": 2}}}}, "decode.gpus: got 1 .* of 2"),
        ({"groups": {"decode": {"minReplicas": 3, "maxReplicas": 2}}}, "groups.decode.minReplicas: is above"),
        ({"settings": {"port": 1}}, "settings.port: is set by the chart itself"),
        ({"settings": {"store_password_file": "/x"}}, "settings.store_password_file: is set by the chart itself"),
        ({"gateway": {"settings": {"host": "0.0.0.0"}}}, "gateway.settings.host: is set by the chart itself"),
        ({"groups": {"decode": {"settings": {"device": "cpu"}}}}, "groups.decode.settings.device: is set by the chart"),
        ({"autoscaling": {"hooks": {"keda": {"enabled": True}}}}, "hooks.keda.scaleTargetRef.name: missing; allowed:"),
        ({"autoscaling": {"hooks": {"hpa": {"enabled": True}}}}, "hooks.hpa.scaleTargetRef.name: missing; allowed:"),
        ({"modelCache": {"download": {"repo": "a/b"}}}, "modelCache.download.repo: there is no place for it; allowed:"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(values, said):
    with pytest.raises(HelmError) as refused:
        render(values)
    # the schema's messages lead to a key with slashes
    assert re.search(said, str(refused.value).replace("/", ".")), str(refused.value)
