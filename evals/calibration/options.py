"""What `kvsluice calibrate` can be told: one list of options, checked in one place. Free of torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...compression.recipe import Recipe, get_recipe
from ...errors import InvalidRecipe, InvalidRequest
from ...models.checkpoint import DEFAULT_MODEL
from ..options import OPTIONS as EVAL_OPTIONS
from ..options import EvalOptions, Option, apart, listed, parse_options, share, whole
from ..results import EXACT
from .candidates import KEYS, PROPAGATION, Grid, open_numbers

AS_EVAL = (
    "model", "profile", "task", "texts", "device", "dtype", "batch", "processes", "chunk-tokens", "kernels", "commit",
)  # fmt: skip
FINALISTS = "finalists.json"  # what the second cut writes beside the report
MOST_FINALISTS, MOST_PROMPTS = 32, 256
USUAL_PREFILL, MOST_PREFILL = 0.7, 10.0

_OWN = (
    Option("recipe", "NAME", "recipe or preset to choose numbers for: one that leaves some open, as sluice, "
           "sluice-full and fastkv do", "sluice"),
    Option("max-prefill-flops", "SHARE", "most operations that prefill may take, as a share of `exact`'s; default: 0.7 "
           "where the recipe leaves open which rows go on, else any"),
    Option("max-kv-bytes", "SHARE", "most bytes that may be shipped, as a share of the cache in bf16", "0.25"),
    Option("context", "N,N", "tokens of a prompt and its answer, about; the budgets hold at each", "8192"),
    Option("prompts", "N", "prompts a context for the first cut, drawn by the next seed: none serves the second", "4"),
    Option("samples", "N", "samples a task and context for the second cut, the same ones for every finalist", "10"),
    Option("finalists", "N", "candidates of the second cut, beside `exact` and the numbers as they are now", "4"),
    Option("seed", "N", "other seeds draw other samples", "0"),
    Option("layers", "N,N", "layers T to try; default: up to 16 of those that the budget allows, the deepest included"),
    Option("rates", "R,R", "shares of the rows that go on", "0.1,0.15,0.2,0.3,0.4"),
    Option("windows", "N,N", "last rows whose queries choose; default: 64,128 where whole chunks are chosen, else "
           "8,32,64"),
    Option("recalls", "R,R", "shares of the rows that decode may have brought back", "0"),
    Option("keys", "K,K", "how keys are stored: int2, int4, int8 (a scale for each channel of 32 rows); rank-SHARE "
           "(low-rank, 8 bits, of that share of KV heads x head size), rank-SHAREx4 and x16 for other bits",
           ",".join(KEYS)),
    Option("chunks", "N,N", "rows of the chunks that decode chooses: 1, 2, 4, 8, 16; sluice takes up to 4", "2,4"),
    Option("outliers", "N,N", "chunks a KV head that stay exact", "0,16"),
    Option("out", "FILE", "where the profile goes; default: MODEL.profile.json in the current folder"),
    Option("json", "FILE", "write the report to this file; beside it lies what is done already, so that the same "
           "command goes on where one was stopped"),
    Option("plot", "FILE", "draw errors and accuracy into this SVG file"),
    Option("fresh", "", "begin anew, whatever is done already", flag=True),
)  # fmt: skip
OPTIONS = (
    *(one for one in EVAL_OPTIONS if one.name in ("model", "profile")),
    *_OWN,
    *(one for one in EVAL_OPTIONS if one.name in AS_EVAL and one.name not in ("model", "profile")),
)


@dataclass(frozen=True)
class CalibrationOptions:
    """Checked options; what only the model can say is checked later.

    Attributes:
        evaluation: of the second cut, its recipes and its file left open.
        recipe: numbers open.
        max_prefill, max_shipped: budgets, as shares of `exact`'s operations and of the cache in bf16.
        prompts: a context, for the first cut.
        finalists: of the second cut.
        out: where the profile goes.
        json, plot: where report and plot go, or None.
    """

    evaluation: EvalOptions
    recipe: Recipe
    max_prefill: float
    max_shipped: float
    prompts: int
    finalists: int
    grid: Grid
    out: Path
    json: Path | None
    plot: Path | None

    @property
    def contexts(self) -> tuple[int, ...]:
        return self.evaluation.contexts


def parse_calibration(given: Mapping[str, Any]) -> CalibrationOptions:
    """Check what was typed.

    Args:
        given: option keys to text, or to bool for flags; None or absent = the default.

    Raises:
        InvalidRequest: names the option and what it allows.
    """
    text: dict[str, Any] = {one.key: one.default for one in OPTIONS}
    text |= {key: value for key, value in given.items() if value is not None}
    of_eval = ("context", "samples", "seed", *(name.replace("-", "_") for name in AS_EVAL))
    shared = {key: text[key] for key in of_eval if text[key] != ""}
    evaluation = parse_options({**shared, "suite": "ruler", "recipe": EXACT, "fresh": bool(given.get("fresh"))})
    recipe = _recipe(text["recipe"])
    out = _file("out", text["out"] or f"{_name(text['model'])}.profile.json", ".json")
    json = _file("json", text["json"], ".json") if text["json"] else None
    if json is not None and out.resolve() in (json.resolve(), beside(json, FINALISTS).resolve()):
        raise InvalidRequest("--out", f"{out} is what --json writes", "another file than the report's")
    chosen = ("rates", "windows", "layers", "recalls", "keys", "chunks", "outliers")
    _check_of_use(recipe, [key for key in chosen if given.get(key) is not None])
    return CalibrationOptions(
        evaluation=evaluation,
        recipe=recipe,
        max_prefill=_most_prefill(recipe, text["max_prefill_flops"]),
        max_shipped=_above_zero("max-kv-bytes", text["max_kv_bytes"], 2.0),
        prompts=whole("prompts", text["prompts"], 1, MOST_PROMPTS),
        finalists=whole("finalists", text["finalists"], 1, MOST_FINALISTS),
        grid=_grid(text),
        out=out,
        json=json,
        plot=_file("plot", text["plot"], ".svg") if text["plot"] else None,
    )


def beside(report: Path, ending: str) -> Path:
    """A file next to the report, of the same name but for its end."""
    return report.with_name(f"{report.name.removesuffix('.json')}.{ending}")


def _grid(text: Mapping[str, str]) -> Grid:
    keys = listed("keys", text["keys"])
    for one in keys:
        if not re.fullmatch(r"int[248]|rank-(0?\.[0-9]{1,6}|1)(x(4|8|16))?", one):
            raise InvalidRequest("--keys", repr(one[:64]), "int2, int4, int8, rank-SHARE, rank-SHAREx4, rank-SHAREx16")

    def numbers(key: str, low: int, high: int) -> tuple[int, ...] | None:
        return apart(key, [whole(key, one, low, high) for one in listed(key, text[key])]) if text[key] else None

    def shares(key: str) -> tuple[float, ...]:
        return apart(key, [share(key, one) for one in listed(key, text[key])])

    rates = shares("rates")
    if min(rates) == 0:
        raise InvalidRequest("--rates", "0", "numbers above 0, at most 1")
    chunks = numbers("chunks", 1, 16) or ()
    if not set(chunks) <= {1, 2, 4, 8, 16}:
        raise InvalidRequest("--chunks", repr(text["chunks"][:64]), "1, 2, 4, 8, 16")
    return Grid(
        layers=numbers("layers", 0, 1023),
        rates=rates,
        windows=numbers("windows", 1, 512),
        recalls=shares("recalls"),
        keys=keys,
        chunks=chunks,
        outliers=numbers("outliers", 0, 4096) or (),
    )


def _recipe(name: str) -> Recipe:
    try:
        recipe = get_recipe(name)
    except InvalidRecipe as exc:
        raise InvalidRequest("--recipe", exc.problem, exc.allowed) from exc
    if not open_numbers(recipe):
        raise InvalidRequest("--recipe", f"{recipe.name} leaves no number to a model's profile", _calibrated())
    return recipe


def _check_of_use(recipe: Recipe, given: list[str]) -> None:
    """Refuse values for numbers that the recipe does not leave open."""
    wanted = {"rates": "rate", "windows": "window", "layers": "layer", "recalls": "recall", "keys": "key_codec"}
    for key in given:
        number = wanted.get(key, key.removesuffix("s") if key == "chunks" else key)
        if number not in open_numbers(recipe):
            raise InvalidRequest(f"--{key}", f"is of no use to {recipe.name}", "recipes that leave that number open")


def _calibrated() -> str:
    from ...compression.recipe import recipe_names

    return ", ".join(name for name in recipe_names() if open_numbers(get_recipe(name)))


def _most_prefill(recipe: Recipe, text: str) -> float:
    """A recipe whose rows all go on takes what it takes: nothing that is chosen changes much of it."""
    usual = USUAL_PREFILL if set(PROPAGATION) & set(open_numbers(recipe)) else MOST_PREFILL
    return _above_zero("max-prefill-flops", text, MOST_PREFILL) if text else usual


def _above_zero(option: str, text: str, most: float) -> float:
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,9})?|\.[0-9]{1,9}", text) or not 0 < float(text) <= most:
        raise InvalidRequest(f"--{option}", repr(text[:64]), f"a number above 0, at most {most:g}")
    return float(text)


def _file(option: str, text: str, ending: str) -> Path:
    path = Path(text)
    if path.is_dir() or path.suffix != ending:
        raise InvalidRequest(f"--{option}", repr(text[:128]), f"a file whose name ends in {ending}")
    return path


def _name(model: str) -> str:
    path = Path(model)
    return (path.stem if path.suffix.lower() == ".gguf" else path.resolve().name) or DEFAULT_MODEL
