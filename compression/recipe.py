"""What a request asks for: a `Recipe`, its names, its resolution for a model and a prompt. Free of torch.

name or preset ──get_recipe──> Recipe (numbers may be open)
Recipe + ModelShape + prompt length + profile ──resolve──> Resolved (all numbers fixed, or `exact` and why)
"""

from __future__ import annotations

from .registry import PRESETS, get_recipe, recipe_names, recipe_summary, register, unregister
from .resolve import default_rank, fill, neutral, resolve
from .spec import MAX_RECIPE_JSON, ModelShape, Recipe, Resolved

__all__ = [
    "MAX_RECIPE_JSON",
    "PRESETS",
    "ModelShape",
    "Recipe",
    "Resolved",
    "default_rank",
    "fill",
    "get_recipe",
    "neutral",
    "recipe_names",
    "recipe_summary",
    "register",
    "resolve",
    "unregister",
]
