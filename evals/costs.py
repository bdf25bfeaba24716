"""What prefill takes under a recipe, beside what `exact` takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache

from ..compression.recipe import Recipe, fill, get_recipe
from ..errors import InvalidRecipe
from ..models.checkpoint import DEFAULT_MODEL
from ..models.config import ModelConfig
from ..models.loader import load_config
from ..services.model_shape import model_shape
from ..services.prefill.flops import prompt_flops
from .results import EXACT, Cell, EvalResults


def prefill_share(results: EvalResults, recipe: str, context: int) -> float | None:
    """Prefill's operations as a share of those of `exact`, over all samples of a context; None where unknown.

    They are those that the engine counted. For files that are older than its count and of the default model, they are
    what `prompt_flops` says of prompts of the cells' mean lengths."""
    own, plain = _cells(results, recipe, context), _cells(results, EXACT, context)
    if all(cell.prefill_flops is not None for cell in (*own, *plain)):
        return _mean(own) / _mean(plain) if own and plain else None
    if not own or results.model.name != DEFAULT_MODEL:
        return None
    evaluated = results.recipes[recipe]
    try:
        ran = Recipe.from_json(json.dumps({"name": evaluated.name, **evaluated.slots}))
    except InvalidRecipe:  # a recipe that today's slots do not say
        return None
    taken = whole = 0.0
    for cell in own:
        exact, foretold = (_foretold(one, round(cell.prompt_tokens)) for one in (_exact(), ran))
        taken += cell.fallbacks * exact + (len(cell.scores) - cell.fallbacks) * foretold
        whole += len(cell.scores) * exact
    return taken / whole


def _cells(results: EvalResults, recipe: str, context: int) -> list[Cell]:
    return [cell for cell in results.cells if (cell.recipe, cell.context) == (recipe, context)]


def _mean(cells: Sequence[Cell]) -> float:
    """Operations a sample."""
    total = sum(len(cell.scores) * cell.prefill_flops for cell in cells if cell.prefill_flops is not None)
    return total / sum(len(cell.scores) for cell in cells)


@cache
def _config() -> ModelConfig:
    """The default model's; reading it takes a while."""
    return load_config(DEFAULT_MODEL)


@cache
def _exact() -> Recipe:
    return fill(get_recipe(EXACT), model_shape(_config()), {})


@cache
def _foretold(recipe: Recipe, num_tokens: int) -> float:
    """Operations of a prompt of the default model."""
    return prompt_flops(_config(), model_shape(_config()), recipe, num_tokens).total
