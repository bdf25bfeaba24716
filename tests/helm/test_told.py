"""What the chart tells the processes is what they take: the fleet's file, commands with their options, ports."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from kvsluice.services.config import ServeConfig
from kvsluice.services.fleet.wanted import read_cluster, wanted_fleet
from kvsluice.tests.command_line import refusal

from .conftest import ROOT, Pod, Render, render, selects

RAYLET = 6380  # of Ray itself, on every node


def test_the_fleet_takes_its_file(example: Render, tmp_path):
    """`kvsluice up` reads it with every key known and every value allowed."""
    path = tmp_path / "cluster.yaml"
    path.write_text(example.cluster_yaml)
    wanted = wanted_fleet(read_cluster(path))
    ray = example.one("RayCluster")["spec"]
    pods = {group["groupName"]: group for group in ray["workerGroupSpecs"]}
    assert {group.name for group in wanted.groups} == set(pods)
    for group in wanted.groups:
        pod = pods[group.name]
        assert (pod["minReplicas"], pod["maxReplicas"]) == (group.minimum, group.maximum)
        # each pod has what one process takes, and no second one
        assert group.bundle[f"kvsluice-{group.name}"] == 1
        assert group.bundle["CPU"] == int(pod["rayStartParams"]["num-cpus"])
        gpus = int(pod["rayStartParams"]["num-gpus"])
        (container,) = pod["template"]["spec"]["containers"]
        assert group.bundle.get("GPU", 0) == gpus == container["resources"]["limits"].get("nvidia.com/gpu", 0)
        assert ("cuda" in group.config_json) == bool(gpus)
        # a worker more than there are pods would wait for ever
        assert group.max_surge == 0 or ray["enableInTreeAutoscaling"]


def test_a_model_is_cut_over_the_gpus_of_a_pod(tmp_path):
    """Of each role as many as its settings say; a group's own come before those of all."""
    groups = {
        "prefill": {"gpus": 4, "settings": {"prefill_tensor_parallel_size": 4}},
        "decode": {"gpus": 2},
    }
    rendered = render({"settings": {"tensor_parallel_size": 2}, "groups": groups})
    path = tmp_path / "cluster.yaml"
    path.write_text(rendered.cluster_yaml)
    wanted = {group.name: group.bundle.get("GPU", 0) for group in wanted_fleet(read_cluster(path)).groups}
    assert wanted == {"prefill": 4, "decode": 2, "gateway": 0}
    pods = {one["groupName"]: one["template"]["spec"] for one in rendered.one("RayCluster")["spec"]["workerGroupSpecs"]}
    for name, gpus in (("prefill", 4), ("decode", 2)):
        assert pods[name]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == gpus


def test_commands_are_those_of_the_command_line(example: Render):
    """Whatever a pod runs of ours exists, with these options."""
    ours = [command for pod in example.pods() for command in commands(pod) if command[0] == "kvsluice"]
    assert {command[1] for command in ours} == {"up", "drain", "models", "generate"}
    assert [refusal(command[1:]) for command in ours if refusal(command[1:])] == []


def commands(pod: Pod) -> Iterator[list[str]]:
    for container in pod.containers():
        if "command" in container:
            yield [*container["command"], *container.get("args", ())]
        stop = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
        if stop:
            assert stop[:2] == ["sh", "-c"] and stop[2].startswith("exec ")
            yield shlex.split(stop[2])[1:]


def test_ports_are_those_of_the_settings(example: Render):
    common = example.cluster["settings"]
    for group in (*example.cluster["gateways"], *example.cluster["groups"]):
        config = ServeConfig.model_validate(common | group["settings"])
        wanted: dict[str, int | None] = {"worker": config.worker_port}
        if example.of("PodMonitor"):
            wanted["worker-metrics"] = config.worker_metrics_port
        if group["name"] == "gateway":
            wanted = {"grpc": config.port, "http": config.http_port}
        (pod,) = [pod for pod in example.pods() if pod.labels.get("kvsluice/group") == group["name"]]
        assert wanted.items() <= ports(pod).items()
    start = example.one("RayCluster")["spec"]["headGroupSpec"]["rayStartParams"]
    head = ports(example.pod("head"))
    assert (head["gcs-server"], head["client"]) == (int(start["port"]), int(start["ray-client-server-port"]))
    assert head["metrics"] == int(start["metrics-export-port"])
    assert int(start["node-manager-port"]) == RAYLET
    name = example.one("RayCluster")["metadata"]["name"]
    # the Service that KubeRay makes for the head
    assert f"ray://{name}-head-svc:{head['client']}" in example.pod("up").spec["containers"][0]["args"]


def test_probes_and_services_lead_to_ports_that_are_there(example: Render):
    routes = (ROOT / "services" / "gateway" / "http" / "app.py").read_text()
    for pod in example.pods():
        own = ports(pod)
        for container in pod.containers():
            for when in ("startupProbe", "livenessProbe", "readinessProbe"):
                for kind in ("grpc", "tcpSocket", "httpGet"):
                    probe = container.get(when, {}).get(kind)
                    assert probe is None or probe["port"] in {*own, *own.values(), RAYLET}
                    # the kubelet's gRPC probes speak no TLS
                    assert probe is None or kind != "httpGet" or f'add("{probe["path"]}"' in routes
                    is_door = probe is not None and kind == "grpc" and probe["port"] == own.get("grpc")
                    assert not is_door or "tls_cert_file" not in example.cluster["settings"]
    for service in example.of("Service"):
        (pod,) = [pod for pod in example.pods() if selects({"matchLabels": service["spec"]["selector"]}, pod.labels)]
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= set(ports(pod))


def ports(pod: Pod) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for one in pod.containers() for port in one.get("ports", ())}
