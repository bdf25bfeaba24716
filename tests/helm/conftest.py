"""The chart as Helm's own engine renders it, and what its objects say to each other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_python.chart import Chart

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "kvsluice"
EXAMPLES = {path.stem: path for path in sorted((CHART / "examples").glob("*.yaml"))}
RELEASE, NAMESPACE = "test", "serving"

Object = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod as it will run, with the labels that KubeRay adds to those of Ray.

    Attributes:
        owner: kind and name of the object that holds its template.
    """

    owner: str
    labels: Mapping[str, str]
    spec: Mapping[str, Any]

    @property
    def role(self) -> str:
        return self.labels["app.kubernetes.io/component"]

    def containers(self) -> Iterator[Mapping[str, Any]]:
        yield from self.spec.get("initContainers", ())
        yield from self.spec["containers"]


@dataclass(frozen=True)
class Render:
    """All objects of one rendering."""

    objects: tuple[Object, ...]
    notes: str

    def of(self, kind: str) -> list[Object]:
        return [one for one in self.objects if one["kind"] == kind]

    def one(self, kind: str, suffix: str = "") -> Object:
        (found,) = [one for one in self.of(kind) if one["metadata"]["name"].endswith(suffix)]
        return found

    @property
    def cluster_yaml(self) -> str:
        """What `kvsluice up` reads."""
        text: str = self.one("ConfigMap", "-cluster")["data"]["cluster.yaml"]
        return text

    @property
    def cluster(self) -> dict[str, Any]:
        return yaml.safe_load(self.cluster_yaml)  # type: ignore[no-any-return]

    def pods(self) -> list[Pod]:
        """Every pod that the objects lead to, once for each template."""
        found = []
        for one in self.objects:
            owner, spec = f"{one['kind']} {one['metadata']['name']}", one.get("spec", {})
            if one["kind"] in ("Job", "StatefulSet"):
                found.append(Pod(owner, spec["template"]["metadata"]["labels"], spec["template"]["spec"]))
            elif one["kind"] == "Pod":
                found.append(Pod(owner, one["metadata"]["labels"], spec))
            elif one["kind"] == "RayCluster":
                found += _ray_pods(owner, one)
        return found

    def pod(self, role: str) -> Pod:
        (found,) = [pod for pod in self.pods() if pod.role == role]
        return found


def _ray_pods(owner: str, cluster: Object) -> Iterator[Pod]:
    head, groups = cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"]
    for name, kind, group in [("headgroup", "head", head), *((g["groupName"], "worker", g) for g in groups)]:
        template = group["template"]
        added = {"ray.io/cluster": cluster["metadata"]["name"], "ray.io/node-type": kind, "ray.io/group": name}
        yield Pod(f"{owner}, {name}", template["metadata"]["labels"] | added, template["spec"])


@cache
def chart() -> Chart:
    return Chart.load(CHART)


def render(values: Mapping[str, Any] | None = None) -> Render:
    """The chart with these values. Raises what Helm's engine raises."""
    objects, notes = [], ""
    for path, text in chart().render(values=dict(values or {}), name=RELEASE, namespace=NAMESPACE).items():
        if path.endswith("NOTES.txt"):
            notes = text
        else:
            objects += [one for one in yaml.safe_load_all(text) if one]
    return Render(tuple(objects), notes)


@cache
def _example(name: str) -> Render:
    return render(None if name == "default" else yaml.safe_load(EXAMPLES[name].read_text()))


@pytest.fixture(params=["default", *EXAMPLES])
def example(request: pytest.FixtureRequest) -> Render:
    """The chart with its defaults, and with each example's values."""
    return _example(request.param)


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector takes an object with such labels; an empty one takes all."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for one in selector.get("matchExpressions", ()):
        assert one["operator"] == "In", "the chart needs no other operator"
        if labels.get(one["key"]) not in one["values"]:
            return False
    return True


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Values over values, as Helm lays them."""
    out: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
            out[key] = merged(out[key], value) if both else value
    return json.loads(json.dumps(out))  # type: ignore[no-any-return]
