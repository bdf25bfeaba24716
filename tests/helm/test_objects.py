"""Every object of every example is one that Kubernetes, KubeRay and the operators would take."""

from __future__ import annotations

import shlex

import jsonschema
import kubernetes_validate
import pytest
import yaml
from helm_python.chart import lint

from kvsluice import __version__

from .conftest import CHART, EXAMPLES, ROOT, Render, chart, render
from .crds import SPECS

OLDEST = "1.27"
MAX_NAME = 63


@pytest.mark.parametrize("name", EXAMPLES)
def test_helm_finds_nothing_to_say(name):
    report = lint(CHART, values=yaml.safe_load(EXAMPLES[name].read_text()), strict=True, namespace="serving")
    said = [one for one in report["messages"] if one["severity"] > 1]
    assert (said, report["errors"]) == ([], [])


def test_objects_are_of_their_schemas(example: Render):
    assert chart().metadata["kubeVersion"] == f">={OLDEST}.0-0"
    check(example, OLDEST)


def test_objects_are_of_their_schemas_in_the_newest_release():
    check(render(yaml.safe_load(EXAMPLES["4p8d-mixed"].read_text())), kubernetes_validate.latest_version())


def check(example: Render, version: str) -> None:
    for one in example.objects:
        spec = SPECS.get((one["apiVersion"], one["kind"]))
        if spec is None:
            kubernetes_validate.validate(one, version, strict=True)
        else:
            assert set(one) == {"apiVersion", "kind", "metadata", "spec"}
            jsonschema.validate(one["spec"], spec)
    for pod in example.pods():
        template = {"metadata": {"labels": dict(pod.labels)}, "spec": dict(pod.spec)}
        whole = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "one"}, "template": template}
        kubernetes_validate.validate(whole, version, strict=True)


def test_a_field_that_kuberay_does_not_know_would_be_found(example: Render):
    spec = example.one("RayCluster")["spec"]
    group = spec["workerGroupSpecs"][0]
    for wrong in ({**spec, "replicas": 1}, {**spec, "workerGroupSpecs": [{**group, "min": 1}]}):
        with pytest.raises(jsonschema.ValidationError, match="Additional properties"):
            jsonschema.validate(wrong, SPECS["ray.io/v1", "RayCluster"])


def test_names_fit_and_are_distinct(example: Render):
    names = [(one["kind"], one["metadata"]["name"]) for one in example.objects]
    assert len(set(names)) == len(names)
    long = render({"fullnameOverride": "x" * 60, "redis": {"enabled": True}})
    # KubeRay appends to the cluster's name, and a StatefulSet's pods a number
    assert max(len(one["metadata"]["name"]) for one in long.objects) <= MAX_NAME - len("-0")


def test_ray_starts_with_flags_that_it_has(example: Render):
    """KubeRay turns rayStartParams into flags of `ray start`, which ends where it does not know one."""
    from ray.scripts.scripts import start

    known = {option.lstrip("-") for parameter in start.params for option in parameter.opts}
    spec = example.one("RayCluster")["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert set(group["rayStartParams"]) <= known
        for value in group["rayStartParams"].values():
            # as a shell will see it
            assert len(shlex.split(value)) == 1
    for group in spec["workerGroupSpecs"]:
        (resources,) = shlex.split(group["rayStartParams"]["resources"])
        assert yaml.safe_load(resources) == {f"kvsluice-{group['groupName']}": 1}


def test_versions_are_those_of_the_project():
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"ray=={chart().values['ray']['version']}" in pins
    assert chart().metadata["appVersion"] == __version__


def test_every_value_has_a_default_and_a_line_in_the_schema():
    """A key that only one of them knows could not be used, or not be found."""
    schema = chart().schema

    def missing(node, values, path):
        if "$ref" in node:
            node = schema["definitions"][node["$ref"].rpartition("/")[2]]
        for key, below in node.get("properties", {}).items():
            if key not in values and not path.startswith(("groups.", "head", "gateway", "up", "redis")):
                yield f"{path}{key}"
            elif isinstance(values.get(key), dict):
                yield from missing(below, values[key], f"{path}{key}.")

    optional = {"global", "podSecurityContext.supplementalGroups"}
    assert set(missing(schema, chart().values, "")) <= optional
    chart().validate_schema()


def test_notes_name_what_there_is(example: Render):
    names = {one["metadata"]["name"] for one in example.objects}
    assert f"job/{example.one('Job')['metadata']['name']}" in example.notes
    words = {word.strip(".:,") for word in example.notes.split()}
    named = {word.partition("/")[2] for word in words if word.startswith(("job/", "service/"))}
    assert named <= names
