"""What may be chosen, what each choice costs, and what a budget leaves of it. Free of torch.

A candidate is a few keys of a profile. Its recipe is what the recipe becomes under the model's profile with these keys
in it, so what is measured is what a service runs once the keys stand in the profile's file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from ...compression.recipe import ModelShape, Recipe, default_rank, fill, get_recipe, resolve
from ...compression.sizes import bound_nbytes, encoded_nbytes
from ...compression.slots import ChunkLandmarks, ProfileKeys, TspPropagation
from ...errors import InvalidRecipe, InvalidRequest
from ...models.config import ModelConfig
from ...services.prefill.flops import prompt_flops
from ..results import EXACT

PROPAGATION = ("layer", "rate", "window")
CACHE = ("key_codec", "chunk", "outliers", "recall")
KEYS = ("int2", "int4", "int8", "rank-0.156", "rank-0.25", "rank-0.375", "rank-0.5")
KEY_GROUP = 32  # rows that share a scale; a sealing block holds whole groups
BF16_BYTES = 2
MOST_LAYERS = 16  # to try for each rate, where none are asked for
ROW_WINDOWS, CHUNK_WINDOWS = (8, 32, 64), (64, 128)

Choice = Mapping[str, Any]
"""Keys of a profile and their values."""


@dataclass(frozen=True)
class Grid:
    """The values to try of each number; None = by the recipe and the budget."""

    layers: tuple[int, ...] | None
    rates: tuple[float, ...]
    windows: tuple[int, ...] | None
    recalls: tuple[float, ...]
    keys: tuple[str, ...]
    chunks: tuple[int, ...]
    outliers: tuple[int, ...]


@dataclass(frozen=True)
class Costs:
    """What a prompt takes by the engines' own count of shapes and the layout of what they pack; of several contexts
    the most.

    Attributes:
        prefill: operations ÷ those of `exact`.
        shipped: bytes of all encoded layers ÷ the cache in bf16.
        held: bytes that decode reserves for the prompt, landmarks included ÷ the cache in bf16.
    """

    prefill: float
    shipped: float
    held: float

    @property
    def together(self) -> float:
        """By what one candidate is cheaper than another; `held` decides where this does not."""
        return self.prefill + self.shipped


@dataclass(frozen=True)
class Candidate:
    """One choice.

    Attributes:
        recipe: every number filled in; None where they do not fit together or the model.
        refused: why it is none, or None.
    """

    label: str
    choice: Choice
    recipe: Recipe | None
    costs: Costs | None
    refused: str | None = None


@dataclass(frozen=True)
class Subject:
    """The model and the recipe that numbers are chosen for.

    Attributes:
        profile: complete, as it is now.
        recipe: numbers open.
        max_prefill, max_shipped: budgets.
    """

    config: ModelConfig
    shape: ModelShape
    profile: Mapping[str, Any]
    recipe: Recipe
    contexts: tuple[int, ...]
    max_prefill: float
    max_shipped: float

    def candidate(self, label: str, choice: Choice) -> Candidate:
        """The candidate of a choice, refused where it cannot be or a budget does not allow it."""
        try:
            recipe = fill(self.recipe, self.shape, {**self.profile, **choice})
            for context in self.contexts:
                short = resolve(recipe, self.shape, context, {}).fallback_reason
                if short is not None:
                    return Candidate(label, choice, recipe, None, f"would run exact: {short}")
        except InvalidRecipe as exc:
            return Candidate(label, choice, None, None, exc.message)
        costs = self.costs(recipe)
        return Candidate(label, choice, recipe, costs, self._over(costs))

    def costs(self, recipe: Recipe) -> Costs:
        """What prompts as long as the contexts take under a filled recipe."""
        exact = fill(get_recipe(EXACT), self.shape, {})
        prefill, shipped, held = [], [], []
        for num_tokens in self.contexts:
            whole = self.shape.bf16_kv_bytes(num_tokens)
            own, plain = (prompt_flops(self.config, self.shape, one, num_tokens).total for one in (recipe, exact))
            prefill.append(own / plain)
            shipped.append(encoded_nbytes(recipe, self.shape, num_tokens, BF16_BYTES) / whole)
            held.append(bound_nbytes(recipe, self.shape, num_tokens, 0, 1, BF16_BYTES) / whole)
        return Costs(max(prefill), max(shipped), max(held))

    def _over(self, costs: Costs) -> str | None:
        if costs.prefill > self.max_prefill:
            return f"takes {costs.prefill:.3f} of exact's prefill, the budget is {self.max_prefill:g}"
        if costs.shipped > self.max_shipped:
            return f"ships {costs.shipped:.3f} of the cache in bf16, the budget is {self.max_shipped:g}"
        return None

    @property
    def open(self) -> tuple[str, ...]:
        return open_numbers(self.recipe)

    def present(self) -> Candidate:
        """The numbers as they are now."""
        filled = fill(self.recipe, self.shape, self.profile)
        choice = _stated(self.recipe, filled)
        return self.candidate(label_of(choice, self.shape), choice)


def open_numbers(recipe: Recipe) -> tuple[str, ...]:
    """The numbers that a recipe leaves to the model's profile, of `PROPAGATION` and `CACHE`."""
    found = []
    propagation, retrieval = recipe.propagation, recipe.retrieval
    if isinstance(propagation, TspPropagation):
        found += [name for name in (*PROPAGATION, "recall") if getattr(propagation, name) is None]
    if isinstance(recipe.key_codec, ProfileKeys):
        found.append("key_codec")
    if isinstance(retrieval, ChunkLandmarks):
        found += [name for name in ("chunk", "outliers") if getattr(retrieval, name) is None]
    return tuple(found)


def key_of(recipe: Recipe, number: str) -> str:
    """The key of a profile that holds a number of this recipe."""
    if number in PROPAGATION:
        return f"{'tsp' if recipe.propagation.chunk_aligned else 'fastkv'}_{number}"
    return "tsp_recall" if number == "recall" else number


def propagations(subject: Subject, grid: Grid) -> list[Candidate]:
    """Every choice of where and how rows are selected, those that are refused included; none where the recipe leaves
    none of it open."""
    aligned = subject.recipe.propagation.chunk_aligned
    windows = grid.windows or (CHUNK_WINDOWS if aligned else ROW_WINDOWS)
    layers = grid.layers or tuple(range(max(1, subject.shape.num_layers - 1)))
    each = _each(subject, PROPAGATION, {"layer": layers, "rate": grid.rates, "window": windows})
    found = [_with_leanest(subject, one, grid) for one in each]
    if grid.layers is None and "layer" in subject.open:
        found = _thinned(found, key_of(subject.recipe, "layer"))
    return found


def caches(subject: Subject, grid: Grid, chosen: Choice) -> list[Candidate]:
    """Every choice of how rows are packed and read under a choice of propagation."""
    return list(_each_cache(subject, grid, chosen))


def _each_cache(subject: Subject, grid: Grid, chosen: Choice) -> Iterator[Candidate]:
    codecs = [key_codec(name, subject.shape) for name in grid.keys]
    values = {"key_codec": codecs, "chunk": grid.chunks, "outliers": grid.outliers, "recall": grid.recalls}
    return _each(subject, CACHE, values, chosen)


def allowed(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those that are not refused."""
    return [one for one in candidates if one.refused is None]


def require_some(candidates: Sequence[Candidate], what: str) -> None:
    """Refuse to go on with nothing to choose from.

    Raises:
        InvalidRequest: says what stands in the way of the candidate that comes nearest.
    """
    if allowed(candidates):
        return
    nearest = min(candidates, key=_distance)
    raise InvalidRequest(
        f"no {what} is left", f"{nearest.label} comes nearest and {nearest.refused}", "larger budgets, other values"
    )


def key_codec(name: str, shape: ModelShape) -> dict[str, Any]:
    """The slot that a name of `--keys` stands for."""
    if name.startswith("int"):
        return {"kind": "affine", "bits": int(name[3:]), "axis": "channel", "group": KEY_GROUP}
    share, _, bits = name.removeprefix("rank-").partition("x")
    return {"kind": "lowrank", "rank": default_rank(shape, float(share)), "bits": int(bits or 8)}


def label_of(choice: Choice, shape: ModelShape) -> str:
    """A short name: T19-r0.2-w64-int4-c4-o0."""
    parts = []
    for key, value in choice.items():
        if key == "key_codec":
            parts.append(_name_of(value, shape))
        elif key == "tsp_recall":
            parts += [f"recall{value:g}"] if value else []
        else:
            short = {"layer": "T", "rate": "r", "window": "w", "chunk": "c", "outliers": "o"}
            parts.append(f"{short[key.rpartition('_')[2]]}{value:g}")
    return "-".join(parts)


def _name_of(codec: Mapping[str, Any], shape: ModelShape) -> str:
    if codec["kind"] == "affine":
        return f"int{codec['bits']}"
    return f"rank{codec['rank']}x{codec['bits']}" if codec["kind"] == "lowrank" else str(codec["kind"])


def _stated(recipe: Recipe, filled: Recipe) -> dict[str, Any]:
    """The open numbers as a profile's keys, with the values that they have been filled with."""
    values: dict[str, Any] = {}
    for number in (*PROPAGATION, *CACHE):
        if number in open_numbers(recipe):
            slot = filled.propagation if number in (*PROPAGATION, "recall") else filled.retrieval
            value = filled.key_codec.to_dict() if number == "key_codec" else getattr(slot, number)
            values[key_of(recipe, number)] = value
    return values


def _each(
    subject: Subject, numbers: Sequence[str], values: Mapping[str, Sequence[Any]], more: Choice | None = None
) -> Iterator[Candidate]:
    """A candidate for each combination of the values of those numbers that are open; none where none is.

    Args:
        more: what else each of them has.
    """
    own = [number for number in numbers if number in subject.open]
    for combination in product(*(values[number] for number in own)) if own else ():
        choice = {key_of(subject.recipe, number): value for number, value in zip(own, combination, strict=True)}
        yield subject.candidate(label_of(choice, subject.shape), {**(more or {}), **choice})


def _with_leanest(subject: Subject, one: Candidate, grid: Grid) -> Candidate:
    """It is the rows that go on that are looked at here: where caches are to be chosen later, what a candidate of
    propagation ships is judged by the one of them that suits it, and it is refused where none does."""
    if one.costs is None or one.costs.prefill > subject.max_prefill:
        return one
    nearest: Candidate | None = None
    for cache in _each_cache(subject, grid, one.choice):
        if cache.refused is None:
            return replace(one, refused=None)
        if nearest is None or _distance(cache) < _distance(nearest):
            nearest = cache
    return one if nearest is None else replace(one, refused=f"with {nearest.label} {nearest.refused}")


def _distance(one: Candidate) -> tuple[bool, float]:
    """Of candidates that are refused, how far one is from being allowed."""
    return one.costs is None, one.costs.together if one.costs else 0.0


def _thinned(candidates: list[Candidate], key: str) -> list[Candidate]:
    """At most `MOST_LAYERS` of the layers that are allowed for the same other numbers, evenly, the deepest included;
    what is refused stays."""
    layers: dict[tuple[Any, ...], list[int]] = {}
    for one in allowed(candidates):
        layers.setdefault(_others(one, key), []).append(one.choice[key])
    kept = {others: set(_spread(sorted(own), MOST_LAYERS)) for others, own in layers.items()}
    return [one for one in candidates if one.refused is not None or one.choice[key] in kept[_others(one, key)]]


def _others(candidate: Candidate, key: str) -> tuple[Any, ...]:
    return tuple(value for name, value in candidate.choice.items() if name != key)


def _spread(values: list[int], most: int) -> list[int]:
    if len(values) <= most:
        return values
    return [values[round(place * (len(values) - 1) / (most - 1))] for place in range(most)]
