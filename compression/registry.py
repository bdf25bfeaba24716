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
_SUMMARIES: dict[str, str] = {}


def register(recipe: Recipe, summary: str = "") -> Recipe:
    """Make a recipe known by its name.

    Args:
        summary: what it does, in a few words.
    """
    if recipe.name in _RECIPES or PRESETS.get(recipe.name, recipe.name) != recipe.name:
        raise ValueError(f"the name {recipe.name} is taken")
    _RECIPES[recipe.name], _SUMMARIES[recipe.name] = recipe, summary
    return recipe


def unregister(name: str) -> None:
    """Forget a recipe."""
    del _RECIPES[name], _SUMMARIES[name]


def recipe_names() -> tuple[str, ...]:
    """Names of all recipes, presets not included."""
    return tuple(sorted(_RECIPES))


def recipe_summary(name: str) -> str:
    """What a recipe does, in a few words."""
    return _SUMMARIES[name]


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


for _recipe, _summary in {
    EXACT: "every row, as it was computed",
    FASTKV: "deep layers see a fifth of the prompt, a tenth is kept",
    SHADOWKV: "low-rank keys, whole values, steps read 1.6 % in chunks of 8",
    SLUICE: "every row in 4 bits, deep layers see chunks; steps read 6 %",
    SLUICE_FULL: "every row in 4 bits, steps read 6 % in chunks of 4",
    SNAPKV: "the tenth of the rows that the prompt's end attends to",
    PYRAMIDKV: "as snapkv, with more rows in shallow layers",
    STREAMING: "the first rows and a window of the last",
    KIVI: "every row in 4 bits",
    KIVI_2BIT: "every row in 2 bits",
    FP8: "every row in 8-bit floating point",
    MIKV: "the most important tenth exact, the rest in 4 bits",
    QUANTIZED_PRUNING: "two fifths of the rows, in 4 bits",
    LOWRANK: "keys at half rank, values whole",
    XKV: "keys of neighbouring layers in one low-rank basis",
    XKV_KV: "keys and values of neighbouring layers in low-rank bases",
}.items():
    register(_recipe, _summary)
