"""One process of an evaluation: the model, the samples and the scorer, and the records that come out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..compression.recipe import ModelShape, Recipe, fill
from ..errors import ConfigError, InvalidRequest, KvsluiceError
from ..kernels.dispatch import REFERENCE, forced
from ..models.checkpoint import locate
from ..models.loader import load_config, load_model
from ..models.model import Model
from ..models.profiles import load_profile
from ..models.tokenizer import load_tokenizer
from ..services.model_shape import model_shape
from .against import Reference
from .hits import HitScorer
from .options import PYTHON_TEXTS, EvalOptions
from .outcomes import Outcome
from .processes import check_device
from .results import EXACT
from .scoring import Scorer
from .suites import LEAST_CONTEXT, Case, NeedleGrid, Perplexity, Questions, Ruler, Suite, Unit
from .texts import TextMissing, heldout_texts, python_topics, token_ids
from .workfile import Record

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Plan:
    """What is evaluated, checked against the model; made before its weights are read.

    Attributes:
        recipes: label -> every number filled in for the model.
        texts: name -> SHA-256.
        units: in the order of work.
    """

    suite: Suite
    shape: ModelShape
    profile: Mapping[str, Any]
    recipes: Mapping[str, Recipe]
    texts: Mapping[str, str]
    tasks: tuple[str, ...]
    units: tuple[Unit, ...]


def make_plan(options: EvalOptions) -> Plan:
    """Read texts, tokenizer and configuration, and check the options against them.

    Raises:
        KvsluiceError: names the option and what it allows.
    """
    shape = model_shape(load_config(options.model))
    profile = load_profile(locate(options.model).name, shape, options.profile)
    recipes = {label: _filled(label, recipe, shape, profile) for label, recipe in options.recipes.items()}
    check_device(options.device)
    texts = _texts(options.texts)
    suite = _suite(options, texts)
    tasks = options.tasks or suite.tasks()
    _check_contexts(options, suite, shape)
    _check_samples(options, suite, tasks)
    if options.against and EXACT not in recipes:
        raise InvalidRequest("--against", "needs a recipe to compare with", f"{EXACT} among --recipe")
    return Plan(
        suite,
        shape,
        profile,
        recipes,
        {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()},
        tasks,
        tuple(suite.units(options.contexts, options.samples, tasks)),
    )


def torch_dtype(options: EvalOptions) -> torch.dtype:
    """The dtype that the options ask for, or the device's usual one."""
    if options.dtype is not None:
        return DTYPES[options.dtype]
    return torch.float32 if options.device == "cpu" else torch.bfloat16


def read_model(options: EvalOptions, device: str | None = None) -> Model:
    """The model that the options name."""
    return load_model(options.model, dtype=torch_dtype(options), device=device or options.device)


class Evaluator:
    """Runs units."""

    def __init__(self, options: EvalOptions, plan: Plan) -> None:
        self.model = read_model(options)
        self._options = options
        self._suite = plan.suite
        how = (self.model, plan.profile, plan.recipes, options.chunk_tokens)
        self._scorer = HitScorer(*how, max(options.contexts)) if options.suite == "prefix" else Scorer(*how)

    @cached_property
    def _reference(self) -> Reference:
        return Reference(self._options.model, self.model.dtype, self.model.device)

    def evaluate(self, units: Sequence[Unit]) -> list[Record]:
        """Run units together. A record is JSON: the unit's fields, `prompt_tokens`, `bf16_bytes`, `outcomes` by label,
        and where it is asked for what transformers says, under `reference`.

        Raises:
            KvsluiceError: whatever the engines fail with.
        """
        cases = [self._suite.case(unit) for unit in units]
        try:
            with forced(REFERENCE) if self._options.kernels == REFERENCE else nullcontext():
                scored = self._scorer.score(cases)
            return [self._record(*one) for one in zip(units, cases, scored, strict=True)]
        except torch.OutOfMemoryError as exc:
            raise KvsluiceError("the device is out of memory: fewer --processes, a smaller --batch") from exc

    def _record(self, unit: Unit, case: Case, outcomes: Mapping[str, Outcome]) -> Record:
        num_tokens = len(case.prompt_ids)
        record: Record = {
            "context": unit.context,
            "sample": unit.sample,
            "task": unit.task,
            "depth": unit.depth,
            "prompt_tokens": num_tokens,
            "bf16_bytes": self._scorer.shape.bf16_kv_bytes(num_tokens),
            "outcomes": {
                label: {
                    "score": outcome.score,
                    "turns": list(outcome.turns),
                    "payload_bytes": outcome.payload_bytes,
                    "resident_bytes": outcome.resident_bytes,
                    "prefill_flops": outcome.prefill_flops,
                    "fallback": outcome.fallback,
                    "hits": [asdict(hit) for hit in outcome.hits],
                }
                for label, outcome in outcomes.items()
            },
        }
        if self._options.against:
            record["reference"] = self._reference.judge(case, outcomes[EXACT])
        return record


def _filled(label: str, recipe: Recipe, shape: ModelShape, profile: Mapping[str, Any]) -> Recipe:
    try:
        return fill(recipe, shape, profile)
    except InvalidRequest as exc:
        raise InvalidRequest(f"--recipe {label}", f"{exc.field}: {exc.problem}", exc.allowed) from exc


def _texts(texts: str) -> dict[str, str]:
    if texts == PYTHON_TEXTS:
        return {"python-topics": python_topics()}
    try:
        return heldout_texts(Path(texts))
    except TextMissing as exc:
        raise ConfigError(f"--texts: {exc}; or give --texts {PYTHON_TEXTS}") from exc


def _suite(options: EvalOptions, texts: Mapping[str, str]) -> Suite:
    encode = load_tokenizer(options.model).encode
    ids = {name: token_ids(encode, text) for name, text in texts.items()}
    if empty := [name for name, tokens in ids.items() if not tokens]:
        raise ConfigError(f"--texts: {', '.join(empty)} in {options.texts} holds nothing")
    if options.suite == "ruler":
        return Ruler(encode, ids, options.seed)
    if options.suite in ("multiturn", "prefix"):
        return Questions(encode, ids, options.seed, apart=options.suite == "prefix")
    if options.suite == "niah":
        return NeedleGrid(encode, ids, options.seed, options.depths)
    suite = Perplexity(ids, options.seed, options.scored_tokens)
    for task in options.tasks or ():
        if task not in ids:
            raise InvalidRequest("--task", repr(task[:64]), ", ".join(ids))
    shortest = min(len(ids[task]) for task in options.tasks or ids)
    if suite.num_tokens(max(options.contexts)) > shortest:
        raise InvalidRequest(
            "--context", str(max(options.contexts)), f"at most {shortest - suite.num_tokens(0)}, the shortest text"
        )
    return suite


def _check_contexts(options: EvalOptions, suite: Suite, shape: ModelShape) -> None:
    extra = suite.num_tokens(0) if isinstance(suite, Perplexity) else 0
    most = shape.max_position_embeddings - extra
    for context in options.contexts:
        if context > most:
            why = f" less the {extra} that are judged" if extra else ""
            raise InvalidRequest("--context", str(context), f"at most {most}, the model's positions{why}")


def _check_samples(options: EvalOptions, suite: Suite, tasks: Sequence[str]) -> None:
    """The first sample of every place must be as long as it is called; some tasks need room for several facts."""
    if isinstance(suite, Perplexity):
        return
    for unit in suite.units(options.contexts, 1, tasks):
        if not _has_room(suite, unit):
            sizes = (LEAST_CONTEXT << step for step in range(8))
            enough = next((size for size in sizes if _has_room(suite, replace(unit, context=size))), None)
            allowed = "other tasks" if enough is None else f"more, {enough} are enough; or other tasks"
            raise InvalidRequest("--context", f"{unit.context} has no room for {unit.task}", allowed)


def _has_room(suite: Suite, unit: Unit) -> bool:
    try:
        case = suite.case(unit)
    except ValueError:
        return False
    return len(case.prompt_ids) + len(case.following_ids) <= unit.context
