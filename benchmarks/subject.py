"""What a run measures: models, recipes and device, checked against each other before any weights are made."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from ..compression.recipe import ModelShape, Recipe, fill, resolve
from ..errors import InvalidRecipe, InvalidRequest
from ..evals.report import environment
from ..evals.results import EvaluatedRecipe
from ..models.checkpoint import locate
from ..models.config import SHAPES, ModelConfig
from ..models.loader import load_config, load_model
from ..models.model import Model
from ..models.profiles import load_profile
from ..services.decode.host_pages import HostPages
from ..services.model_shape import model_shape
from .bench_results import BenchModel, Limits, Row
from .options import BenchOptions
from .progress import Progress

if TYPE_CHECKING:
    from ..kvstore.identity import FrameIdent


@dataclass(frozen=True)
class Subject:
    """A model as it is measured.

    Attributes:
        name: as results have it: no path.
        source: what it is loaded by.
        recipes: label -> every number filled in for the model.
    """

    name: str
    source: str
    config: ModelConfig
    shape: ModelShape
    profile: Mapping[str, Any]
    recipes: Mapping[str, Recipe]


@dataclass
class Bench:
    """All that the parts share in one run.

    Attributes:
        limits: of the device, measured in the run.
        keep: takes every row as soon as it is measured.
    """

    options: BenchOptions
    subjects: tuple[Subject, ...]
    device: torch.device
    dtype: torch.dtype
    limits: Limits
    progress: Progress
    keep: Callable[[Row], None]

    @property
    def subject(self) -> Subject:
        """The model of a part that has one."""
        return self.subjects[0]

    @cached_property
    def model(self) -> Model:
        """Its weights, made or read when they are first wanted."""
        options = self.options
        return load_model(
            self.subject.source,
            dtype=self.dtype,
            device=self.device,
            random_weights=options.random_weights,
            seed=options.seed,
        )

    @cached_property
    def host_pages(self) -> HostPages | None:
        """Host memory for values, where it is asked for; made once, as its pages come back."""
        gib = self.options.offloading_gib
        return None if gib is None else HostPages(int(gib * (1 << 30)), self.device)

    @property
    def chunk_tokens(self) -> int:
        """Rows of a prefill work item."""
        return self.options.chunk_tokens or (8192 if self.device.type == "cuda" else 512)

    def bench_models(self) -> tuple[BenchModel, ...]:
        """What the results say of the models; weights count where they were made."""
        dtype = str(self.dtype).removeprefix("torch.")
        made = self.__dict__.get("model")
        fingerprint = None if made is None else made.fingerprint
        return tuple(BenchModel(one.name, fingerprint, dtype, self.options.random_weights) for one in self.subjects)

    def prompt(self, num_tokens: int, index: int = 0) -> tuple[int, ...]:
        """Random token ids."""
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + index)
        return tuple(torch.randint(self.subject.config.vocab_size, (num_tokens,), generator=generator).tolist())


def bench_ident(request_id: str, model_fingerprint: str, recipe_fingerprint: str) -> FrameIdent:
    """Whom a measured prompt's frames belong to."""
    from ..kvstore.identity import FrameIdent, ModelFingerprint, RecipeFingerprint, RequestId, TenantId

    return FrameIdent(
        request_id=RequestId(request_id),
        epoch=1,
        tenant=TenantId("bench"),
        model_fingerprint=ModelFingerprint(model_fingerprint),
        recipe_fingerprint=RecipeFingerprint(recipe_fingerprint),
    )


def choose_device(options: BenchOptions) -> torch.device:
    """The device asked for, or a GPU where there is one.

    Raises:
        InvalidRequest: there is no such device, or it cannot do what is asked for.
    """
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidRequest("--device", options.device or "cuda", f"cpu, or one of {torch.cuda.device_count()} GPUs")
    if options.profile and device.type != "cuda":
        raise InvalidRequest("--profile", f"with --device {device}", "a GPU, which records what it runs")
    return device


def choose_dtype(options: BenchOptions, device: torch.device) -> torch.dtype:
    """The dtype asked for, or the device's usual one."""
    name = options.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def read_subject(source: str, options: BenchOptions) -> Subject:
    """Read a model's configuration and check the options against it, before its weights are made.

    Raises:
        KvsluiceError: names the option and what it allows, or says what is wrong with the model.
    """
    only_shape = options.random_weights or options.part in ("kernels", "service", "store")
    config = load_config(source, random_weights=only_shape)
    shape = model_shape(config)
    name = source if source in SHAPES and only_shape else locate(source).name
    profile = load_profile(name, shape)
    recipes = {label: _filled(label, recipe, shape, profile) for label, recipe in options.recipes.items()}
    for label, recipe in recipes.items():
        for context in options.contexts:
            reason = resolve(recipe, shape, context, profile).fallback_reason
            if reason is not None:
                raise InvalidRequest("--context", f"{label} would run exact, as {reason}", "longer prompts")
    return Subject(name, source, config, shape, profile, recipes)


def _filled(label: str, recipe: Recipe, shape: ModelShape, profile: Mapping[str, Any]) -> Recipe:
    try:
        return fill(recipe, shape, profile)
    except InvalidRecipe as exc:
        raise InvalidRequest(f"--recipe {label}", f"{exc.field}: {exc.problem}", exc.allowed) from exc


def measured_recipes(subject: Subject) -> dict[str, EvaluatedRecipe]:
    """The recipes as results describe them."""
    found = {}
    for label, recipe in subject.recipes.items():
        slots = json.loads(recipe.to_json())
        found[label] = EvaluatedRecipe(slots.pop("name"), recipe.fingerprint, slots)
    return found


def measured_environment(options: BenchOptions, device: torch.device) -> dict[str, Any]:
    """Hardware, libraries and commit."""
    found = environment()
    if options.commit is not None:
        found["commit"] = options.commit
    found["libraries"]["torch"] = torch.__version__
    found["threads"] = torch.get_num_threads()
    if device.type == "cuda":
        found["hardware"]["gpu"] = torch.cuda.get_device_name(device)
        found["hardware"]["gpu_bytes"] = torch.cuda.get_device_properties(device).total_memory
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return found
