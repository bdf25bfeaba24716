"""Tables of what recipes consist of and, from that, what they ship."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from ..compression.filling import SLOT_NAMES, filling_kinds
from ..compression.recipe import ModelShape, Recipe, fill, get_recipe, recipe_names, resolve
from ..compression.sizes import encoded_nbytes
from ..models.checkpoint import DEFAULT_MODEL
from ..models.loader import load_config
from ..models.profiles import load_profile
from ..services.model_shape import model_shape
from .pages import table
from .results import EvalResults

CONTEXTS = (2048, 4096, 8192, 16384, 32768)
BF16_BYTES = 2


def slot_rows(recipe: Recipe) -> list[tuple[str, str, str]]:
    """Slot, filling and numbers of each slot that differs from `exact`'s."""
    plain, own, rows = json.loads(get_recipe("exact").to_json()), json.loads(recipe.to_json()), []
    for slot in SLOT_NAMES:
        filling = own[slot]
        if filling == plain[slot]:
            continue
        numbers = (f"{name} = {_shown(value)}" for name, value in filling.items() if name != "kind")
        rows.append((f"`{slot}`", f"`{filling['kind']}`", ", ".join(numbers)))
    return rows


def slots_table(name: str) -> str:
    """The slots of a recipe, and what it ships of a prompt on the default model."""
    rows = slot_rows(get_recipe(name))
    if not rows:
        return "Every slot at its default."
    shares = ", ".join(f"{share} of {context:,}" for context, share in zip(CONTEXTS, shipped_shares(name), strict=True))
    return (
        f"{table(('slot', 'filling', 'numbers'), rows, numbers_from=3)}\n\nOther slots are those of `exact`. "
        f"Bytes on the wire ÷ bf16, from the layout, for {DEFAULT_MODEL} and prompts in tokens: {shares}. "
        f"There it runs on prompts of {least_tokens(name):,} tokens and more; shorter ones run `exact`."
    )


def shipped_table() -> str:
    """What each recipe ships by its layout, for the default model."""
    rows = [(f"`{name}`", *shipped_shares(name)) for name in recipe_names()]
    return table(("recipe", *(f"{context:,}" for context in CONTEXTS)), rows)


def fillings_table() -> str:
    """What may stand in each slot, `exact`'s filling first."""
    plain, rows = json.loads(get_recipe("exact").to_json()), []
    for slot in SLOT_NAMES:
        kinds = sorted(filling_kinds(slot), key=lambda kind: (kind != plain[slot]["kind"], kind))
        rows.append((f"`{slot}`", ", ".join(f"`{kind}`" for kind in kinds)))
    return table(("slot", "fillings"), rows, numbers_from=2)


def shipped_shares(name: str, contexts: Sequence[int] = CONTEXTS) -> list[str]:
    """Bytes shipped, without headers, as shares of the cache in bf16; `exact` where a prompt is too short."""
    shape = default_shape()
    profile = load_profile(DEFAULT_MODEL, shape)
    found = []
    for context in contexts:
        resolved = resolve(get_recipe(name), shape, context, profile)
        share = encoded_nbytes(resolved.recipe, shape, context, BF16_BYTES) / shape.bf16_kv_bytes(context)
        found.append("runs `exact`" if resolved.fallback_reason else f"{share:.3f}")
    return found


@cache
def least_tokens(name: str) -> int:
    """From how many tokens on every prompt of the default model is long enough for a recipe."""
    recipe, shape = get_recipe(name), default_shape()
    profile = load_profile(DEFAULT_MODEL, shape)
    too_short = [n for n in range(1, CONTEXTS[0] + 1) if resolve(recipe, shape, n, profile).fallback_reason is not None]
    assert CONTEXTS[0] not in too_short, "the shortest context of the tables is long enough"
    return max(too_short, default=0) + 1


def variants_table(results: EvalResults) -> str:
    """What each variant that ran has other than the recipe that it varies; "" where none ran."""
    rows = []
    for label, one in results.recipes.items():
        if label == one.name:
            continue
        base = one.name.removesuffix("-custom")
        plain = results.recipes[base].slots if base in results.recipes else json.loads(_filled(base).to_json())
        changes = [_change(slot, plain[slot], one.slots[slot]) for slot in SLOT_NAMES if one.slots[slot] != plain[slot]]
        rows.append((f"`{label}`", f"`{base}`", "; ".join(changes)))
    return table(("variant", "of", "with"), rows, numbers_from=3) if rows else ""


def _change(slot: str, plain: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """A slot in words: the numbers that differ, or another filling with all of its numbers."""
    same = plain["kind"] == own["kind"]
    numbers = [f"{name} = {_shown(own[name])}" for name in own if name != "kind" and own[name] != plain.get(name)]
    return " ".join([f"`{slot}`", *([] if same else [f"`{own['kind']}`"]), ", ".join(numbers)]).rstrip()


def changed_since(results: EvalResults) -> list[str]:
    """Recipes of the library that ran on the default model with other slots than they have now."""
    if results.model.name != DEFAULT_MODEL:
        return []
    ran = {label: one for label, one in results.recipes.items() if label == one.name and label in recipe_names()}
    return [label for label, one in ran.items() if one.fingerprint != _filled(label).fingerprint]


@cache
def _filled(name: str) -> Recipe:
    """A recipe as it is now, filled in for the default model."""
    shape = default_shape()
    return fill(get_recipe(name), shape, load_profile(DEFAULT_MODEL, shape))


@cache
def default_shape() -> ModelShape:
    """The default model's shape."""
    return model_shape(load_config(DEFAULT_MODEL))


def _shown(value: object) -> str:
    if value is None:
        return "from the model's profile or shape"
    return str(value).lower() if isinstance(value, bool) else str(value)
