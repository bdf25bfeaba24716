"""The wanted state of a fleet: each group with the settings of its processes, worked out and checked."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from ...errors import ConfigError
from ..config import ServeConfig
from ..settings.base import Settings
from ..settings.cluster import (
    ClusterConfig,
    GatewayGroup,
    Group,
    ReplicaRange,
    Resources,
    ScalingTargets,
    WorkerGroup,
)
from ..settings.http import HttpSettings

_BRANCHES = ("constrained-int", "ReplicaRange")  # pydantic's names for the two
LEASES, LEAST_LEASE_S = 3, 30.0  # gateways go on elsewhere after one; a worker is given up by the controller later

GroupRole = Literal["prefill", "decode", "both", "gateway"]

# the fleet's own business: a group says it in other words
NOT_IN_SETTINGS = {
    "role": "the groups' role",
    "prefill_workers": "the groups' replicas",
    "decode_workers": "the groups' replicas",
    "object_store_bytes": "the flags of `ray start`",
    "dashboard": "the flags of `ray start`",
    "fleet_tokens": "fleet_token_file",
}
# a change of these does not concern such processes, and does not replace them
_ENGINE_ONLY = {
    "dtype", "device", "profile", "random_weights", "max_num_seqs", "kv_cache_bytes", "kv_offloading_bytes",
    "kv_time_slice_steps", "chunk_tokens", "prefix_cache_bytes", "torch_threads",
}  # fmt: skip
_GATEWAY_ONLY = {
    "host", "port", "api_keys_file", "allow_anonymous", "tls_cert_file", "tls_key_file", "tls_client_ca_file",
    *HttpSettings.model_fields,
}  # fmt: skip
_EVERYBODY = {"prefill_workers", "decode_workers", "fleet_tokens"}


@dataclass(frozen=True)
class WantedGroup:
    """One group.

    Attributes:
        config_json: of each of its processes, a serialized `ServeConfig`.
        bundle: what each takes of a node.
        minimum, maximum: of processes; where they differ, `scaling` says how many there are.
        own_host: listen on the node's own address, whatever it is.
        version: of all that a process cannot change while it runs.
    """

    name: str
    role: GroupRole
    model: str
    config_json: str
    bundle: Mapping[str, float]
    minimum: int
    maximum: int
    max_surge: int
    max_unavailable: int
    own_host: bool
    version: str
    max_num_seqs: int
    start_timeout_s: float
    scaling: ScalingTargets | None = None


@dataclass(frozen=True)
class WantedFleet:
    """All groups, gateways last: they are of use once there are workers."""

    name: str
    groups: tuple[WantedGroup, ...]
    drain_s: float
    lease_s: float
    env: Mapping[str, str]

    def group(self, name: str) -> WantedGroup | None:
        return next((group for group in self.groups if group.name == name), None)


def read_cluster(path: Path) -> ClusterConfig:
    """Read and check a cluster's file.

    Raises:
        ConfigError: names the key, where it stands, and what is allowed.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"config: cannot read {path}: {exc.strerror}") from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise ConfigError(f"config: {path} is not a YAML file") from exc
    if not isinstance(raw, dict):
        raise ConfigError(f"config: {path} is not a YAML mapping with `groups`, as docs/cluster.md shows")
    cluster = parse_cluster(raw)
    for where, settings in [("settings", cluster.settings), *((_place(g), g.settings) for g in _all(cluster))]:
        for key in settings:
            if key in NOT_IN_SETTINGS:
                raise ConfigError(f"{where}.{key}: is not set here; allowed: {NOT_IN_SETTINGS[key]}")
    return cluster


def parse_cluster(raw: Any) -> ClusterConfig:
    """A checked cluster of plain data or of JSON text. Raises `ConfigError`."""
    try:
        return ClusterConfig.model_validate_json(raw) if isinstance(raw, str) else ClusterConfig.model_validate(raw)
    except ValidationError as exc:
        # of a number or a range, the one that it is not is no news
        first = next(e for e in exc.errors() if not (e["type"] == "int_type" and isinstance(e["input"], dict)))
        where = ".".join(str(part) for part in first["loc"] if part not in _BRANCHES) or "cluster"
        problem = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            problem = f"unknown key; known: {', '.join(_known(first['loc']))}"
        raise ConfigError(f"{where}: {problem}") from exc


def wanted_fleet(cluster: ClusterConfig) -> WantedFleet:
    """Work out each group's settings.

    Raises:
        ConfigError: names the group and the key that is unknown or whose value is not allowed, or the model that
            lacks workers or a gateway.
    """
    workers = [_worker_group(cluster, group) for group in cluster.groups]
    gateways = [_gateway_group(cluster, group, workers) for group in cluster.gateways]
    models = {group.model for group in gateways}
    for group in workers:
        if group.model not in models:
            raise ConfigError(f"gateways: none serves {group.model}, the model of group {group.name}")
    for model in models:
        roles = {group.role for group in workers if group.model == model}
        for role in ("prefill", "decode"):
            if not roles & {role, "both"}:
                raise ConfigError(f"groups: none of role {role} serves {model}; allowed: one of role {role} or both")
    return WantedFleet(cluster.name, (*workers, *gateways), cluster.drain_s, cluster.lease_s, cluster.env)


def cluster_of(config: ServeConfig, gpu_share: float) -> ClusterConfig:
    """A fleet on one machine, as `kvsluice serve` is told.

    Args:
        gpu_share: of a GPU, for each worker.

    Raises:
        ConfigError: workers would want the same port.
    """
    if config.worker_port and (config.role == "split" or max(config.prefill_workers, config.decode_workers) > 1):
        raise ConfigError(f"worker_port: several workers cannot share {config.worker_port} on one machine; allowed: 0")
    roles = {"worker": ("both", max(config.prefill_workers, config.decode_workers))}
    if config.role == "split":
        roles = {"prefill": ("prefill", config.prefill_workers), "decode": ("decode", config.decode_workers)}
    return ClusterConfig.model_validate(
        {
            "settings": config.model_dump(),
            "groups": [
                {"name": name, "role": role, "replicas": replicas, "resources": _resources(config, role, gpu_share)}
                for name, (role, replicas) in roles.items()
            ],
            "drain_s": config.grace_s,
            "lease_s": max(LEAST_LEASE_S, LEASES * config.worker_lease_s),
        }
    )


def _resources(config: ServeConfig, role: str, gpu_share: float) -> dict[str, float]:
    """Of a worker on a machine: what is there of a GPU for each, but a whole one for each of several ranks."""
    ranks = config.ranks_of(role)
    return {"num_cpus": 1, "num_gpus": ranks if ranks > 1 and gpu_share else gpu_share}


def _check_ranks(group: WorkerGroup, config: ServeConfig) -> None:
    ranks, num_gpus = config.ranks_of(group.role), group.resources.num_gpus
    if config.device != "cpu" and ranks > 1 and num_gpus != ranks:
        raise ConfigError(
            f"groups.{group.name}.resources.num_gpus: got {num_gpus:g} for {ranks} ranks that have a GPU each; "
            f"allowed: {ranks}"
        )


def _worker_group(cluster: ClusterConfig, group: WorkerGroup) -> WantedGroup:
    given = _merged(cluster, group)
    given["role"] = "both" if group.role == "both" else "split"
    if "prefill_workers" not in given:
        # workers of a cluster have their share of a node's cores; those of one machine divide it among them
        given.setdefault("torch_threads", max(1, int(group.resources.num_cpus)))
    size, config = group.range, _checked(given, _place(group))
    _check_ranks(group, config)
    return _wanted(group, group.role, config, size.min, size.max, group.max_surge, group.max_unavailable)


def _gateway_group(cluster: ClusterConfig, group: GatewayGroup, workers: Iterable[WantedGroup]) -> WantedGroup:
    given = _merged(cluster, group)
    config = _checked(given, _place(group))
    split = any(one.role != "both" for one in workers if one.model == config.model_name)
    config = config.model_copy(update={"role": "split" if split else "both"})
    # a port that is given is free for the next one only when the last one is gone
    ports = [config.port, *([config.http_port] if config.http else [])]
    surge, unavailable = (0, 1) if any(ports) else (1, 0)
    return _wanted(
        group, "gateway", config, group.replicas, group.replicas, surge, unavailable, own_host="host" not in given
    )


def _wanted(
    group: Group,
    role: GroupRole,
    config: ServeConfig,
    minimum: int,
    maximum: int,
    max_surge: int,
    max_unavailable: int,
    own_host: bool = False,
) -> WantedGroup:
    bundle = group.resources.bundle()
    unused = _EVERYBODY | (_ENGINE_ONLY if role == "gateway" else _GATEWAY_ONLY)
    told = {key: value for key, value in json.loads(config.to_json()).items() if key not in unused}
    identity = json.dumps([role, told, sorted(bundle.items()), own_host], sort_keys=True)
    return WantedGroup(
        name=group.name,
        role=role,
        model=config.model_name,
        config_json=config.to_json(),
        bundle=bundle,
        minimum=minimum,
        maximum=maximum,
        max_surge=max_surge,
        max_unavailable=max_unavailable,
        own_host=own_host,
        version=hashlib.sha256(identity.encode()).hexdigest()[:8],
        max_num_seqs=config.max_num_seqs,
        start_timeout_s=config.start_timeout_s,
        scaling=group.scaling if isinstance(group, WorkerGroup) and minimum < maximum else None,
    )


def _merged(cluster: ClusterConfig, group: Group) -> dict[str, Any]:
    given = {**cluster.settings, **group.settings}
    if group.model is not None:
        given["model"] = group.model
    return {key.replace("-", "_"): value for key, value in given.items()}


def _checked(given: Mapping[str, Any], where: str) -> ServeConfig:
    known = ServeConfig.model_fields
    for key in given:
        if key not in known:
            raise ConfigError(f"{where}.{key}: unknown key; known: {', '.join(sorted(known))}")
    try:
        config = ServeConfig.model_validate(given)
    except ValidationError as exc:
        first = exc.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else "settings"
        raise ConfigError(f"{where}.{key}: {first['msg']} (got {str(first['input'])[:64]!r})") from exc
    except ConfigError as exc:
        raise ConfigError(f"{where}.{exc.message}") from exc
    is_path = os.sep in config.model or config.model.startswith((".", "~"))
    for key, path in (("model", config.model if is_path else None), ("profile", config.profile)):
        if path is not None and not os.path.isabs(path):
            # processes run in other folders, on other machines
            raise ConfigError(f"{where}.{key}: {path} is a relative path; allowed: an absolute one, on every node")
    return config


def _all(cluster: ClusterConfig) -> list[Group]:
    return [*cluster.gateways, *cluster.groups]


def _place(group: Group) -> str:
    kind = "gateways" if isinstance(group, GatewayGroup) else "groups"
    return f"{kind}[{group.name}].settings"


def _known(loc: tuple[int | str, ...]) -> list[str]:
    """The keys that the place of an unknown one knows."""
    names = [part for part in loc[:-1] if isinstance(part, str)]
    models: dict[str, type[Settings]] = {
        "groups": WorkerGroup,
        "gateways": GatewayGroup,
        "resources": Resources,
        "scaling": ScalingTargets,
        "replicas": ReplicaRange,
        "ReplicaRange": ReplicaRange,
    }
    known = next((models[name] for name in reversed(names) if name in models), ClusterConfig)
    return sorted(known.model_fields)
