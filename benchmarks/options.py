"""What `kvsluice bench` can be told: one list of options for each part, for both command lines, checked in one place.

What an evaluation takes as well is checked by its own checks, so that recipes, contexts and devices are named and
refused alike. Nothing here loads torch, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ..compression.recipe import Recipe
from ..compression.slots import ChunkLandmarks
from ..errors import InvalidRequest
from ..evals.options import DTYPES, Option
from ..evals.options import parse_options as parse_eval_options
from ..evals.results import EXACT, TRANSFORMERS

MAX_BATCH = "max"
SYNTHETIC, PREFILL = "synthetic", "prefill"
MOST_BATCH = 4096
LEAST_RATE = 1e-9  # lets a count of tokens alone decide how much is selected

T = TypeVar("T")

_MODEL = Option("model", "MODEL", "name of a shape, built-in name, Hugging Face folder or .gguf file", "llama-3.1-8b")
_WARMUP = Option("warmup", "N", "repetitions that are not counted", "2")
_COMMON = (
    Option("device", "cpu|cuda|cuda:N", "where everything runs; default: cuda where there is one"),
    Option("dtype", "|".join(DTYPES), "of weights and computation; default: float32 on a CPU, else bfloat16"),
    Option("seed", "N", "of weights, prompts and synthetic KV", "0"),
    Option("json", "FILE", "write the results to this file"),
    Option("commit", "TEXT", "the commit to record where the checkout cannot say"),
)
_REPEATS = Option("repeats", "N", "repetitions whose median and quartiles are reported", "5")
_WEIGHTS = Option("random-weights", "", "draw weights of the model's shape instead of reading any", flag=True)
_RECIPES = (
    Option("recipe", "A,B", "recipes or presets, with commas between them; may be given several times", EXACT,
           several=True),
    Option("variant", "LABEL=RECIPE:{SLOTS}", "a recipe with other slots, as JSON, under a label of its own; may be "
           "given several times", several=True),
    Option("selected", "N", "tokens that a decode step attends to per KV head, for recipes that select chunks; "
           "default: the recipe's own"),
)  # fmt: skip
_CONTEXT = Option("context", "N,N", "tokens of a prompt", "8192")
_CHUNK = Option("chunk-tokens", "N", "prompt rows of a work item; default: 8192 on a GPU, 512 on a CPU")
_BASELINE = Option("baseline", TRANSFORMERS, "also measure stock transformers with the same weights")
_PROFILE = Option("profile", "", "also record on which kinds of work a GPU spends its time, in further repetitions",
                  flag=True)  # fmt: skip
_KV = Option("kv", f"{SYNTHETIC}|{PREFILL}", "what caches hold: numbers drawn at random in the recipe's format, or "
             "what prefill makes of random prompts", SYNTHETIC)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One of the things to measure.

    Attributes:
        summary: what it measures, in one line.
    """

    summary: str
    options: tuple[Option, ...]


PARTS: Mapping[str, Part] = {
    "prefill": Part(
        "Time to the first token through the prefill engine, against transformers.",
        (_MODEL, _WEIGHTS, *_RECIPES, _CONTEXT,
         Option("batch", "N,N", "prompts that arrive together and share packs", "1"),
         Option("beside", "N", "also let a prompt of N tokens arrive while each one runs: its time to first token "
                "beside it and alone"),
         Option("copy-out", "", "also with every layer packed into frames on the host meanwhile", flag=True),
         _CHUNK,
         Option("pack-tokens", "N", "prompt rows of a step; default: 2048, or a work item's where that is more"),
         _BASELINE, _PROFILE, _REPEATS, _WARMUP, *_COMMON),
    ),
    "decode": Part(
        "Steps of the decode engine over compressed caches, against transformers.",
        (_MODEL, _WEIGHTS, *_RECIPES, _CONTEXT,
         Option("batch", f"N,{MAX_BATCH}", "sequences in a step; max = the most whose reservations fit", "1"),
         _KV, Option("hit-rate", "D,D", "share of the chosen chunks that stay chosen from one step to the next, for "
                     "recipes that select chunks; default: whatever the queries choose"),
         Option("share-prompt", "", "all sequences are choices of one prompt and share its memory", flag=True),
         Option("steps", "N", "steps whose median and quartiles are reported, and whose mean gives tokens a second; a "
                "multiple of what a recipe seals at once", "32"),
         Option("cache-gib", "GIB", "memory for caches; default: 0.9 of what is free on a GPU, 2 on a CPU"),
         Option("kv-offloading-gib", "GIB", "host memory that values lie in where their recipe reads them in parts; "
                "default: none"),
         _CHUNK, _BASELINE, _PROFILE,
         # the first steps make what later ones reuse
         replace(_WARMUP, help="steps that are not counted", default="8"), *_COMMON),
    ),
    "handoff": Part(
        "Encoded layers to frames, to layers again, into a decode cache; bytes against bf16.",
        (_MODEL, _WEIGHTS, *_RECIPES, _CONTEXT, _KV, _CHUNK, _REPEATS, _WARMUP, *_COMMON),
    ),
    "tiers": Part(
        "Decode of more sequences than the device's pool holds, which take turns there.",
        (_MODEL, _WEIGHTS, *_RECIPES, _CONTEXT, _KV,
         Option("load", "N,N", "times as many sequences as the pool holds", "1,2,4,8"),
         Option("kv-pool-gib", "GIB", "memory of the device for caches", "1"),
         Option("kv-offloading-gib", "GIB", "host memory for values and for sequences that are not on the device", "4"),
         Option("time-slice", "N", "steps that a sequence may have before it makes room", "128"),
         Option("most-rows", "N", "rows of a step, at most; default: as many as the pool holds sequences"),
         Option("steps", "N", "steps that are timed, at least; and one slice of every sequence", "128"),
         _CHUNK, replace(_WARMUP, help="steps that are not counted", default="8"), *_COMMON),
    ),
    "service": Part(
        "Streams of a running service, as its clients see them, against the decode engine alone.",
        (replace(_MODEL, help="the model that is served; its shape alone is read"),
         replace(_WEIGHTS, help="let the results say that the service has random weights"),
         Option("address", "HOST:PORT", "where the service listens", "127.0.0.1:8033"), *_RECIPES, _CONTEXT,
         Option("batch", "N,N", "streams at once", "1"),
         Option("steps", "N", "tokens of each stream that are counted", "256"),
         Option("new-tokens", "N", "tokens that each request may have; streams are cancelled when enough are counted",
                "2048"),
         Option("against", "FILE", "results of bench decode; rows of the same recipe, context and batch are compared"),
         replace(_WARMUP, help="tokens of each stream that are not counted", default="8"), *_COMMON),
    ),
    "failover": Part(
        "Next token behind the loss of a decode worker, from the store against the prompt run again.",
        (_MODEL, _WEIGHTS, *_RECIPES, _CONTEXT,
         Option("cache-gib", "GIB", "memory for caches of each decode worker; default: 1"),
         replace(_REPEATS, default="3"),
         replace(_WARMUP, help="losses of each side that are not counted", default="0"), *_COMMON),
    ),
    "store": Part(
        "Values of requests to a store and back, against the client library alone and redis-benchmark.",
        (replace(_MODEL, help="the model whose rows are written; its shape alone is read"), _CONTEXT,
         Option("batch", "N,N", "operations, and connections, at once", "1,8"),
         Option("steps", "N", "operations of a repetition", "64"), _REPEATS, _WARMUP, *_COMMON),
    ),
    "kernels": Part(
        "Every operation of kernels/ at a model's shapes, against its torch reference and the device's limits.",
        (replace(_MODEL, metavar="MODEL,MODEL", default="llama-3.1-8b,smollm2-135m"), _CONTEXT, _REPEATS, _WARMUP,
         *_COMMON),
    ),
}  # fmt: skip


_OF_EVALUATIONS = ("recipe", "variant", "context", "seed", "json", "device", "dtype", "chunk_tokens", "commit")


@dataclass(frozen=True)
class BenchOptions:
    """Checked options; what only model and device can say is checked later. Options that a part does not have are at
    their defaults.

    Attributes:
        models: one, or for `kernels` several.
        recipes: label -> recipe, numbers open, `selected` applied.
        batches: None = the most that fit.
        hit_rates: None = not forced.
        beside: tokens of a prompt that arrives beside the measured ones, or None.
        address, new_tokens: of a running service, and how many tokens its answers may have.
        against: results of the decode engine alone to compare with, or None.
        baseline: whether transformers is measured.
        profile: whether times by kind of work are recorded; of a GPU only.
        device, dtype, chunk_tokens, pack_tokens, cache_gib: None = chosen by the device.
        offloading_gib: host memory for values, and for sequences that are parked, or None.
        loads: sequences over those that the pool holds.
        time_slice: steps of a sequence's turn.
        most_rows: of a step; None = as many as the pool holds sequences.
    """

    part: str
    models: tuple[str, ...]
    random_weights: bool
    recipes: Mapping[str, Recipe]
    contexts: tuple[int, ...]
    batches: tuple[int | None, ...]
    kv: str
    hit_rates: tuple[float | None, ...]
    share_prompt: bool
    steps: int
    warmup: int
    repeats: int
    beside: int | None
    copy_out: bool
    chunk_tokens: int | None
    pack_tokens: int | None
    cache_gib: float | None
    offloading_gib: float | None
    loads: tuple[int, ...]
    time_slice: int
    most_rows: int | None
    address: str
    new_tokens: int
    against: Path | None
    baseline: bool
    profile: bool
    device: str | None
    dtype: str | None
    seed: int
    json: Path | None
    commit: str | None


def parse_options(part: str, given: Mapping[str, Any]) -> BenchOptions:
    """Check what was typed.

    Args:
        part: one of `PARTS`.
        given: option keys to text, to lists of text where an option may be given several times, to bool for flags;
            None or absent = the default.

    Raises:
        InvalidRequest: names the option and what it allows.
    """
    if part not in PARTS:
        raise InvalidRequest("part", repr(part[:64]), ", ".join(PARTS))
    text: dict[str, Any] = {one.key: one.default for one in PARTS[part].options}
    text |= {key: value for key, value in given.items() if value is not None}
    checked = parse_eval_options({key: text[key] for key in _OF_EVALUATIONS if text.get(key)})
    selected = _optional(text.get("selected"), lambda one: _whole("selected", one, 1, 1 << 20))
    return BenchOptions(
        part=part,
        models=_listed("model", text["model"]) if part == "kernels" else (text["model"],),
        random_weights=bool(text.get("random_weights")),
        recipes={label: _selecting(recipe, selected) for label, recipe in checked.recipes.items()},
        contexts=checked.contexts,
        batches=_batches(part, text.get("batch", "1")),
        kv=_one_of("kv", text.get("kv", SYNTHETIC), (SYNTHETIC, PREFILL)),
        hit_rates=_hit_rates(text.get("hit_rate")),
        share_prompt=bool(text.get("share_prompt")),
        steps=_whole("steps", text.get("steps", "1"), 1, 1 << 16),
        warmup=_whole("warmup", text["warmup"], 0, 1 << 16),
        repeats=_whole("repeats", text.get("repeats", "1"), 1, 1 << 16),
        beside=_optional(text.get("beside"), lambda one: _whole("beside", one, 1, 1 << 20)),
        copy_out=bool(text.get("copy_out")),
        chunk_tokens=checked.chunk_tokens,
        pack_tokens=_optional(text.get("pack_tokens"), lambda one: _whole("pack-tokens", one, 1, 1 << 20)),
        cache_gib=_gib("kv-pool-gib" if part == "tiers" else "cache-gib", text),
        offloading_gib=_gib("kv-offloading-gib", text),
        loads=_apart("load", [_whole("load", one, 1, 64) for one in _listed("load", text.get("load", "1"))]),
        time_slice=_whole("time-slice", text.get("time_slice", "1"), 1, 1 << 16),
        most_rows=_optional(text.get("most_rows"), lambda one: _whole("most-rows", one, 1, MOST_BATCH)),
        address=text.get("address", ""),
        new_tokens=_whole("new-tokens", text.get("new_tokens", "1"), 1, 1 << 20),
        against=_optional(text.get("against"), Path),
        baseline=bool(text.get("baseline")) and bool(_one_of("baseline", text["baseline"], (TRANSFORMERS,))),
        profile=bool(text.get("profile")),
        device=checked.device if text["device"] else None,
        dtype=checked.dtype,
        seed=checked.seed,
        json=checked.json,
        commit=checked.commit,
    )


def argument_parser() -> argparse.ArgumentParser:
    """The parts and their options as argparse takes them, for machines without the command line's library."""
    parser = argparse.ArgumentParser(prog="kvsluice bench", allow_abbrev=False)
    parts = parser.add_subparsers(dest="part", required=True, metavar="|".join(PARTS))
    for name, part in PARTS.items():
        own = parts.add_parser(name, help=part.summary, description=part.summary, allow_abbrev=False)
        for option in part.options:
            kind: dict[str, Any] = {"metavar": option.metavar}
            if option.flag:
                kind = {"action": "store_true"}
            elif option.several:
                kind["action"] = "append"
            own.add_argument(f"--{option.name}", help=option.full_help.replace("%", "%%"), default=None, **kind)
    return parser


def _selecting(recipe: Recipe, selected: int | None) -> Recipe:
    if selected is None or not isinstance(recipe.retrieval, ChunkLandmarks):
        return recipe
    return replace(recipe, retrieval=replace(recipe.retrieval, budget_tokens=selected, budget_rate=LEAST_RATE))


def _batches(part: str, text: str) -> tuple[int | None, ...]:
    may_be_max, more = part == "decode", f", or {MAX_BATCH}" if part == "decode" else ""
    counts = [
        None if may_be_max and one == MAX_BATCH else _whole("batch", one, 1, MOST_BATCH, more)
        for one in _listed("batch", text)
    ]
    return _apart("batch", counts)


def _hit_rates(text: str | None) -> tuple[float | None, ...]:
    if not text:
        return (None,)
    return _apart("hit-rate", [_number("hit-rate", one, 0, 1) for one in _listed("hit-rate", text)])


def _gib(option: str, text: Mapping[str, Any]) -> float | None:
    return _optional(text.get(option.replace("-", "_")), lambda one: _number(option, one, 1e-3, 1 << 14))


def _optional(text: str | None, check: Callable[[str], T]) -> T | None:
    return check(text) if text else None


def _listed(option: str, text: str) -> tuple[str, ...]:
    items = tuple(item.strip() for item in text.split(","))
    if not all(items):
        raise InvalidRequest(f"--{option}", repr(text[:64]), "values with commas between them")
    return _apart(option, items)


def _apart(option: str, values: Sequence[T]) -> tuple[T, ...]:
    if len(set(values)) < len(values):
        raise InvalidRequest(f"--{option}", repr(",".join(map(str, values))[:64]), "values that differ")
    return tuple(values)


def _one_of(option: str, text: str, allowed: tuple[str, ...]) -> str:
    if text not in allowed:
        raise InvalidRequest(f"--{option}", repr(text[:64]), ", ".join(allowed))
    return text


def _whole(option: str, text: str, low: int, high: int, more: str = "") -> int:
    if not re.fullmatch(r"[0-9]{1,12}", text) or not low <= int(text) <= high:
        raise InvalidRequest(f"--{option}", repr(text[:64]), f"a whole number from {low} to {high}{more}")
    return int(text)


def _number(option: str, text: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:  # NaN is in no range
        raise InvalidRequest(f"--{option}", repr(text[:64]), f"a number from {low:g} to {high:g}")
    return value
