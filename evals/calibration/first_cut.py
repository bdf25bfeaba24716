"""The first cut: how far each candidate turns final hidden rows away from those of the full pass.

Selecting rows (FastKV, arXiv 2502.01068: T is the layer whose selection changes the final hidden rows least). One full
pass runs through the layers; behind each layer T the candidates of that layer choose their rows from what is there, and
only these go through the layers above. Looked at are the prompt's last rows, which every candidate keeps.

Packing and reading rows. Prefill runs once for all candidates that let the same rows go on, and each of them packs its
layers. Then the first rows of the right answer run through decode's forward pass over each cache, as an evaluation has
it. Looked at are those rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...compression import make_cache, make_compressor
from ...compression.interfaces import Compressor, LayerObs, SequenceCache
from ...compression.recipe import ModelShape, Recipe
from ...errors import InvalidRequest
from ...models.forward import Rows, forward_rows
from ...models.model import Model
from ..suites import Case
from .walk import Walk, as_head_reads, relative_error

LAST_ROWS = 8  # of the prompt; no window of the grids is shorter, so every candidate lets them go on
ANSWER_ROWS = 16  # of the right answer, at most
MOST_CACHES = 8  # that exist at once


@torch.no_grad()
def propagation_errors(
    model: Model, case: Case, recipes: Mapping[str, Recipe], chunk_tokens: int, last_rows: int = LAST_ROWS
) -> dict[str, float]:
    """Relative error of the final hidden state of the prompt's last rows.

    Args:
        recipes: label -> filled recipe, whose propagation is what is measured.
        chunk_tokens: rows whose attention is computed at once.
        last_rows: how many are looked at; fewer where a recipe's window is shorter.
    """
    num_tokens = len(case.prompt_ids)
    full = Walk.begin(model, case.prompt_ids, num_tokens, chunk_tokens)
    found: dict[str, Tensor] = {}
    shortest = min((one.propagation.window for one in recipes.values()), default=last_rows)
    last_rows = min(last_rows, shortest, num_tokens)
    for layer, window in enumerate(model.config.layer_windows):
        obs = full.step()
        for label, recipe in recipes.items():
            if getattr(recipe.propagation, "layer", None) == layer:
                chooses = recipe.propagation.build(recipe.retrieval.chunk, recipe.window.sinks)
                found[label] = full.branch(chooses.select(obs, window)).finish()[-last_rows:]
    wanted = as_head_reads(model, full.x[-last_rows:])
    return {label: relative_error(as_head_reads(model, rows), wanted) for label, rows in found.items()}


@torch.no_grad()
def cache_errors(
    model: Model, shape: ModelShape, case: Case, recipes: Mapping[str, Recipe], chunk_tokens: int
) -> dict[str, float]:
    """Relative error of the final hidden state of the right answer's rows, over the cache that each recipe leaves.

    Args:
        recipes: label -> filled recipe.
        chunk_tokens: prompt rows whose attention is computed at once.

    Raises:
        InvalidRequest: a recipe wants attention's mass, which is not summed up here.
    """
    num_tokens, following = len(case.prompt_ids), case.answer_ids[:ANSWER_ROWS]
    full = Walk.begin(model, case.prompt_ids + following, num_tokens, chunk_tokens)
    wanted = as_head_reads(model, full.finish()[num_tokens:])
    found: dict[str, float] = {}
    for group in _groups(recipes):
        for label, cache in _prefilled(model, shape, case, {label: recipes[label] for label in group}, chunk_tokens):
            rows = answer_rows(model, cache, following, num_tokens)
            found[label] = relative_error(as_head_reads(model, rows), wanted)
    return {label: found[label] for label in recipes}


def answer_rows(model: Model, cache: SequenceCache, ids: Sequence[int], num_tokens: int) -> Tensor:
    """Known tokens behind a prompt of `num_tokens` through decode's forward pass, sealed where decode seals: rows
    [len(ids), D] behind the last layer."""
    at, done = torch.arange(num_tokens, num_tokens + len(ids), device=model.device), 0
    tokens, found = torch.tensor(ids, dtype=torch.int64, device=model.device), []
    while done < len(ids):
        if done:
            cache.seal(num_tokens + done)
        count = min(len(ids) - done, cache.rows_until_seal(num_tokens + done))
        part = slice(done, done + count)
        found.append(forward_rows(model, [Rows(tokens[part], at[part], cache, num_tokens)]))
        done += count
    return torch.cat(found)


@dataclass
class _Packing:
    """A candidate while the prompt runs."""

    compressor: Compressor
    cache: SequenceCache

    def take(self, obs: LayerObs) -> Tensor | None:
        """Pack a layer; returns the rows that go on, None = all."""
        encoded, selected = self.compressor.finish_layer(obs)
        for one in encoded:
            self.cache.add_layer(one)
        return selected


def _groups(recipes: Mapping[str, Recipe]) -> Iterator[list[str]]:
    """Labels of recipes that let the same rows go on, so many at a time as may hold memory at once."""
    alike: dict[object, list[str]] = {}
    for label, recipe in recipes.items():
        alike.setdefault((recipe.propagation, recipe.retrieval.chunk, recipe.window.sinks), []).append(label)
    for labels in alike.values():
        yield from (labels[begin : begin + MOST_CACHES] for begin in range(0, len(labels), MOST_CACHES))


def _prefilled(
    model: Model, shape: ModelShape, case: Case, recipes: Mapping[str, Recipe], chunk_tokens: int
) -> Iterable[tuple[str, SequenceCache]]:
    """The caches of recipes that let the same rows go on."""
    num_tokens = len(case.prompt_ids)
    packings = {}
    for label, recipe in recipes.items():
        compressor = make_compressor(recipe, shape)
        if compressor.wants_mass:
            raise InvalidRequest("--recipe", f"{recipe.name} wants all attention summed up", "other recipes")
        rope = lambda x, at: model.rotate(x, at, num_tokens)  # noqa: E731
        packings[label] = _Packing(compressor, make_cache(recipe, shape, num_tokens, rope))
    walk = Walk.begin(model, case.prompt_ids, num_tokens, chunk_tokens)
    for _ in range(model.config.num_layers):
        obs = walk.step()
        chosen = [packing.take(_copy(obs)) for packing in packings.values()]
        if chosen[0] is not None:
            walk = walk.branch(chosen[0])
    return [(label, packing.cache) for label, packing in packings.items()]


def _copy(obs: LayerObs) -> LayerObs:
    """A compressor takes keys and values over, and others are to see the same ones."""
    return replace(obs, k_pre=obs.k_pre.clone(), k=obs.k.clone(), v=obs.v.clone())
