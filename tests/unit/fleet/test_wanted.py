"""The file of a fleet: what it may hold, what it means for each process, and what an upgrade touches."""

from __future__ import annotations

import json

import pytest
import yaml

from kvsluice.errors import ConfigError
from kvsluice.services.config import ServeConfig, load_config
from kvsluice.services.fleet.wanted import cluster_of, read_cluster, wanted_fleet

FLEET = """
settings: {model: tiny, store_url: "redis://store:6379"}
gateways:
  - {name: gateway, replicas: 2, settings: {port: 8033}}
groups:
  - name: prefill
    role: prefill
    replicas: {min: 1, max: 4}
    resources: {num_cpus: 6, num_gpus: 1, accelerator_type: H100, custom: {fast-net: 1}}
    settings: {chunk-tokens: 1024}
  - {name: decode, role: decode, replicas: 2, resources: {num_cpus: 2}, settings: {max_num_seqs: 16}}
"""


@pytest.fixture
def read(tmp_path):
    def go(text):
        path = tmp_path / "cluster.yaml"
        path.write_text(text)
        return wanted_fleet(read_cluster(path))

    return go


def changed(text, edit):
    raw = yaml.safe_load(text)
    edit(raw)
    return yaml.safe_dump(raw)


def config(group):
    return ServeConfig.from_json(group.config_json)


def test_each_group_has_its_own_settings_over_the_common_ones(read):
    fleet = read(FLEET)
    prefill, decode, gateway = fleet.groups
    assert (config(prefill).chunk_tokens, config(prefill).torch_threads) == (1024, 6)
    assert (config(decode).max_num_seqs, config(decode).torch_threads) == (16, 2)
    assert {config(group).store_url for group in fleet.groups} == {"redis://store:6379"}
    assert prefill.bundle == {"CPU": 6, "GPU": 1, "accelerator_type:H100": 0.001, "fast-net": 1}
    assert (prefill.minimum, prefill.maximum, decode.minimum, decode.maximum) == (1, 4, 2, 2)
    assert prefill.scaling is not None and decode.scaling is None
    assert gateway.own_host and (gateway.max_surge, gateway.max_unavailable) == (0, 1)


def versions(fleet):
    return {group.name: group.version for group in fleet.groups}


@pytest.mark.parametrize(
    ("edit", "touched"),
    [
        (lambda raw: raw["groups"][1]["settings"].update(max_num_seqs=8), {"decode"}),
        (lambda raw: raw["groups"][0]["resources"].update(num_gpus=2), {"prefill"}),
        (lambda raw: raw["gateways"][0]["settings"].update(port=9000), {"gateway"}),
        (lambda raw: raw["settings"].update(http_port=9000, allow_anonymous=True), {"gateway"}),
        (lambda raw: raw["settings"].update(model="other"), {"prefill", "decode", "gateway"}),
        (lambda raw: raw["settings"].update(kv_cache_bytes=2**30 * 2), {"prefill", "decode"}),
        (lambda raw: raw["groups"][1].update(replicas=5), set()),
        (lambda raw: raw.update(drain_s=5), set()),
    ],
)
def test_an_upgrade_touches_those_whom_the_change_concerns(read, edit, touched):
    before, after = versions(read(FLEET)), versions(read(changed(FLEET, edit)))
    assert {name for name in before if before[name] != after[name]} == touched


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda raw: raw.update(group=[]), r"^group: unknown key; known: .*groups"),
        (lambda raw: raw["groups"][0].update(gpus=1), r"^groups.0.gpus: unknown key; known: .*resources"),
        (lambda raw: raw["groups"][0]["resources"].update(gpu=1), r"^groups.0.resources.gpu: unknown.*num_gpus"),
        (lambda raw: raw["groups"][0].update(role="both-ish"), r"^groups.0.role: .*'prefill', 'decode' or 'both'"),
        (lambda raw: raw["groups"][0].update(replicas=-1), r"^groups.0.replicas"),
        (lambda raw: raw["groups"][0].update(replicas={"min": 4, "max": 2}), r"min: got 4; allowed: 1 to max, 2"),
        (lambda raw: raw["groups"][0].update(name="Prefill_1"), r"^groups.0.name"),
        (lambda raw: raw["groups"][1].update(name="prefill"), r"prefill is the name of two groups"),
        (lambda raw: raw["groups"][0].update(max_surge=0), r"^groups.0: max_surge, max_unavailable: both are 0"),
        (lambda raw: raw["groups"][1]["resources"].update(num_cpus=0), r"^groups.1.resources: num_cpus: all .* are 0"),
        (lambda raw: raw["settings"].update(max_seqs=1), r"settings.max_seqs: unknown key; known: .*max_num_seqs"),
        (lambda raw: raw["groups"][1]["settings"].update(max_num_seqs=0), r"groups\[decode\].settings.max_num_seqs"),
        (lambda raw: raw["settings"].update(decode_workers=3), r"settings.decode_workers: is not set here.*replicas"),
        (lambda raw: raw["settings"].update(fleet_tokens=["x"]), r"settings.fleet_tokens: is not set here"),
        (lambda raw: raw["settings"].update(model="./model"), r"model: ./model is a relative path"),
        (lambda raw: raw["settings"].update(profile="own.json"), r"profile: own.json is a relative path"),
        (lambda raw: raw["groups"].pop(1), r"none of role decode serves tiny"),
        (lambda raw: raw["groups"][0].update(model="other"), r"none serves other, the model of group prefill"),
        (lambda raw: raw["settings"].update(durability="tokens", store_url=None), r"durability: tokens needs a store"),
        (lambda raw: raw.update(lease_s=0.1), r"^lease_s"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_started(read, edit, said):
    with pytest.raises(ConfigError, match=said):
        read(changed(FLEET, edit))


@pytest.mark.parametrize("text", ["[]", "groups: [", "7"])
def test_what_is_no_file_of_a_fleet(read, text):
    with pytest.raises(ConfigError, match="is not a YAML"):
        read(text)


def test_several_models_have_gateways_of_their_own(read):
    fleet = read(
        """
        gateways: [{name: small-gateway, model: small}, {name: big-gateway, model: big}]
        groups:
          - {name: small, role: both, model: small}
          - {name: big-prefill, role: prefill, model: big}
          - {name: big-decode, role: decode, model: big}
        """
    )
    assert {group.name: group.model for group in fleet.groups if group.role == "gateway"} == {
        "small-gateway": "small",
        "big-gateway": "big",
    }
    assert config(fleet.group("small-gateway")).role == "both"
    assert config(fleet.group("big-gateway")).role == "split"


def test_one_machine_is_a_fleet_of_the_same_kind():
    served = load_config({"model": "tiny", "prefill_workers": 2, "decode_workers": 3, "seed": 7})
    fleet = wanted_fleet(cluster_of(served, 0.5))
    assert {group.name: (group.role, group.minimum) for group in fleet.groups} == {
        "prefill": ("prefill", 2),
        "decode": ("decode", 3),
        "gateway": ("gateway", 1),
    }
    assert fleet.groups[0].bundle == {"CPU": 1, "GPU": 0.5}
    told = json.loads(served.to_json())
    for group in fleet.groups:
        assert json.loads(group.config_json) == told
        assert not group.own_host
