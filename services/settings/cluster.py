"""What a fleet on a cluster consists of: the file that `kvsluice up` reads."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .base import Seconds, Settings

Name = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$")]
Count = Annotated[int, Field(ge=0, le=1024)]
Amount = Annotated[float, Field(ge=0, le=2**20, allow_inf_nan=False)]


class Resources(Settings):
    """What one worker takes of a node, as Ray counts it."""

    num_cpus: Amount = Field(1.0, description="CPUs of each worker; its torch uses as many threads")
    num_gpus: Amount = Field(0.0, description="GPUs of each worker; below 1, workers share one")
    accelerator_type: str | None = Field(
        None, pattern=r"^[0-9A-Za-z._-]{1,64}$", description="kind of GPU, as Ray names it, such as H100"
    )
    custom: dict[str, Amount] = Field(default_factory=dict, description="custom resources of Ray's nodes")

    @model_validator(mode="after")
    def _something(self) -> Resources:
        if not self.bundle():
            raise ValueError("num_cpus: all resources are 0; allowed: at least one above 0, such as num_cpus: 0.01")
        return self

    def bundle(self) -> dict[str, float]:
        """As Ray's placement groups take it."""
        given = {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.custom}
        if self.accelerator_type is not None:
            # how Ray marks nodes by their accelerator; any small amount asks for it
            given[f"accelerator_type:{self.accelerator_type}"] = 0.001
        return {name: amount for name, amount in given.items() if amount}


class ReplicaRange(Settings):
    """Between how many workers the controller may choose."""

    min: Annotated[int, Field(ge=1, le=1024)]
    max: Annotated[int, Field(ge=1, le=1024)]

    @model_validator(mode="after")
    def _ordered(self) -> ReplicaRange:
        if self.min > self.max:
            raise ValueError(f"min: got {self.min}; allowed: 1 to max, {self.max}")
        return self


class ScalingTargets(Settings):
    """When a group grows and shrinks."""

    target_queue_s: Seconds = Field(
        2.0, description="requests that wait longer than this for the group want more of it"
    )
    target_token_usage: Annotated[float, Field(gt=0, le=1)] = Field(
        0.8, description="share of the KV cache in use (decode), or of the time at work (prefill), that is aimed at"
    )
    tolerance: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="how far off the target nothing is done")
    up_after_s: Seconds = Field(5.0, description="how long more have to be wanted until there are more")
    down_after_s: Seconds = Field(120.0, description="how long fewer have to be enough until there are fewer")
    cooldown_s: Seconds = Field(15.0, description="how long nothing is done after a change")


class Group(Settings):
    """What groups of workers and of gateways have in common."""

    name: Name
    model: str | None = Field(None, min_length=1, max_length=4096, description="default: that of the common settings")
    resources: Resources = Field(default_factory=lambda: Resources.model_validate({}))
    settings: dict[str, Any] = Field(default_factory=dict, description="keys of `kvsluice serve`, for this group")


class GatewayGroup(Group):
    """Gateways of one model. Each listens on its node's address, unless `host` is set."""

    name: Name = "gateway"
    replicas: Count = 1


class WorkerGroup(Group):
    """Workers of one role, model and kind of node."""

    role: Literal["prefill", "decode", "both"]
    replicas: Count | ReplicaRange = 1
    scaling: ScalingTargets = Field(default_factory=lambda: ScalingTargets.model_validate({}))
    max_surge: Count = Field(1, description="workers beyond the wanted number while an upgrade runs")
    max_unavailable: Count = Field(0, description="workers that may be missing meanwhile")

    @property
    def range(self) -> ReplicaRange:
        if isinstance(self.replicas, ReplicaRange):
            return self.replicas
        return ReplicaRange.model_construct(min=self.replicas, max=self.replicas)

    @model_validator(mode="after")
    def _moves(self) -> WorkerGroup:
        if self.max_surge == 0 and self.max_unavailable == 0:
            raise ValueError("max_surge, max_unavailable: both are 0, so no upgrade could begin; allowed: one above 0")
        return self


class ClusterConfig(Settings):
    """A fleet: gateways and groups of workers, with the settings that they share."""

    name: Name = Field("kvsluice", description="several fleets on one cluster are told apart by it")
    settings: dict[str, Any] = Field(default_factory=dict, description="keys of `kvsluice serve`, for everything")
    gateways: Annotated[list[GatewayGroup], Field(min_length=1, max_length=64)] = Field(
        default_factory=lambda: [GatewayGroup.model_validate({})]
    )
    groups: Annotated[list[WorkerGroup], Field(min_length=1, max_length=256)]
    drain_s: Seconds = Field(300.0, description="how long sequences of a worker that is taken away may go on there")
    lease_s: Annotated[float, Field(ge=2, le=3600)] = Field(
        30.0, description="a worker that the controller does not hear of for so long is started anew"
    )
    env: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = Field(
        default_factory=dict, description="environment variables of all processes; no secrets: they show in Ray"
    )

    @model_validator(mode="after")
    def _distinct(self) -> ClusterConfig:
        names = [group.name for group in [*self.gateways, *self.groups]]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"name: {twice[0]} is the name of two groups; allowed: each once")
        return self
