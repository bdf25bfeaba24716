"""Prefill by several ranks that hold one model together: what rank 0 tells the others, and what they do.

    rank 0   PrefillEngine ── begin, run, finish, select, drop ──> the others, which hold the same prompts and run the
             same packs over their own heads

Hidden rows are the same everywhere. When a layer is final, rank 0 gathers keys and values of all heads, and encodes and
sends them as if it had computed them alone: frames know nothing of ranks. That takes, on rank 0, one layer's keys and
values of all heads beside its own, and a gather of them a layer, 2 x Hkv x d values a row; a joint factorization of all
heads needs as much. A rank that fails in the middle of a layer leaves the others without its sums, so all of them end
then, and are started again together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...compression.interfaces import LayerObs
from ...compression.recipe import Recipe
from ...models.model import Model
from ...models.parallel import Ranks
from ..model_shape import model_shape
from .batcher import WorkItem
from .pack import run_pack
from .state import Prompt

# of what a layer has of every head, the axis of the heads
HEAD_AXES = {"k_pre": 1, "k": 1, "v": 1, "q_window": 1, "mass": 0, "query_peak": 0}


class Lead:
    """Has the other ranks do what this one does. Called from the engine's thread, in its order."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def begin(self, request_id: str, prompt_ids: Sequence[int], recipe: Recipe) -> None:
        """A prompt's first item is about to run."""
        self._ranks.tell("begin", request_id=request_id, num_tokens=len(prompt_ids), recipe=recipe.to_json())
        self._ranks.share(torch.tensor(prompt_ids))

    def run(self, items: Sequence[WorkItem]) -> None:
        """A pack is about to run."""
        self._ranks.tell("run", items=[[item.request_id, item.layer, item.begin, item.end] for item in items])

    def finish(self, request_id: str, obs: LayerObs) -> LayerObs:
        """A layer is final. Returns it with all heads."""
        self._ranks.tell("finish", request_id=request_id)
        whole = gathered(self._ranks, obs)
        assert whole is not None, "rank 0 gathers"
        return whole

    def select(self, request_id: str, selected: Tensor) -> None:
        """Only these rows go on, int64 [n]."""
        self._ranks.tell("select", request_id=request_id, num_rows=len(selected))
        self._ranks.share(selected)

    def drop(self, request_id: str) -> None:
        """A prompt has ended."""
        self._ranks.tell("drop", request_id=request_id)

    def stop(self) -> None:
        """There is no more to do."""
        self._ranks.tell("stop")


def gathered(ranks: Ranks, obs: LayerObs) -> LayerObs | None:
    """A layer with the heads of all ranks, on rank 0; None on the others."""
    whole: dict[str, Tensor] = {}
    for name, axis in HEAD_AXES.items():
        own: Tensor | None = getattr(obs, name)
        if own is None or not own.numel():
            continue
        tensor = ranks.gather(own, axis)
        if tensor is not None:
            whole[name] = tensor
    return replace(obs, **whole) if ranks.leads else None  # type: ignore[arg-type]


class Follower:
    """A rank other than 0. Computes with its part of the model what rank 0 tells it to."""

    def __init__(self, model: Model) -> None:
        assert model.ranks is not None and not model.ranks.leads, "rank 0 has an engine"
        self._model, self._ranks = model, model.ranks
        self._shape = model_shape(model.whole)
        self._prompts: dict[str, Prompt] = {}

    @torch.no_grad()
    def run(self) -> None:
        """Follow until there is no more to do. Raises RuntimeError when another rank is lost."""
        while True:
            heard = self._ranks.hear()
            if heard["word"] == "stop":
                return
            if heard["word"] == "run":
                self._run([WorkItem(*item) for item in heard["items"]])
            elif heard["word"] == "begin":
                ids = self._ranks.share(None, (heard["num_tokens"],))
                recipe = Recipe.from_json(heard["recipe"])
                self._prompts[heard["request_id"]] = Prompt(self._model, self._shape, tuple(ids.tolist()), recipe)
            else:
                self._steer(heard["word"], heard["request_id"], heard)

    def _steer(self, word: str, request_id: str, heard: dict[str, int]) -> None:
        prompt = self._prompts[request_id]
        if word == "drop":
            del self._prompts[request_id]
        elif word == "finish":
            gathered(self._ranks, prompt.release_layer())
            prompt.layer += 1
        else:
            prompt.keep_rows(self._ranks.share(None, (heard["num_rows"],)))

    def _run(self, items: Sequence[WorkItem]) -> None:
        for item in items:
            if item.begin == 0:
                self._prompts[item.request_id].begin_layer()
        for writes in run_pack(self._model, self._prompts, items).values():
            for write in writes:
                write.apply()
