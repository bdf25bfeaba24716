"""One sample through kvpress and through our engines, set to do the same. What is set is said in `peer_kvpress`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..compression.layout import layer_layout
from ..compression.recipe import ModelShape, Recipe, fill, get_recipe, resolve
from ..errors import InvalidRequest
from ..evals.outcomes import score_of
from ..evals.reference_model import load_long_context
from ..evals.scoring import Scorer
from ..evals.suites import Ruler, Unit
from ..evals.texts import heldout_texts, token_ids
from ..evals.workfile import Record
from ..models.checkpoint import DEFAULT_MODEL
from ..models.loader import load_config, load_model
from ..models.profiles import load_profile
from ..models.tokenizer import load_tokenizer
from ..services.model_shape import model_shape
from .kvpress_side import PeerModel, load_press

NAMES = ("dense", "snapkv", "pyramidkv", "streaming", "streaming-original")
MOST_SHARE = 0.45  # above, the two cut the first layers' budgets of a pyramid in ways of their own
SINKS = 4
KERNEL = 5  # of kvpress, as it comes
SNAPKV_WINDOW = 64  # likewise
PYRAMIDKV_WINDOW = 8
PYRAMIDKV_BETA = 20


def our_recipe(name: str, share: float) -> Recipe:
    """Our side of a comparison.

    Args:
        share: of the prompt's rows, kept by every layer or on average over the layers.
    """
    if name == "dense":
        return get_recipe("exact")
    if name.startswith("streaming"):
        positions = "original" if name == "streaming-original" else "cache"
        ends = {"kind": "ends", "sinks": SINKS, "local_rate": share, "seal_block": 16, "positions": positions}
        return get_recipe("streaming", json.dumps({"window": ends}))
    native, pyramid = {"kind": "native"}, name == "pyramidkv"
    window = PYRAMIDKV_WINDOW if pyramid else SNAPKV_WINDOW
    slots = {
        "scorer": {"kind": "snap", "window": window, "kernel": KERNEL, "pool": "avg"},
        "budget": {"kind": "uniform", "rate": share},
        "key_codec": native,
        "value_codec": native,
        "window": {"kind": "ends"},
    }
    if pyramid:
        slots["budget"] = {"kind": "pyramid", "rate": share, "beta": PYRAMIDKV_BETA}
    return get_recipe(name, json.dumps(slots))


def make_press(name: str, share: float, kept_rows: Sequence[int], num_tokens: int) -> Any:
    """kvpress's side of a comparison, None where it is the dense model.

    Args:
        kept_rows: what our recipe keeps in every layer of a prompt of `num_tokens`.
    """
    if name == "dense":
        return None
    if name == "pyramidkv":
        # it keeps mean / beta rows in the last layer, ours window + (mean - window) / beta
        mean, window = int(num_tokens * share), PYRAMIDKV_WINDOW
        beta = mean / (window + (mean - window) / PYRAMIDKV_BETA)
        press = load_press("pyramidkv_press", "PyramidKVPress")
        return press(1 - mean / num_tokens, window_size=window, kernel_size=KERNEL, beta=beta)
    ratio = 1 - (kept_rows[0] + 0.5) / num_tokens  # it rounds what it keeps down, so this aims between two
    if name == "snapkv":
        return load_press("snapkv_press", "SnapKVPress")(ratio, window_size=SNAPKV_WINDOW, kernel_size=KERNEL)
    press = load_press("streaming_llm_press", "StreamingLLMPress")(ratio, n_sink=SINKS)
    return load_press("key_rerotation_press", "KeyRerotationPress")(press) if name == "streaming" else press


def kept_rows(recipe: Recipe, shape: ModelShape, num_tokens: int, profile: Mapping[str, Any]) -> tuple[int, ...]:
    """What a recipe keeps in every layer of a prompt for each KV head.

    Raises:
        InvalidRequest: the prompt is too short for the recipe.
    """
    resolved = resolve(recipe, shape, num_tokens, profile)
    if resolved.fallback_reason is not None:
        raise InvalidRequest("--context", f"{recipe.name}: {resolved.fallback_reason}", "a longer one")
    layouts = [layer_layout(resolved.recipe, num_tokens, layer) for layer in range(shape.num_layers)]
    return tuple(at.num_sinks + at.num_sealed + at.num_tail for at in layouts)


@dataclass(frozen=True)
class Setup:
    """What a run compares.

    Attributes:
        names: of comparisons.
        share: see `our_recipe`.
        texts: folder of `evals.texts`.
        device, dtype: by name.
    """

    names: tuple[str, ...]
    share: float
    seed: int
    texts: Path
    device: str
    dtype: str

    def filled(self) -> dict[str, Recipe]:
        """Our recipes as they run, by comparison."""
        shape = model_shape(load_config(DEFAULT_MODEL))
        profile = load_profile(DEFAULT_MODEL, shape)
        return {name: fill(our_recipe(name, self.share), shape, profile) for name in self.names}


class Match:
    """Both sides, loaded.

    Raises:
        PeerMissing: kvpress is not installed.
        TextMissing: the folder of texts is not filled.
    """

    def __init__(self, setup: Setup) -> None:
        load_press("base_press", "BasePress")  # before much else is read
        self._setup = setup
        encode = load_tokenizer(DEFAULT_MODEL).encode
        texts = {name: token_ids(encode, text) for name, text in heldout_texts(setup.texts).items()}
        self._suite = Ruler(encode, texts, setup.seed)
        dtype, device = getattr(torch, setup.dtype), torch.device(setup.device)
        self._recipes = setup.filled()
        self.model = load_model(DEFAULT_MODEL, dtype=dtype, device=device)
        self._scorer = Scorer(self.model, {}, self._recipes)
        self._peer = PeerModel(load_long_context(dtype).to(device))

    def run(self, unit: Unit) -> Record:
        """The unit's fields, and under `comparisons` both scores by name, whether both put the same token first at
        every place of the answer, and whether every layer kept equally many rows.

        Raises:
            KvsluiceError: the prompt is too short for a recipe, or whatever the engines fail with.
        """
        case = self._suite.case(unit)
        num_tokens = len(case.prompt_ids)
        kept = {name: kept_rows(recipe, self._scorer.shape, num_tokens, {}) for name, recipe in self._recipes.items()}
        ours = self._scorer.score([case])[0]
        found = {}
        for name in self._recipes:
            press = make_press(name, self._setup.share, kept[name], num_tokens)
            theirs = self._peer.force(case.prompt_ids, case.answer_ids, press, moved=name == "streaming")
            found[name] = {
                "ours": ours[name].score,
                "kvpress": score_of(case, theirs.predicted),
                "equal_tokens": ours[name].predicted == theirs.predicted,
                "equal_rows": kept[name] == theirs.kept_rows,
            }
        place = {"context": unit.context, "sample": unit.sample, "task": unit.task, "depth": unit.depth}
        return place | {"comparisons": found}
