"""Who reaches whom under the NetworkPolicies: the connections that there are, and no others."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest

from .conftest import NAMESPACE, Render, render, selects

GRPC, HTTP, WORKER = 8033, 8000, 8034
GCS, CLIENT, NODE, OBJECTS, ACTORS = 6379, 10001, 6380, 6381, 10500
WORKER_METRICS, METRICS, DASHBOARD, AGENT, REDIS, HTTPS, DNS = 8035, 8080, 8265, 52365, 6379, 443, 53
PORTS = (
    GRPC,
    HTTP,
    WORKER,
    GCS,
    CLIENT,
    NODE,
    OBJECTS,
    ACTORS,
    METRICS,
    WORKER_METRICS,
    DASHBOARD,
    AGENT,
    HTTPS,
    22,
    6443,
)
RAY = ("head", "gateway", "prefill", "decode", "both")

Edge = tuple[str, str, int]


@dataclass(frozen=True)
class Peer:
    """Somebody in or outside the cluster."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    namespace: Mapping[str, str] = field(default_factory=dict)
    address: str | None = None


STRANGER = Peer("stranger", {"app": "other"}, {"kubernetes.io/metadata.name": "elsewhere"})
NEIGHBOUR = Peer("neighbour", {"app": "other"}, {"kubernetes.io/metadata.name": NAMESPACE})
PROMETHEUS = Peer("prometheus", {"app": "prometheus"}, {"kubernetes.io/metadata.name": "monitoring"})
NAMES = Peer("names", {"k8s-app": "kube-dns"}, {"kubernetes.io/metadata.name": "kube-system"})
INTERNET = Peer("internet", address="203.0.113.7")
INTRANET = Peer("intranet", address="10.1.2.3")
METADATA = Peer("metadata", address="169.254.169.254")
OUTSIDE = (STRANGER, NEIGHBOUR, PROMETHEUS, NAMES, INTERNET, INTRANET, METADATA)


def takes(rule: Mapping[str, Any], side: str, peer: Peer, port: int) -> bool:
    """Whether one rule of a policy lets a peer through at a port."""
    ports = rule.get("ports")
    if ports is not None and not any(one["port"] <= port <= one.get("endPort", one["port"]) for one in ports):
        return False
    peers = rule.get(side)
    return peers is None or any(_is(one, peer) for one in peers)


def _is(one: Mapping[str, Any], peer: Peer) -> bool:
    if "ipBlock" in one:
        if peer.address is None:
            return False
        address = ipaddress.ip_address(peer.address)
        inside = address in ipaddress.ip_network(one["ipBlock"]["cidr"])
        return inside and not any(address in ipaddress.ip_network(x) for x in one["ipBlock"].get("except", ()))
    if peer.address is not None:
        return False
    if "namespaceSelector" in one:
        if not selects(one["namespaceSelector"], peer.namespace):
            return False
    elif peer.namespace.get("kubernetes.io/metadata.name") != NAMESPACE:
        return False
    return selects(one.get("podSelector", {}), peer.labels)


def allowed(policies: Iterable[Mapping[str, Any]], source: Peer, target: Peer, port: int) -> bool:
    """As Kubernetes decides: what no policy selects is open, else some rule has to say so, at both ends."""
    for own, other, kind, side in ((source, target, "Egress", "to"), (target, source, "Ingress", "from")):
        ours = own.namespace.get("kubernetes.io/metadata.name") == NAMESPACE
        holding = [p for p in policies if ours and selects(p["podSelector"], own.labels) and kind in p["policyTypes"]]
        rules = [rule for policy in holding for rule in policy.get(kind.lower(), ())]
        if holding and not any(takes(rule, side, other, port) for rule in rules):
            return False
    return True


def reached(example: Render) -> set[Edge]:
    """Every edge to or from a pod of the chart; who knocks from outside is let go there."""
    policies = [one["spec"] for one in example.of("NetworkPolicy")]
    home = {"kubernetes.io/metadata.name": NAMESPACE}
    # one pod a role is enough: policies know no groups
    pods = {pod.role: Peer(pod.role, pod.labels, home) for pod in example.pods()}
    everybody = [*pods.values(), *OUTSIDE]
    return {
        (source.name, target.name, port)
        for source, target, port in product(everybody, everybody, (*PORTS, DNS))
        if (source.name in pods or target.name in pods) and allowed(policies, source, target, port)
    }


def expected(roles: set[str], counted: bool) -> set[Edge]:
    """The connections that the processes make; workers have metrics where they are `counted`."""
    ray = roles & set(RAY)
    prefill, decode = roles & {"prefill", "both"}, roles & {"decode", "both"}
    edges = {(role, "names", DNS) for role in roles}
    edges |= {(a, b, port) for a, b, port in product(ray, ray, (NODE, OBJECTS, ACTORS))}
    edges |= {(role, "head", GCS) for role in ray} | {("up", "head", CLIENT)}
    edges |= {("gateway", role, WORKER) for role in prefill | decode}
    edges |= {(a, b, WORKER) for a, b in product(prefill, decode)}
    edges |= {("test", "gateway", port) for port in (GRPC, HTTP)}
    edges |= {("prometheus", role, METRICS) for role in ray} | {("prometheus", "gateway", HTTP)}
    if counted:
        edges |= {("prometheus", role, WORKER_METRICS) for role in prefill | decode}
    if "redis" in roles:
        edges |= {(role, "redis", REDIS) for role in {"gateway", *decode}}
    return edges


IN_CLUSTER = {
    (peer, "gateway", port) for peer in ("stranger", "neighbour", "prometheus", "names") for port in (GRPC, HTTP)
}


def test_the_edges_are_those_that_there_are_and_no_others(example: Render):
    """An example may narrow who the clients are, and open what it names."""
    roles = {pod.role for pod in example.pods()}
    edges, wanted = reached(example), expected(roles, bool(example.of("PodMonitor")))
    assert wanted <= edges
    more = edges - wanted - IN_CLUSTER
    external = example.cluster["settings"].get("store_url", "").startswith("rediss://kvsluice@redis.storage")
    if external:
        # its autoscaler, its clients, its collector; the store's own network is tested below
        assert more == {
            ("head", "internet", 443), ("head", "intranet", 443), ("head", "metadata", 443),
            ("head", "internet", 6443), ("head", "intranet", 6443), ("head", "metadata", 6443),
            ("intranet", "gateway", GRPC), ("intranet", "gateway", HTTP),
        }  # fmt: skip
    elif example.pod("up").spec.get("initContainers"):
        assert more == {("up", "internet", HTTPS)}
    else:
        assert more == set()


def test_prompts_never_pass_prefill_to_prefill_nor_back():
    edges = reached(render())
    for edge in (("prefill", "prefill", WORKER), ("decode", "prefill", WORKER), ("decode", "gateway", GRPC),
                 ("prefill", "redis", REDIS), ("stranger", "decode", WORKER), ("neighbour", "redis", REDIS),
                 ("stranger", "head", DASHBOARD), ("gateway", "head", DASHBOARD), ("neighbour", "head", GCS),
                 ("decode", "internet", HTTPS), ("gateway", "metadata", 80)):  # fmt: skip
        assert edge not in edges


@pytest.mark.parametrize(("cidr", "reachable"), [("10.1.0.0/16", True), ("10.2.0.0/16", False), ("", True)])
def test_an_external_store_is_reached_by_those_who_use_it(cidr, reachable):
    store = {"enabled": False, "external": {"url": "redis://store:7000", "port": 7000}}
    example = render({"redis": store, "networkPolicy": {"storeCIDR": cidr}})
    policies = [one["spec"] for one in example.of("NetworkPolicy")]
    home = {"kubernetes.io/metadata.name": NAMESPACE}
    for role in ("gateway", "decode", "prefill", "head"):
        peer = Peer(role, example.pod(role).labels, home)
        assert allowed(policies, peer, INTRANET, 7000) == (reachable and role in ("gateway", "decode"))


def test_without_policies_nothing_is_kept_away_and_the_notes_say_so():
    example = render({"networkPolicy": {"enabled": False}})
    assert example.of("NetworkPolicy") == []
    assert "No NetworkPolicy keeps others away" in example.notes
