"""From a recipe with open numbers to the one that runs: filled for the model, checked against it, or `exact`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import InvalidRecipe
from . import slots as s
from .filling import SLOT_NAMES, filling_from_dict, shown
from .layout import short_reason
from .recipes.exact import EXACT
from .spec import ModelShape, Recipe, Resolved

MAX_JOINT_WIDTH = 16384  # what layers that share have side by side: a Gram matrix of it takes 2 GiB
RANK_SHARE = s.LowRank.share
# what a profile does not say: as published where rows are selected one by one, else what the project measured
DEFAULT_RATE = 0.2
DEFAULT_WINDOWS = {"fastkv": 8, "tsp": 64}
DEFAULT_CHUNK, DEFAULT_OUTLIERS = 4, 0


def resolve(recipe: Recipe, shape: ModelShape, num_tokens: int, profile: Mapping[str, Any]) -> Resolved:
    """The recipe as it will run for a prompt of `num_tokens`.

    Args:
        profile: what is calibrated for the model, see `models.profiles`. What it lacks is taken from the shape, or is
            the same for all models.

    Raises:
        InvalidRecipe: slots that do not fit the model.
    """
    filled = fill(recipe, shape, profile)
    reason = short_reason(filled, shape, num_tokens)
    if reason is not None:
        return Resolved(requested=recipe.name, recipe=EXACT, fallback_reason=reason)
    return Resolved(requested=recipe.name, recipe=filled)


def fill(recipe: Recipe, shape: ModelShape, profile: Mapping[str, Any]) -> Recipe:
    """The recipe with every open number filled in, whatever the prompt's length.

    Raises:
        InvalidRecipe: slots that do not fit the model.
    """
    filled = replace(
        recipe,
        propagation=_fill_propagation(recipe.propagation, shape, profile),
        budget=_fill_budget(recipe.budget, shape),
        retrieval=_fill_retrieval(recipe.retrieval, profile),
        key_codec=_fill_codec(recipe.key_codec, shape, profile),
        value_codec=_fill_codec(recipe.value_codec, shape, profile),
    )
    _check_sharing(filled, shape)
    _check_codec("key_codec", filled.key_codec, shape)
    _check_codec("value_codec", filled.value_codec, shape)
    return filled


def default_rank(shape: ModelShape, share: float = RANK_SHARE) -> int:
    """A share of KV heads x head size, rounded to a multiple of 2, at least 2; 0.156 are the paper's 160 of 1,024."""
    return max(2, 2 * round(share * shape.kv_width / 2))


def neutral(recipe: Recipe) -> Recipe:
    """A filled recipe with all rates 1, native codecs and full budgets: it must equal `exact`."""
    changes = {slot: getattr(recipe, slot).neutral() for slot in SLOT_NAMES}
    return replace(recipe, name=f"{recipe.name}-neutral"[-64:], **changes)


def _fill_propagation(
    filling: s.PropagationFilling, shape: ModelShape, profile: Mapping[str, Any]
) -> s.PropagationFilling:
    if not isinstance(filling, s.TspPropagation):
        return filling
    layer, rate, window, recall = filling.layer, filling.rate, filling.window, filling.recall
    kind = "tsp" if filling.chunk_aligned else "fastkv"
    if layer is None:
        layer = profile.get(f"{kind}_layer", shape.num_layers // 2 - 1)
    if rate is None:
        rate = profile.get(f"{kind}_rate", DEFAULT_RATE)
    if window is None:
        window = profile.get(f"{kind}_window", DEFAULT_WINDOWS[kind])
    if recall is None:
        recall = profile.get("tsp_recall", 0.0)
    if shape.num_layers < 2:
        raise InvalidRecipe("recipe.propagation", f"selects after a layer, the model has {shape.num_layers}", "full")
    if not isinstance(layer, int) or not 0 <= layer <= shape.num_layers - 2:
        raise InvalidRecipe("recipe.propagation.layer", shown(layer), f"an integer from 0 to {shape.num_layers - 2}")
    if recall and not shape.hidden_size:
        raise InvalidRecipe("recipe.propagation.recall", "the model's hidden size is not known", "0")
    return replace(filling, layer=layer, rate=rate, window=window, recall=recall)


def _fill_retrieval(filling: s.RetrievalFilling, profile: Mapping[str, Any]) -> s.RetrievalFilling:
    if not isinstance(filling, s.ChunkLandmarks):
        return filling
    chunk, outliers = filling.chunk, filling.outliers
    if chunk is None:
        chunk = profile.get("chunk", DEFAULT_CHUNK)
    if outliers is None:
        outliers = profile.get("outliers", DEFAULT_OUTLIERS)
    return replace(filling, chunk=chunk, outliers=outliers)


def _fill_budget(filling: s.BudgetFilling, shape: ModelShape) -> s.BudgetFilling:
    if not isinstance(filling, s.PyramidBudget):
        return filling
    if shape.num_layers < 2:
        raise InvalidRecipe("recipe.budget", f"falls from layer to layer, the model has {shape.num_layers}", "uniform")
    if filling.num_layers not in (None, shape.num_layers):
        raise InvalidRecipe("recipe.budget.num_layers", shown(filling.num_layers), f"{shape.num_layers}, the model's")
    return replace(filling, num_layers=shape.num_layers)


def _fill_codec(filling: s.CodecFilling, shape: ModelShape, profile: Mapping[str, Any]) -> s.CodecFilling:
    if isinstance(filling, s.ProfileKeys):
        raw = profile.get("key_codec", {"kind": "lowrank", "bits": 8})
        named = filling_from_dict("key_codec", raw)
        if not isinstance(named, s.CodecFilling) or isinstance(named, s.ProfileKeys):
            raise InvalidRecipe("recipe.key_codec", "the profile names no codec", "affine, dense, lowrank, native")
        filling = named
    if isinstance(filling, s.LowRank) and filling.rank is None:
        return replace(filling, rank=default_rank(shape, filling.share))
    return filling


def _check_codec(slot: str, codec: s.CodecFilling, shape: ModelShape) -> None:
    if isinstance(codec, s.LowRank) and (codec.rank or 0) > shape.kv_width:
        raise InvalidRecipe(f"recipe.{slot}.rank", shown(codec.rank), f"1 to {shape.kv_width} = KV heads x head size")


def _check_sharing(recipe: Recipe, shape: ModelShape) -> None:
    """Refuse groups whose factors are as wide as `LowRank` or the memory of prefill does not allow."""
    layers = len(recipe.sharing.group(0, shape.num_layers))
    if layers > 1 and layers * shape.kv_width > MAX_JOINT_WIDTH:
        most = max(1, MAX_JOINT_WIDTH // shape.kv_width)
        allowed = f"1 to {most}, as {shape.kv_width} columns a layer make at most {MAX_JOINT_WIDTH}"
        raise InvalidRecipe("recipe.sharing.layers", shown(recipe.sharing.layers), allowed)
