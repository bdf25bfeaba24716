"""What was calibrated, or published, for a model: where to select tokens and how to store keys. Free of torch.

Profiles are JSON files under `profiles/`, named like the model. Keys:

    fastkv_layer   layer T of FastKV as published (arXiv 2502.01068, its code's defaults)
    tsp_layer      layer after which token-selective propagation may select without losing answers
    tsp_rate       share of the rows that go on
    tsp_recall     share of the rows that decode may have brought back at once, for recipes that leave it open
    key_codec      slot of a recipe: how keys are stored

What a file does not say is filled in from the shape: T at half depth, 20 % of the rows, no recall, and low-rank keys at
8 bits of rank 0.156 x KV heads x head size, which is what the published methods use for the models they name.
"""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from importlib import resources
from typing import Any, Protocol

LOWRANK_SHARE = 0.156


class Shape(Protocol):
    """The part of a model's shape that defaults depend on."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


def load_profile(model_name: str, shape: Shape) -> dict[str, Any]:
    """The profile of a model, complete.

    Args:
        model_name: a built-in name, a name of `SHAPES`, or anything else for the defaults.
        shape: fills in what the model's file does not say.
    """
    half = max(0, shape.num_layers // 2 - 1)
    rank = max(2, round(LOWRANK_SHARE * shape.num_kv_heads * shape.head_dim / 2) * 2)
    defaults = {
        "fastkv_layer": half,
        "tsp_layer": half,
        "tsp_rate": 0.2,
        "key_codec": {"kind": "lowrank", "rank": rank, "bits": 8},
    }
    return defaults | deepcopy(_stored().get(model_name, {}))


@cache
def _stored() -> dict[str, dict[str, Any]]:
    folder = resources.files(__package__).joinpath("profiles")
    files = [entry for entry in folder.iterdir() if entry.name.endswith(".json")]
    return {entry.name.removesuffix(".json"): json.loads(entry.read_text(encoding="utf-8")) for entry in files}
