"""What one object says of another is so: Secrets, files, selectors; and who sees and may do what."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from pathlib import PurePosixPath

import pytest
import yaml
from helm_python.chart import Chart

from kvsluice.services.keys import parse_keys

from .conftest import CHART, EXAMPLES, Render, chart, render, selects

# Secrets and claims that an operator makes beforehand, by example
EXTERNAL = {
    "one-gpu": {"hf-token"},
    "1p1d": set(),
    "4p8d-mixed": {
        "kvsluice-api-keys", "kvsluice-tls", "kvsluice-fleet-token", "kvsluice-fleet-tls", "redis-password", "redis-ca",
        "ray-redis", "models", "registry",
    },
    "air-gapped": {
        "kvsluice-ray", "kvsluice-api-keys", "kvsluice-tls", "kvsluice-fleet-token", "kvsluice-fleet-tls",
        "kvsluice-store", "kvsluice-redis-tls", "models", "registry",
    },
}  # fmt: skip
READS = {  # role -> folders below /etc/kvsluice that it may see
    "head": {"ray"},
    "prefill": {"ray", "fleet", "fleet-tls"},
    "decode": {"ray", "fleet", "fleet-tls", "store", "store-ca"},
    "both": {"ray", "fleet", "fleet-tls", "store", "store-ca"},
    "gateway": {"ray", "fleet", "fleet-tls", "store", "store-ca", "keys", "tls"},
    "up": {"ray", "fleet", "fleet-tls", "store", "store-ca", "keys", "tls", "cluster"},
    "test": {"keys", "tls"},
    "redis": set(),
}


@pytest.mark.parametrize("name", ["default", *EXAMPLES])
def test_secrets_and_claims_exist_or_are_the_operators(name):
    example = render(None if name == "default" else yaml.safe_load(EXAMPLES[name].read_text()))
    made = {one["metadata"]["name"]: set(one["stringData"]) for one in example.of("Secret")}
    configs = {one["metadata"]["name"] for one in example.of("ConfigMap")}
    claims = {one["metadata"]["name"] for one in example.of("PersistentVolumeClaim")}
    outside, used = EXTERNAL.get(name, set()), set()
    for pod in example.pods():
        for volume in pod.spec.get("volumes", ()):
            if "secret" in volume:
                secret = volume["secret"]
                used.add(secret["secretName"])
                if secret["secretName"] not in outside:
                    assert {item["key"] for item in secret["items"]} <= made[secret["secretName"]]
            if "configMap" in volume:
                assert volume["configMap"]["name"] in configs
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                used.add(claim)
                assert claim in claims | outside
        used |= {one["name"] for one in pod.spec.get("imagePullSecrets", ())}
        for container in pod.containers():
            for env in container.get("env", ()):
                reference = env.get("valueFrom", {}).get("secretKeyRef")
                used |= {reference["name"]} if reference else set()
            mounts = {mount["name"] for mount in container.get("volumeMounts", ())}
            assert mounts <= {volume["name"] for volume in pod.spec["volumes"]}
    credentials = example.one("RayCluster")["spec"].get("gcsFaultToleranceOptions", {}).get("redisPassword")
    used |= {credentials["valueFrom"]["secretKeyRef"]["name"]} if credentials else set()
    for monitor in (*example.of("ServiceMonitor"), *example.of("PodMonitor")):
        endpoint = monitor["spec"].get("endpoints", monitor["spec"].get("podMetricsEndpoints"))[-1]
        credentials = endpoint["authorization"]["credentials"]
        assert credentials["name"] in outside or credentials["key"] in made[credentials["name"]]
    assert outside <= used, "an example names a Secret that nothing reads"
    assert used <= outside | set(made) | claims


def test_files_that_settings_name_lie_where_they_are_read(example: Render):
    """And nobody else sees them: each role gets what it reads."""
    files = {key: PurePosixPath(value) for key, value in example.cluster["settings"].items() if key.endswith("_file")}
    files |= {
        key: PurePosixPath(value)
        for group in (*example.cluster["gateways"], *example.cluster["groups"])
        for key, value in group["settings"].items()
        if key.endswith("_file")
    }
    counted = {"keys"} if example.of("PodMonitor") else set()
    for pod in example.pods():
        reads = READS[pod.role] | (counted if pod.role in ("prefill", "decode", "both") else set())
        lies = set()
        for container in pod.containers():
            volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", ())}
            for mount in container.get("volumeMounts", ()):
                path = PurePosixPath(mount["mountPath"])
                if path.is_relative_to("/etc/kvsluice"):
                    assert mount["readOnly"]
                    assert path.name in reads, f"{pod.role} sees {path}"
                    items = volumes[mount["name"]].get("secret", {}).get("items", ())
                    lies |= {path / item["path"] for item in items}
        for key, path in files.items():
            if path.parent.name in reads and pod.role != "test":
                assert path in lies, f"{pod.role} lacks {key}"


def test_no_secret_is_an_argument_or_a_variable(example: Render):
    secrets = [value for one in example.of("Secret") for value in one["stringData"].values()]
    told = repr([one for one in example.objects if one["kind"] != "Secret"])
    assert not [value for value in secrets if value in told]
    for pod in example.pods():
        for container in pod.containers():
            for env in container.get("env", ()):
                assert "value" not in env or not re.search("TOKEN$|PASSWORD|KEY", env["name"])
    # values are asked for by the name of a Secret only, so none can stand in a file of values
    assert not [key for key in _keys(chart().values) if re.search("password|token$|apiKey", key)]


def _keys(values):
    for key, value in values.items():
        yield key
        if isinstance(value, dict):
            yield from _keys(value)


def test_pods_are_confined(example: Render):
    for pod in example.pods():
        token = pod.spec["automountServiceAccountToken"]
        assert token == (pod.role == "head" and "enableInTreeAutoscaling" in example.one("RayCluster")["spec"])
        assert token or pod.spec["serviceAccountName"] == example.one("ServiceAccount")["metadata"]["name"]
        assert pod.spec["securityContext"]["runAsNonRoot"] and pod.spec["securityContext"]["runAsUser"] > 0
        assert pod.spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod.containers():
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]
            written = {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")}
            assert "/tmp" in written or pod.role == "redis"
        assert not any(pod.spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))


def test_pods_of_ray_start_slowly_and_end_slowly(example: Render):
    grace_s = example.cluster["drain_s"]
    for pod in example.pods():
        if "kvsluice/ray" not in pod.labels:
            continue
        (container,) = pod.containers()
        startup = container["startupProbe"]
        assert startup["failureThreshold"] * startup["periodSeconds"] >= 1800
        # KubeRay's own probes want tools that the image lacks
        assert "livenessProbe" in container and "readinessProbe" in container
        assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}} in pod.spec["volumes"]
        if pod.role != "head":
            assert "drain" in container["lifecycle"]["preStop"]["exec"]["command"][2]
            assert pod.spec["terminationGracePeriodSeconds"] > grace_s


def test_budgets_and_monitors_select_what_they_are_for(example: Render):
    groups = {pod.labels["kvsluice/group"] for pod in example.pods() if "kvsluice/ray" in pod.labels} - {"head"}
    held = set()
    for budget in example.of("PodDisruptionBudget"):
        (pod,) = [pod for pod in example.pods() if selects(budget["spec"]["selector"], pod.labels)]
        held.add(pod.labels["kvsluice/group"])
    assert held == groups
    for monitor in example.of("PodMonitor"):
        taken = [pod for pod in example.pods() if selects(monitor["spec"]["selector"], pod.labels)]
        assert {pod.labels["kvsluice/group"] for pod in taken} == groups | {"head"}
    for monitor in example.of("ServiceMonitor"):
        selector = monitor["spec"]["selector"]
        (service,) = [s for s in example.of("Service") if selects(selector, s["metadata"]["labels"])]
        assert monitor["spec"]["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}


def test_dashboards_are_the_files_as_they_are():
    """Grafana's own braces are left alone."""
    values = {"metrics": {"dashboards": {"enabled": True}}}
    shown = render(values).one("ConfigMap", "-dashboards")["data"] or {}
    files = {path.name: json.loads(path.read_text()) for path in (CHART / "dashboards").glob("*.json")}
    assert {name: json.loads(text) for name, text in shown.items()} == files


def test_generated_keys_are_a_file_of_keys():
    secret = render().one("Secret", "-keys")["stringData"]
    keys = parse_keys(secret["keys.yaml"], True, "keys.yaml")
    for name, tenant in (("client-key", "default"), ("monitor-key", "monitor")):
        caller = keys.callers[hashlib.sha256(secret[name].encode()).digest()]
        assert caller.tenant == tenant
    assert len(render().one("Secret", "-ray")["stringData"]["auth_token"]) == 64


def test_an_upgrade_keeps_what_was_edited_in_the_charts_own_secrets(tmp_path):
    """As docs/operations.md has keys and tokens changed: nothing that was taken away comes back."""
    edited = {
        "client-key": "ks-client: of # odd characters",
        "keys.yaml": f"keys:\n  - {{tenant: alice, sha256: {64 * 'a'}}}\n",
        "fleet_token": 64 * "n" + "\n" + 64 * "o" + "\n",
    }
    data = " ".join(f'"{key}" "{base64.b64encode(text.encode()).decode()}"' for key, text in edited.items())
    shutil.copytree(CHART, tmp_path / "chart")
    template = tmp_path / "chart" / "templates" / "secrets.yaml"
    text, count = re.subn(r'lookup "v1" "Secret" [^)]*\([^)]*\)', f'dict "data" (dict {data})', template.read_text())
    assert count == 2, "the engine of the tests has no cluster to look at"
    template.write_text(text)
    found = {}
    for path, rendered in Chart.load(tmp_path / "chart").render(values={}, name="r", namespace="n").items():
        if path.endswith("secrets.yaml"):
            for one in yaml.safe_load_all(rendered):
                found |= (one or {}).get("stringData", {})
    assert {key: found[key] for key in edited} == edited
    assert len(found["auth_token"]) == 64
