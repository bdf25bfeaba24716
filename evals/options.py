"""What `kvsluice eval` can be told: one list of options, for both of its command lines, checked in one place.

Nothing here loads torch, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..compression.recipe import Recipe, get_recipe
from ..errors import InvalidRecipe, InvalidRequest
from ..models.checkpoint import DEFAULT_MODEL
from .results import EXACT, TRANSFORMERS
from .suites import LEAST_CONTEXT, NEEDLE, SUITE_NAMES
from .tasks import SUITE
from .texts import DEFAULT_FOLDER
from .turn_tasks import TURN_SUITE

DTYPES = ("float32", "bfloat16", "float16")
KERNELS = ("auto", "reference")
PYTHON_TEXTS = "python"
MOST_SAMPLES = 10_000
MOST_PROCESSES = 64
OF_SUITE = {"depth": "niah", "scored_tokens": "ppl"}  # options of one suite alone
T = TypeVar("T")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Option:
    """One option of the command.

    Attributes:
        default: as it would be typed; "" = none.
        several: may be given more than once.
        flag: takes no value.
    """

    name: str
    metavar: str
    help: str
    default: str = ""
    several: bool = False
    flag: bool = False

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")

    @property
    def full_help(self) -> str:
        return self.help + (f"; default: {self.default}" if self.default else "")


OPTIONS = (
    Option(
        "suite",
        "|".join(SUITE_NAMES),
        "ruler: eleven RULER-style tasks; multiturn: five questions over one document that is prefilled once; prefix: "
        "the same questions as prompts of their own, which find the document of the first; niah: one needle over depth "
        "and context; ppl: nats a token of held-out text, which rewards recency: a recipe that forgets all but the end "
        "does well there",
        "ruler",
    ),
    Option("model", "MODEL", "built-in name, Hugging Face folder or .gguf file", DEFAULT_MODEL),
    Option("profile", "FILE", "numbers calibrated for the model, as `kvsluice calibrate` writes them; default: what "
           "comes with kvsluice for the model"),
    Option("recipe", "A,B", "recipes or presets, with commas between them; may be given several times", EXACT,
           several=True),
    Option(
        "variant",
        "LABEL=RECIPE:{SLOTS}",
        "a recipe with other slots, as JSON, under a label of its own; may be given several times",
        several=True,
    ),
    Option("context", "N,N", "tokens of a prompt and its answer, about", "4096"),
    Option("samples", "N", "samples a task, context and depth, the same ones for every recipe", "10"),
    Option("seed", "N", "other seeds draw other samples; 0 draws those of the adapter's training report", "0"),
    Option("json", "FILE", "write the results to this file; beside it FILE.work.jsonl holds what is done already, so "
           "that the same command goes on where one was stopped"),
    Option("fresh", "", "begin anew, whatever is done already", flag=True),
    Option("task", "A,B", "only these tasks; for ppl, texts"),
    Option("depth", "D,D", "niah: shares of the text in front of the needle, from 0 to 1",
           "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1"),
    Option("scored-tokens", "N", "ppl: tokens judged after the context", "512"),
    Option("texts", "FOLDER", f"what scripts/fetch_texts.sh filled (its folder heldout/ is enough); `{PYTHON_TEXTS}` "
           "takes the topics of Python's help instead, whose wording the adapter partly saw in training",
           str(DEFAULT_FOLDER)),
    Option("device", "cpu|cuda|cuda:N", "where the model runs; processes under cuda take the visible GPUs in turn",
           "cpu"),
    Option("dtype", "|".join(DTYPES), "of weights and computation; default: float32 on a CPU, else bfloat16"),
    Option("batch", "N", "samples whose answers run together, each under all recipes", "1"),
    Option("processes", "N", "processes that share the work and the device, each with the model loaded; several keep a "
           "GPU busy", "1"),
    Option("chunk-tokens", "N", "prompt rows of a work item of prefill; default: 512 on a CPU and for the suite "
           "prefix, else 8192"),
    Option("kernels", "|".join(KERNELS), "which implementation of the engines' operations runs: the compiled ones "
           "where the device has them, or plain torch everywhere", KERNELS[0]),
    Option("against", TRANSFORMERS, "also score transformers' own model and say where `exact` differs from it"),
    Option("commit", "TEXT", "the commit to record where the checkout cannot say"),
)  # fmt: skip


@dataclass(frozen=True)
class EvalOptions:
    """Checked options; what only the model can say (a context that it can take, slots that fit it) is checked later.

    Attributes:
        recipes: label -> recipe, numbers open.
        tasks: those asked for, or None for all of the suite.
        json: where the results go, or None.
    """

    suite: str
    model: str
    profile: Path | None
    recipes: Mapping[str, Recipe]
    contexts: tuple[int, ...]
    samples: int
    seed: int
    json: Path | None
    fresh: bool
    tasks: tuple[str, ...] | None
    depths: tuple[float, ...]
    scored_tokens: int
    texts: str
    device: str
    dtype: str | None
    batch: int
    processes: int
    chunk_tokens: int | None
    kernels: str
    against: bool
    commit: str | None


def parse_options(given: Mapping[str, Any]) -> EvalOptions:
    """Check what was typed.

    Args:
        given: option keys to text, to lists of text where an option may be given several times, to bool for flags;
            None or absent = the default.

    Raises:
        InvalidRequest: names the option and what it allows.
    """
    text: dict[str, Any] = {one.key: one.default for one in OPTIONS}
    text |= {key: value for key, value in given.items() if value is not None}
    suite = one_of("suite", text["suite"], SUITE_NAMES)
    for key, own in OF_SUITE.items():
        if suite != own and given.get(key) is not None:
            raise InvalidRequest(f"--{key.replace('_', '-')}", f"is of no use to --suite {suite}", f"--suite {own}")
    if suite == "prefix" and text["against"]:
        raise InvalidRequest("--against", "is of no use to --suite prefix", "another suite")
    json_file = Path(text["json"]) if text["json"] else None
    if json_file is not None:
        check_results_file(json_file)
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", text["device"]):
        raise InvalidRequest("--device", repr(text["device"]), "cpu, cuda, cuda:N")
    contexts = listed("context", text["context"])
    return EvalOptions(
        suite=suite,
        model=text["model"],
        profile=Path(text["profile"]) if text["profile"] else None,
        recipes=_recipes(_joined(text["recipe"]), given.get("variant") or []),
        contexts=apart("context", [whole("context", one, LEAST_CONTEXT, 1 << 20) for one in contexts]),
        samples=whole("samples", text["samples"], 1, MOST_SAMPLES),
        seed=whole("seed", text["seed"], 0, 1 << 32),
        json=json_file,
        fresh=bool(given.get("fresh")),
        tasks=_tasks(suite, text["task"]),
        depths=apart("depth", [share("depth", one) for one in listed("depth", text["depth"])]),
        scored_tokens=whole("scored-tokens", text["scored_tokens"], 1, 1 << 16),
        texts=text["texts"],
        device=text["device"],
        dtype=one_of("dtype", text["dtype"], DTYPES) if text["dtype"] else None,
        batch=whole("batch", text["batch"], 1, 1024),
        processes=whole("processes", text["processes"], 1, MOST_PROCESSES),
        chunk_tokens=whole("chunk-tokens", text["chunk_tokens"], 1, 1 << 20) if text["chunk_tokens"] else None,
        kernels=one_of("kernels", text["kernels"], KERNELS),
        against=bool(text["against"]) and bool(one_of("against", text["against"], (TRANSFORMERS,))),
        commit=text["commit"] or None,
    )


def check_results_file(path: Path) -> None:
    """Refuse a name that is no results file's.

    Raises:
        InvalidRequest: says what it must be.
    """
    if path.is_dir() or path.suffix != ".json":
        raise InvalidRequest("--json", repr(str(path)), "a file whose name ends in .json")


def argument_parser() -> argparse.ArgumentParser:
    """The options as argparse takes them, for machines without the command line's library."""
    parser = argparse.ArgumentParser(prog="kvsluice eval", allow_abbrev=False)
    for option in OPTIONS:
        kind: dict[str, Any] = {"metavar": option.metavar}
        if option.flag:
            kind = {"action": "store_true"}
        elif option.several:
            kind["action"] = "append"
        parser.add_argument(f"--{option.name}", help=option.full_help.replace("%", "%%"), default=None, **kind)
    return parser


def _recipes(names: str, variants: Sequence[str]) -> dict[str, Recipe]:
    found: dict[str, Recipe] = {}
    for name in listed("recipe", names):
        recipe = _checked("recipe", lambda name=name: get_recipe(name))  # type: ignore[misc]
        _add(found, "recipe", recipe.name, recipe)
    for variant in variants:
        label, equals, rest = variant.partition("=")
        name, _, slots = rest.partition(":")
        if not equals or not _LABEL.fullmatch(label):
            raise InvalidRequest("--variant", repr(variant[:64]), "LABEL=RECIPE:{slots as JSON}")
        recipe = _checked("variant", lambda name=name, slots=slots: get_recipe(name, slots))  # type: ignore[misc]
        _add(found, "variant", label, recipe)
    return found


def _add(found: dict[str, Recipe], option: str, label: str, recipe: Recipe) -> None:
    if label in found or label == TRANSFORMERS or (label == EXACT and recipe != get_recipe(EXACT)):
        raise InvalidRequest(f"--{option}", f"{label!r} is taken", "labels that differ")
    found[label] = recipe


def _checked(option: str, make: Callable[[], Recipe]) -> Recipe:
    try:
        return make()
    except InvalidRecipe as exc:
        raise InvalidRequest(f"--{option}", f"{exc.field}: {exc.problem}", exc.allowed) from exc


def _joined(names: str | Sequence[str]) -> str:
    """What was typed at once or several times, as it would be typed at once."""
    return names if isinstance(names, str) else ",".join(names)


def _tasks(suite: str, text: str) -> tuple[str, ...] | None:
    if not text:
        return None
    names = listed("task", text)
    known = {"ruler": tuple(SUITE), "multiturn": tuple(TURN_SUITE), "prefix": tuple(TURN_SUITE), "niah": (NEEDLE,)}.get(
        suite
    )
    return names if known is None else tuple(one_of("task", name, known) for name in names)


def listed(option: str, text: str) -> tuple[str, ...]:
    """Values with commas between them, all different.

    Raises:
        InvalidRequest: names the option.
    """
    items = tuple(item.strip() for item in text.split(","))
    if not all(items):
        raise InvalidRequest(f"--{option}", repr(text[:64]), "values with commas between them")
    return apart(option, items)


def apart(option: str, values: Sequence[T]) -> tuple[T, ...]:
    """Values that must differ.

    Raises:
        InvalidRequest: two are the same.
    """
    if len(set(values)) < len(values):
        raise InvalidRequest(f"--{option}", repr(",".join(map(str, values))[:64]), "values that differ")
    return tuple(values)


def one_of(option: str, text: str, allowed: Sequence[str]) -> str:
    """One of the allowed words.

    Raises:
        InvalidRequest: lists them.
    """
    if text not in allowed:
        raise InvalidRequest(f"--{option}", repr(text[:64]), ", ".join(allowed))
    return text


def whole(option: str, text: str, low: int, high: int) -> int:
    """A whole number in a range.

    Raises:
        InvalidRequest: says which range.
    """
    if not re.fullmatch(r"[0-9]{1,12}", text) or not low <= int(text) <= high:
        raise InvalidRequest(f"--{option}", repr(text[:64]), f"a whole number from {low} to {high}")
    return int(text)


def share(option: str, text: str) -> float:
    """A number from 0 to 1.

    Raises:
        InvalidRequest: it is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:  # NaN is in no range
        raise InvalidRequest(f"--{option}", repr(text[:64]), "numbers from 0 to 1")
    return value
