"""What prefill and decode workers have in common: who they are, and sampling settings off the wire."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..compression.recipe import ModelShape, Recipe, fill, get_recipe, recipe_names
from ..errors import ConfigError, InvalidRecipe
from ..kvstore.identity import FrameIdent, ModelFingerprint, RecipeFingerprint, RequestId, TenantId
from ..protos import worker_pb2 as wpb
from .config import ServeConfig

# Of all that goes between a gateway and its workers, messages and frames. It is raised where an older process would
# misread a newer one or would go on with its answers in other words, and not for fields that it may pass over.
PROTOCOL = 3


@dataclass(frozen=True)
class WorkerIdentity:
    """What a worker says of itself, besides its load.

    Attributes:
        role: prefill, decode or both.
        model_fingerprint: over configuration and weights; only workers that agree on it exchange frames.
    """

    worker_id: str
    role: str
    model: str
    model_fingerprint: str
    vocab_size: int
    shape: ModelShape
    profile: Mapping[str, Any]

    def info(self, **load: int) -> wpb.WorkerInfo:
        """The answer to an `Info` call; `load` fills the fields that change."""
        info = wpb.WorkerInfo(
            worker_id=self.worker_id,
            role=self.role,
            model=self.model,
            model_fingerprint=self.model_fingerprint,
            vocab_size=self.vocab_size,
            model_shape_json=self.shape.to_json(),
            profile_json=json.dumps(dict(self.profile), sort_keys=True),
            protocol=PROTOCOL,
        )
        for name, value in load.items():
            setattr(info, name, value)
        return info

    def frame_ident(self, message: wpb.Open | wpb.PrefillRequest, recipe: Recipe) -> FrameIdent:
        """Whose frames belong to the attempt that `message` starts; both sides of a handoff must agree on it."""
        return FrameIdent(
            request_id=RequestId(message.request_id),
            epoch=message.epoch,
            tenant=TenantId(message.tenant),
            model_fingerprint=ModelFingerprint(self.model_fingerprint),
            recipe_fingerprint=RecipeFingerprint(recipe.fingerprint),
        )


def sampling_fields(sampling: wpb.Sampling) -> dict[str, Any]:
    """Keyword arguments of `models.sampling.SamplingParams`."""
    return {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": dict(sampling.logit_bias),
        "seed": sampling.seed,
        "stop_token_ids": tuple(sampling.stop_token_ids),
        "min_tokens": sampling.min_tokens,
        "ignore_eos": sampling.ignore_eos,
        "logprobs": sampling.logprobs if sampling.HasField("logprobs") else None,
        "n": sampling.n,
    }


def check_fit(config: ServeConfig, shape: ModelShape) -> None:
    """Refuse settings that the model does not allow. Raises `ConfigError`."""
    limit = shape.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError(f"max_model_len: got {config.max_model_len}; allowed: 8 to {limit}")


def check_profile(profile: Mapping[str, Any], shape: ModelShape) -> None:
    """Refuse a profile with which a recipe would not fit the model, though it does without.

    Raises:
        ConfigError: names the recipe and the number.
    """
    for name in recipe_names():
        try:
            fill(get_recipe(name), shape, {})
        except InvalidRecipe:  # which is not the profile's fault
            continue
        try:
            fill(get_recipe(name), shape, profile)
        except InvalidRecipe as exc:
            raise ConfigError(f"profile: does not fit the model under {name}: {exc.message}") from exc


def compute_dtype(name: str) -> Any:
    """The torch dtype of a configured name; None where the device decides."""
    import torch

    return None if name == "auto" else getattr(torch, name)


def use_threads(num_threads: int | None, num_workers: int) -> Callable[[], None]:
    """Sets how many threads torch uses for the calling thread's work; None = this worker's share of the cores."""

    def setup() -> None:
        import torch

        torch.set_num_threads(num_threads or max(1, (os.cpu_count() or 1) // num_workers))

    return setup
