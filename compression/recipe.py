"""What a request asks for: a `Recipe`, its validation, its resolution for a model and a prompt. Free of torch.

    name or preset ──registry──> Recipe (numbers may be open)
    Recipe + ModelShape + prompt length + profile ──resolve──> Resolved (all numbers fixed, or `exact` and why)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ..errors import InvalidRecipe
from . import slots as s

MAX_RECIPE_JSON = 16 * 1024


@dataclass(frozen=True)
class ModelShape:
    """What a recipe must know of a model.

    Attributes:
        layer_windows: sliding-window width of each layer, None where a layer attends to everything.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    layer_windows: tuple[int | None, ...]

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    def bf16_kv_bytes(self, num_tokens: int) -> int:
        """Bytes that the whole KV cache of `num_tokens` rows takes in bf16."""
        return 2 * 2 * self.num_layers * self.kv_width * num_tokens

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ModelShape:
        raw = json.loads(text)
        raw["layer_windows"] = tuple(raw["layer_windows"])
        return cls(**raw)


@dataclass(frozen=True)
class Recipe:
    """A frozen, validated set of slot fillings. See DESIGN in `docs/architecture.md`."""

    name: str
    propagation: s.Filling = field(default_factory=s.FullPropagation)
    scorer: s.Filling = field(default_factory=s.NoScorer)
    budget: s.Filling = field(default_factory=s.KeepAll)
    evicted: s.Filling = field(default_factory=s.Drop)
    key_codec: s.Filling = field(default_factory=s.Native)
    value_codec: s.Filling = field(default_factory=s.Native)
    sharing: s.Filling = field(default_factory=s.NoSharing)
    retrieval: s.Filling = field(default_factory=s.AttendAll)
    window: s.Filling = field(default_factory=s.ExactEnds)

    def __post_init__(self) -> None:
        raise NotImplementedError  # validation of combinations by declared properties

    def to_json(self) -> str: ...

    @classmethod
    def from_json(cls, text: str) -> Recipe: ...

    @property
    def fingerprint(self) -> str:
        """32 hex digits over the canonical JSON; equal recipes, equal fingerprints, whatever their name."""
        ...


@dataclass(frozen=True)
class Resolved:
    """A recipe as it will run for one prompt.

    Attributes:
        requested: name asked for.
        recipe: the effective recipe, no number open.
        fallback_reason: why `exact` runs instead, or None.
    """

    requested: str
    recipe: Recipe
    fallback_reason: str | None = None


def resolve(recipe: Recipe, shape: ModelShape, num_tokens: int, profile: Mapping[str, Any]) -> Resolved: ...
