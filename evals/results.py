"""The file that `kvsluice eval` writes, and its one reader and writer.

One JSON file a run. It says which model, adapter and recipes ran where, so that a figure of speed and one of accuracy
that are quoted together can be checked to be about the same thing: both carry the recipe's fingerprint.

    environment  hardware, versions, commit
    suite        ruler, multiturn, prefix, niah or ppl
    model        name, fingerprint, adapter, dtype
    settings     contexts, samples, seed, tasks, texts by name with their SHA-256, how answers were judged
    recipes      label -> name, fingerprint and slots of the resolved recipe
    cells        scores of every sample, in order of the sample's index, so that samples pair up between recipes
    summary      means with 95 % bootstrap intervals
    against      how `exact` compares with transformers sample by sample, where that was asked for

Where a run compares with transformers, `cells` and `summary` hold the label `transformers` too; it is no recipe, so
`recipes` does not, and its bytes are 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InvalidRequest

AVERAGE = "average"
EXACT = "exact"
TRANSFORMERS = "transformers"
MAX_FILE_BYTES = 256 << 20

T = TypeVar("T")


@dataclass(frozen=True)
class EvaluatedModel:
    """What was evaluated.

    Attributes:
        fingerprint: the one that frames carry.
        adapter: SHA-256 of the low-rank adapter's weights, or None where none was merged.
        dtype: of weights and computation, such as `bfloat16`.
    """

    name: str
    fingerprint: str
    adapter: str | None
    dtype: str


@dataclass(frozen=True)
class EvaluatedRecipe:
    """A recipe as it ran.

    Attributes:
        name: of the recipe that was asked for.
        fingerprint: of the resolved recipe; the one that frames carry.
        slots: the resolved recipe.
    """

    name: str
    fingerprint: str
    slots: Mapping[str, Any]


@dataclass(frozen=True)
class FoundPrefix:
    """What prompts found of earlier ones' beginnings, and what they gave beside the same prompts run whole; means.

    Attributes:
        cached_share: of the prompts' tokens, that were not run.
        flops_share: operations of prefill, as a share of those of the prompts that ran whole.
        unlike: samples whose likeliest tokens are not those of the prompt that ran whole.
    """

    cached_share: float
    flops_share: float
    unlike: int


@dataclass(frozen=True)
class Cell:
    """All samples of one recipe, context and task (and needle depth, or turn of a conversation).

    Attributes:
        recipe: its label.
        context: tokens of a prompt and its answer, about.
        depth: share of the text in front of the needle, or None.
        scores: one a sample, by the sample's index. Share of right answers, or nats a token (less is better).
        prompt_tokens: mean length of the prompts.
        payload_bytes: mean bytes of the frames that went from prefill to decode.
        resident_bytes: mean bytes of the prompt's cache on decode, before the answer.
        bf16_bytes: mean bytes of the prompt's whole KV cache in bfloat16.
        fallbacks: samples that ran `exact` instead, being too short for the recipe.
        fallback_reason: of the first of them.
        prefill_flops: mean floating-point operations of prefill, as the engine counted them; None in older files.
        turn: from 1, of a conversation or of prompts over one document; None where there is but one.
        hit: what a prompt of this turn found of an earlier one's beginning; None where nothing was looked for.
    """

    recipe: str
    context: int
    task: str
    depth: float | None
    scores: tuple[float, ...]
    prompt_tokens: float
    payload_bytes: float
    resident_bytes: float
    bf16_bytes: float
    fallbacks: int
    fallback_reason: str | None = None
    prefill_flops: float | None = None
    turn: int | None = None
    hit: FoundPrefix | None = None


@dataclass(frozen=True)
class Summary:
    """A mean with its 95 % interval.

    Attributes:
        task: a task, or `average` for the mean of the tasks' (and depths', and turns') means.
        difference: mean difference to `exact` over the same samples; None where `exact` did not run.
        turn: whose mean this is; None = of all turns, or of the one that there is.
    """

    recipe: str
    context: int
    task: str
    depth: float | None
    mean: float
    low: float
    high: float
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    turn: int | None = None


@dataclass(frozen=True)
class TokenDifference:
    """The first answer token at which `exact` and transformers part.

    Attributes:
        token: index in the answer, or in the answers of all turns, one after another.
        answer, exact, transformers: token ids: the right one, and what each would have said.
        gap: by how much transformers' best logit there lies above its second best.
        exact_gap: by how much it lies above that of the token that `exact` chose.
    """

    context: int
    task: str
    depth: float | None
    sample: int
    token: int
    answer: int
    exact: int
    transformers: int
    gap: float
    exact_gap: float


@dataclass(frozen=True)
class Agreement:
    """`exact` against transformers, sample by sample.

    Attributes:
        samples: how many were compared.
        equal_scores: samples on which both score the same.
        equal_tokens: samples on which both choose the same token everywhere; None for perplexity, which has none.
        differences: of the other samples, where they part.
    """

    samples: int
    equal_scores: int
    equal_tokens: int | None
    differences: tuple[TokenDifference, ...]


@dataclass(frozen=True)
class EvalResults:
    """A run of `kvsluice eval`; the module's docstring says what each part holds."""

    environment: Mapping[str, Any]
    suite: str
    model: EvaluatedModel
    settings: Mapping[str, Any]
    recipes: Mapping[str, EvaluatedRecipe]
    cells: tuple[Cell, ...]
    summary: tuple[Summary, ...]
    against: Agreement | None = None


def save(path: Path, results: EvalResults) -> None:
    """Write the file; see `save_json`."""
    save_json(path, asdict(results))


def save_json(path: Path, results: Mapping[str, Any]) -> None:
    """Write a file of results, whole or not at all.

    Raises:
        InvalidRequest: it cannot be written.
    """
    save_text(path, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def save_text(path: Path, text: str, option: str = "--json") -> None:
    """Write a file, whole or not at all.

    Args:
        option: that named it.

    Raises:
        InvalidRequest: it cannot be written.
    """
    with _refusing(path, option):
        _write_beside(path, text).replace(path)


def check_writable(path: Path, option: str = "--json") -> None:
    """Make sure that a file can be written, before any work.

    Args:
        option: that named it.

    Raises:
        InvalidRequest: it cannot.
    """
    with _refusing(path, option):
        _write_beside(path, "").unlink()


def _write_beside(path: Path, text: str) -> Path:
    beside = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text(text, encoding="utf-8")
    return beside


@contextmanager
def _refusing(path: Path, option: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise InvalidRequest(option, f"cannot write {path}: {exc.strerror}", "a file that can be written") from exc


def load(path: Path) -> EvalResults:
    """Read a file that `save` wrote.

    Raises:
        InvalidRequest: there is no such file, or it is something else.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidRequest("results", f"{path} is too large", f"at most {MAX_FILE_BYTES} bytes")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise InvalidRequest("results", f"cannot read {path}", "a file that `kvsluice eval` wrote") from exc
    try:
        return _from_json(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise InvalidRequest("results", f"{path} holds something else", "a file that `kvsluice eval` wrote") from exc


def _from_json(raw: Any) -> EvalResults:
    parts = dict(raw)
    against = parts.pop("against", None)
    if against is not None:
        differences = tuple(_record(TokenDifference, one) for one in against["differences"])
        against = _record(Agreement, {**against, "differences": differences})
    parts["model"] = _record(EvaluatedModel, parts["model"])
    parts["recipes"] = {label: _record(EvaluatedRecipe, one) for label, one in parts["recipes"].items()}
    parts["cells"] = tuple(map(_cell, parts["cells"]))
    parts["summary"] = tuple(_record(Summary, one) for one in parts["summary"])
    return _record(EvalResults, {**parts, "against": against})


def _cell(raw: Mapping[str, Any]) -> Cell:
    hit = raw.get("hit")
    found = None if hit is None else _record(FoundPrefix, hit)
    return _record(Cell, {**raw, "scores": tuple(raw["scores"]), "hit": found})


def _record(kind: type[T], raw: Mapping[str, Any]) -> T:
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := raw.keys() - known:
        raise ValueError(f"unknown {sorted(unknown)}")
    return kind(**raw)
