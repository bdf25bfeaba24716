"""The recipes that a request can name. A new one is a file in `recipes/` and a line here."""

from __future__ import annotations

from dataclasses import replace

from ..errors import InvalidRecipe
from .filling import SLOT_NAMES, filling_from_dict
from .recipes.exact import EXACT
from .recipes.fastkv import FASTKV
from .recipes.fp8 import FP8
from .recipes.kivi import KIVI, KIVI_2BIT
from .recipes.lowrank import LOWRANK
from .recipes.mikv import MIKV
from .recipes.pyramidkv import PYRAMIDKV
from .recipes.quantized_pruning import QUANTIZED_PRUNING
from .recipes.shadowkv import SHADOWKV
from .recipes.sluice import SLUICE, SLUICE_FULL
from .recipes.snapkv import SNAPKV
from .recipes.streaming import STREAMING
from .recipes.xkv import XKV, XKV_KV
from .spec import Recipe, check_keys, parse_object

PRESETS = {"exact": "exact", "balanced": "sluice", "fast": "fastkv"}

_RECIPES: dict[str, Recipe] = {}


def register(recipe: Recipe) -> Recipe:
    """Make a recipe known by its name."""
    if recipe.name in _RECIPES or PRESETS.get(recipe.name, recipe.name) != recipe.name:
        raise ValueError(f"the name {recipe.name} is taken")
    _RECIPES[recipe.name] = recipe
    return recipe


def unregister(name: str) -> None:
    """Forget a recipe."""
    del _RECIPES[name]


def recipe_names() -> tuple[str, ...]:
    """Names of all recipes, presets not included."""
    return tuple(sorted(_RECIPES))


def get_recipe(name: str, slots_json: str = "") -> Recipe:
    """The recipe that a request asks for, with open numbers.

    Args:
        name: a recipe or a preset.
        slots_json: a JSON object of slots that replace the named recipe's; empty = none. The result is called
            `<name>-custom`.

    Raises:
        InvalidRecipe: an unknown name, or slots that are no slots or do not fit together.
    """
    recipe = _RECIPES.get(PRESETS.get(name, name))
    if recipe is None:
        known = ", ".join(dict.fromkeys((*recipe_names(), *PRESETS)))
        raise InvalidRecipe("recipe.name", f"unknown recipe {name[:64]!r}", known)
    if not slots_json:
        return recipe
    raw = parse_object(slots_json, "recipe.slots")
    check_keys(raw, SLOT_NAMES, "recipe.slots")
    if not raw:
        return recipe
    fillings = {slot: filling_from_dict(slot, value) for slot, value in raw.items()}
    return replace(recipe, name=f"{recipe.name}-custom", **fillings)  # type: ignore[arg-type]


for _recipe in (
    *(EXACT, FASTKV, SHADOWKV, SLUICE, SLUICE_FULL),
    *(SNAPKV, PYRAMIDKV, STREAMING),
    *(KIVI, KIVI_2BIT, FP8, MIKV, QUANTIZED_PRUNING),
    *(LOWRANK, XKV, XKV_KV),
):
    register(_recipe)
