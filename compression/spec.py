"""`Recipe`, the frozen value that says what becomes of a request's KV cache, and `ModelShape`. Free of torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import InvalidRecipe
from . import slots as s
from .filling import SLOT_NAMES, Filling, filling_from_dict, filling_kinds, shown

MAX_RECIPE_JSON = 16 * 1024
MAX_BLOCK = 4096
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True)
class ModelShape:
    """What a recipe must know of a model.

    Attributes:
        layer_windows: sliding-window width of each layer, None where a layer attends to everything.
        hidden_size: columns of a hidden row; 0 = not known, and nothing can be recalled.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    layer_windows: tuple[int | None, ...]
    hidden_size: int = 0

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
class Tier:
    """Sealed rows that are packed alike.

    Attributes:
        prefix: of the names of its tensors.
    """

    prefix: str
    key_codec: s.CodecFilling
    value_codec: s.CodecFilling


@dataclass(frozen=True)
class Recipe:
    """A frozen, validated set of slot fillings; what each slot decides is said in `slots`.

    Raises:
        InvalidRecipe: fillings that contradict each other, by the properties that they declare.
    """

    name: str
    propagation: s.PropagationFilling = field(default_factory=s.FullPropagation)
    scorer: s.ScorerFilling = field(default_factory=s.NoScorer)
    budget: s.BudgetFilling = field(default_factory=s.KeepAll)
    evicted: s.EvictedFilling = field(default_factory=s.Drop)
    key_codec: s.CodecFilling = field(default_factory=s.Native)
    value_codec: s.CodecFilling = field(default_factory=s.Native)
    sharing: s.SharingFilling = field(default_factory=s.NoSharing)
    retrieval: s.RetrievalFilling = field(default_factory=s.AttendAll)
    window: s.ExactEnds = field(default_factory=s.ExactEnds)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise InvalidRecipe("recipe.name", shown(self.name), "1 to 64 of a-z, 0-9, `.`, `_`, `-`")
        for slot in SLOT_NAMES:
            filling = getattr(self, slot)
            if not isinstance(filling, Filling) or slot not in filling.slot:
                raise InvalidRecipe(f"recipe.{slot}", shown(filling), ", ".join(filling_kinds(slot)))
        self._check_codecs()
        self._check_eviction()
        self._check_grid()
        self._check_window()
        self._check_recall()

    @property
    def block(self) -> int:
        """Rows of a sealing block: sealed regions end, and generated blocks begin, at multiples of it."""
        blocks = [codec.append_block for tier in self.tiers() for codec in (tier.key_codec, tier.value_codec)]
        return math.lcm(self.window.seal_block or 1, self.retrieval.chunk or 1, *blocks)

    @property
    def why_not_redone(self) -> str | None:
        """Why a decode step cannot be redone with attention to more rows than it chose: there are no others, because
        the rest was dropped, or because it chose all. None = it can be."""
        if self.retrieval.chooses:
            return None
        drops = self.propagation.selects or (self.budget.evicts and not self.evicted.keeps)
        return "rows_dropped" if drops else "attends_to_all"

    def check_resolved(self) -> None:
        """Check that no number is open, as every engine needs it.

        Raises:
            InvalidRecipe: names the first slot and field that `resolve` would have filled in.
        """
        for slot in SLOT_NAMES:
            name = getattr(self, slot).open_field()
            if name is not None:
                raise InvalidRecipe(f"recipe.{slot}.{name}", "is open", "what `resolve` fills in for the model")

    def tiers(self) -> tuple[Tier, ...]:
        """How the sealed rows of a layer are packed: those that the budget keeps, and those that it does not but that
        stay."""
        kept = Tier("", self.key_codec, self.value_codec)
        if not self.evicted.keeps:
            return (kept,)
        return (kept, Tier("demoted_", self.evicted.key_codec, self.evicted.value_codec))

    def _check_codecs(self) -> None:
        if self.value_codec.keys_only:
            raise InvalidRecipe("recipe.value_codec", "packs keys only", "native, dense, affine, float8, lowrank")
        if self.sharing.layers == 1:
            return
        alone = next((slot for slot, codec in self._shared_codecs() if not codec.head_shared), None)
        if alone is not None:
            raise InvalidRecipe(f"recipe.{alone}", "packs every layer alone, but `sharing` joins layers", "lowrank")
        if self.window.seal_block:
            raise InvalidRecipe("recipe.window.seal_block", "generated rows are not joined over layers", "0")
        if self.budget.evicts or self.propagation.selects:
            slot = "budget" if self.budget.evicts else "propagation"
            raise InvalidRecipe(
                f"recipe.{slot}", "layers that share must hold the same rows", "all" if slot == "budget" else "full"
            )

    def _shared_codecs(self) -> list[tuple[str, s.CodecFilling]]:
        codecs = [("key_codec", self.key_codec)]
        return [*codecs, ("value_codec", self.value_codec)] if self.sharing.values else codecs

    def _check_eviction(self) -> None:
        if self.evicted.keeps and not self.budget.needs_scores:
            raise InvalidRecipe("recipe.budget", f"`{self.budget.kind}` ranks no rows to demote", "pyramid, uniform")
        if self.evicted.keeps and self.propagation.selects:
            raise InvalidRecipe("recipe.propagation", "rows that were not propagated cannot be demoted", "full")
        if not self.budget.evicts:
            return
        if self.budget.needs_scores and not self.scorer.scores:
            raise InvalidRecipe("recipe.scorer", f"the `{self.budget.kind}` budget needs scores", "accumulated, snap")
        if self.budget.heads == "own":
            self._check_own_heads()
        rate, passed = getattr(self.budget, "rate", None), getattr(self.propagation, "rate", None)
        if rate is not None and passed is not None and rate > passed:
            raise InvalidRecipe("recipe.budget.rate", shown(rate), f"at most recipe.propagation.rate = {passed}")

    def _check_own_heads(self) -> None:
        for slot, codec in (("key_codec", self.key_codec), ("value_codec", self.value_codec)):
            if codec.head_shared:
                raise InvalidRecipe(
                    f"recipe.{slot}",
                    f"`{codec.kind}` shares rows between heads, but `{self.budget.kind}` lets each head keep its own",
                    "a codec that stores heads apart (native, dense, affine, float8), or budget.heads = shared",
                )

    def _check_grid(self) -> None:
        chunk = self.retrieval.chunk or 1  # one that is open is checked when it is filled in
        if not self.retrieval.needs_grid:
            if self.propagation.chunk_aligned:
                raise InvalidRecipe("recipe.retrieval", "chunk_aligned propagation needs a chunk grid", "chunks")
            return
        if self.budget.evicts:
            raise InvalidRecipe("recipe.budget", f"`{self.retrieval.kind}` retrieval needs whole chunks", "all")
        if self.propagation.selects and not self.propagation.chunk_aligned:
            raise InvalidRecipe("recipe.propagation.chunk_aligned", "retrieval needs whole chunks", "true")
        if self.window.sinks % chunk:
            raise InvalidRecipe("recipe.window.sinks", shown(self.window.sinks), f"a multiple of the chunk, {chunk}")
        for slot, codec in (("key_codec", self.key_codec), ("value_codec", self.value_codec)):
            if codec.append_block > 1 and codec.append_block % chunk:
                raise InvalidRecipe(
                    f"recipe.{slot}.group", shown(codec.append_block), f"a multiple of the chunk, {chunk}"
                )

    def _check_recall(self) -> None:
        propagation, chunk = self.propagation, self.retrieval.chunk or 1
        if not isinstance(propagation, s.TspPropagation) or not propagation.recalls:
            return
        if self.budget.evicts:
            problem = (
                f"layer T has to hold every row, by which it sees what is wanted, but `{self.budget.kind}` does not"
            )
            raise InvalidRecipe("recipe.propagation.recall", problem, "0, or budget = all")
        if propagation.chunk_aligned and propagation.recall_step % chunk:
            got = shown(propagation.recall_step)
            raise InvalidRecipe("recipe.propagation.recall_step", got, f"a multiple of the chunk, {chunk}")

    def _check_window(self) -> None:
        if self.window.positions == "cache" and not self.budget.fixed:
            raise InvalidRecipe("recipe.window.positions", "`cache` needs nothing between the ends", "original")
        if self.budget.fixed and not self.window.seal_block:
            raise InvalidRecipe("recipe.window.seal_block", f"`{self.budget.kind}` forgets block by block", "1 to 4096")
        if self.budget.fixed and not (self.window.sinks or self.window.local or self.window.local_rate):
            raise InvalidRecipe(
                "recipe.window", f"has no exact rows, and `{self.budget.kind}` keeps no others", "sinks or local rows"
            )
        if self.block > MAX_BLOCK:
            raise InvalidRecipe(
                "recipe.window.seal_block",
                f"blocks of {self.block} rows (with the codecs' groups and the chunk)",
                f"a value whose least common multiple with them is at most {MAX_BLOCK}",
            )
        need = self.window.local + self.block
        if self.propagation.selects and self.window.local_rate:
            raise InvalidRecipe("recipe.window.local_rate", "selective propagation keeps a fixed window", "0")
        scoring = self.propagation.window
        if self.propagation.selects and scoring is not None and scoring < need:
            raise InvalidRecipe(
                "recipe.propagation.window",
                shown(scoring),
                f"at least {need} = window.local + one sealing block, so that the exact rows at the end are whole",
            )

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces; equal recipes give equal text."""
        return _canonical({"name": self.name} | self._slots())

    def _slots(self) -> dict[str, Any]:
        return {slot: getattr(self, slot).to_dict() for slot in SLOT_NAMES}

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe that any text describes.

        Raises:
            InvalidRecipe: whatever else the text is.
        """
        raw = parse_object(text, "recipe")
        check_keys(raw, ("name", *SLOT_NAMES), "recipe")
        name = raw.pop("name", None)
        return cls(name=name, **{slot: filling_from_dict(slot, value) for slot, value in raw.items()})  # type: ignore[arg-type]

    @property
    def fingerprint(self) -> str:
        """32 hex digits over the canonical JSON; equal recipes, equal fingerprints, whatever their name."""
        return hashlib.sha256(_canonical(self._slots()).encode()).hexdigest()[:32]


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


def parse_object(text: str, where: str) -> dict[str, Any]:
    """The JSON object in a text of bounded size.

    Raises:
        InvalidRecipe: anything else, duplicate keys, NaN and infinities included.
    """
    if not isinstance(text, str) or len(text) > MAX_RECIPE_JSON:
        raise InvalidRecipe(where, "is too long or no text", f"JSON of at most {MAX_RECIPE_JSON} characters")
    try:
        raw = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as exc:
        raise InvalidRecipe(where, "is not JSON", "a JSON object without duplicate keys, NaN or infinities") from exc
    if not isinstance(raw, dict):
        raise InvalidRecipe(where, "is not an object", "a JSON object")
    return raw


def check_keys(raw: dict[str, Any], allowed: tuple[str, ...], where: str) -> None:
    """Refuse keys that are not allowed."""
    for key in raw:
        if key not in allowed:
            raise InvalidRecipe(where, f"unknown key {key[:64]!r}", ", ".join(allowed))


def _canonical(raw: dict[str, Any]) -> str:
    return json.dumps(raw, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("duplicate keys")
    return out


def _refuse_constant(name: str) -> None:
    raise ValueError(name)
