"""Decoding by several ranks that hold one model together.

    rank 0   LeadingEngine: a DecodeEngine, every call of which it also has the others make, in the same order
    others   Follower: the same engine over the caches of their own KV heads; nobody asks what it tells

A decode engine's state is a function of the calls that were made to it, and after every layer's sums all ranks have the
same rows, bit for bit; so they choose, draw, seal and end the same without a word about it. Frames come to rank 0 whole
and each rank gets the part of its heads (`compression/heads.py`), so sequences move between workers of any number of
ranks. Rows that are to be kept are gathered, and so are whole as well.

What ranks cannot do alike they do not do: requests are not parked, since whether a copy is done differs between them,
and a fault ends the process rather than a request, since the others would wait for its sums.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from ...compression.checks import check_tensors
from ...compression.heads import HeadParts, cut_heads
from ...compression.interfaces import EncodedLayer, Part
from ...compression.recipe import Recipe
from ...errors import KvsluiceError
from ...models.parallel import Ranks
from ...models.sampling import SamplingParams
from ..model_shape import model_shape
from .engine import DecodeEngine, DecodeRequest, EmittedChoice, Event, KeptRows
from .failures import typed

__all__ = ["Follower", "LeadingEngine"]


class LeadingEngine(DecodeEngine):
    """Rank 0's engine. Arguments, results and errors are those of `DecodeEngine`."""

    @property
    def _ranks(self) -> Ranks:
        assert self.model.ranks is not None and self.model.ranks.leads, "rank 0 leads"
        return self.model.ranks

    def open(self, request: DecodeRequest) -> None:
        self._ranks.tell("open", **_request_fields(request))
        super().open(request)

    @torch.inference_mode()
    def add_layer(
        self, request_id: str, encoded: EncodedLayer, epoch: int | None = None, wait: Callable[[], None] | None = None
    ) -> None:
        run = self._receiving(request_id, epoch)
        parts = self.parts_of(run.request)
        try:
            if wait is not None:
                wait()
            check_tensors(encoded, run.request.recipe, model_shape(self.model.whole), run.request.num_prompt_tokens)
        except Exception as exc:
            self._ranks.tell("cancel", request_id=request_id, choice=None, epoch=epoch)
            raise self._fail(request_id, typed(exc, request_id)) from exc  # the others end it, too
        self._ranks.tell("add_layer", request_id=request_id, epoch=epoch, layer=encoded.layer)
        of_ranks = [parts.of(encoded, rank) for rank in range(self._ranks.size)]
        self._ranks.hand_out([_flat(part) for part in of_ranks])
        super().add_layer(request_id, of_ranks[0], epoch)

    @torch.inference_mode()
    def commit(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        emitted: Sequence[EmittedChoice],
        epoch: int | None = None,
    ) -> int:
        self._receiving(request_id, epoch)
        fields = {"num_tokens": len(prompt_ids), "emitted": [_emitted_fields(choice) for choice in emitted]}
        self._ranks.tell("commit", request_id=request_id, epoch=epoch, **fields)
        self._ranks.share(torch.tensor(prompt_ids, dtype=torch.int64))
        size = self._ranks.size
        for choice in emitted:
            for kept in choice.kept:
                self._ranks.hand_out([_flat_rows(_rows_of(kept, rank, size)) for rank in range(size)])
        own = [replace(choice, kept=[_rows_of(kept, 0, size) for kept in choice.kept]) for choice in emitted]
        return super().commit(request_id, prompt_ids, own, epoch)

    def lengthen(self, request_id: str, choice: int, rows: float, epoch: int | None = None) -> None:
        told = None if math.isinf(rows) else rows
        self._ranks.tell("lengthen", request_id=request_id, choice=choice, rows=told, epoch=epoch)
        super().lengthen(request_id, choice, rows, epoch)

    def grant(self, request_id: str, tokens: int, epoch: int | None = None) -> None:
        self._ranks.tell("grant", request_id=request_id, tokens=tokens, epoch=epoch)
        super().grant(request_id, tokens, epoch)

    def cancel(self, request_id: str, choice: int | None = None, epoch: int | None = None) -> bool:
        self._ranks.tell("cancel", request_id=request_id, choice=choice, epoch=epoch)
        return super().cancel(request_id, choice, epoch)

    def step(self) -> list[Event]:
        if not self.has_work:
            return []
        self._ranks.tell("step")
        return super().step()

    def stop(self) -> None:
        """Have the other ranks end."""
        self._ranks.tell("stop")

    def parts_of(self, request: DecodeRequest) -> HeadParts:
        """What of a request's layers each rank gets."""
        return head_parts(self, request, self._ranks.size)


class Follower:
    """A rank other than 0.

    Args:
        engine: over this rank's part of the model, made like rank 0's.
    """

    def __init__(self, engine: DecodeEngine) -> None:
        ranks = engine.model.ranks
        assert ranks is not None and not ranks.leads, "rank 0 leads"
        self._engine, self._ranks = engine, ranks
        self._requests: dict[str, DecodeRequest] = {}

    def run(self) -> None:
        """Follow until there is no more to do. Raises `RanksBroken` when another rank is lost."""
        while (heard := self._ranks.hear())["word"] != "stop":
            request_id = heard.get("request_id")
            # rank 0 has met the same, and tells it
            with contextlib.suppress(KvsluiceError):
                self._do(heard.pop("word"), heard)
            if request_id is not None and self._engine.scheduler.phase(request_id) is None:
                self._requests.pop(request_id, None)

    def _do(self, word: str, heard: dict[str, Any]) -> None:
        if word == "step":
            self._engine.step()
        elif word == "open":
            request = _request(heard)
            self._engine.open(request)
            self._requests[request.request_id] = request
        elif word == "add_layer":
            self._add_layer(heard["request_id"], heard["layer"], heard["epoch"])
        elif word == "commit":
            self._commit(heard)
        elif word == "lengthen":
            rows = math.inf if heard["rows"] is None else heard["rows"]
            self._engine.lengthen(heard["request_id"], heard["choice"], rows, heard["epoch"])
        elif word == "grant":
            self._engine.grant(**heard)
        else:
            self._engine.cancel(**heard)

    def _add_layer(self, request_id: str, layer: int, epoch: int | None) -> None:
        specs = head_parts(self._engine, self._requests[request_id], self._ranks.size).specs(layer)
        flat = {
            _name(part, name): (spec.dtype, spec.shape) for part, group in specs.items() for name, spec in group.items()
        }
        taken = self._ranks.take(flat)
        tensors = {part: {name: taken[_name(part, name)] for name in group} for part, group in specs.items()}
        self._engine.add_layer(request_id, EncodedLayer(layer, tensors), epoch)

    def _commit(self, heard: dict[str, Any]) -> None:
        request = self._requests.pop(heard["request_id"])
        prompt_ids = self._ranks.share(None, (heard["num_tokens"],)).tolist()
        emitted = [
            EmittedChoice(
                tuple(one["token_ids"]), one["finish_reason"], [self._kept(request, kept) for kept in one["kept"]]
            )
            for one in heard["emitted"]
        ]
        self._engine.commit(request.request_id, prompt_ids, emitted, heard["epoch"])

    def _kept(self, request: DecodeRequest, heard: dict[str, Any]) -> KeptRows:
        shape = self._engine.shape
        own = (heard["num_rows"], shape.num_kv_heads, shape.head_dim)
        flat = {f"{layer}.{name}": (heard["dtype"], own) for layer in range(heard["layers"]) for name in ("k", "v")}
        taken = self._ranks.take(flat)
        layers = [
            EncodedLayer(layer, {Part.TAIL: {name: taken[f"{layer}.{name}"] for name in ("k", "v")}})
            for layer in range(heard["layers"])
        ]
        return KeptRows(heard["begin"], layers)


def head_parts(engine: DecodeEngine, request: DecodeRequest, size: int) -> HeadParts:
    """What of a request's layers each of `size` ranks gets."""
    native = str(engine.model.dtype).removeprefix("torch.")
    return HeadParts(request.recipe, model_shape(engine.model.whole), request.num_prompt_tokens, native, size)


def _request_fields(request: DecodeRequest) -> dict[str, Any]:
    sampling = asdict(request.sampling)
    sampling["logit_bias"] = sorted(request.sampling.logit_bias.items())
    numbers = ("request_id", "epoch", "num_prompt_tokens", "credits", "keep_every", "history_tokens")
    return {name: getattr(request, name) for name in numbers} | {
        "recipe": request.recipe.to_json(),
        "sampling": sampling,
    }


def _request(heard: dict[str, Any]) -> DecodeRequest:
    sampling = dict(heard.pop("sampling"))
    sampling["logit_bias"] = {int(token): bias for token, bias in sampling["logit_bias"]}
    sampling["stop_token_ids"] = tuple(sampling["stop_token_ids"])
    recipe = Recipe.from_json(heard.pop("recipe"))
    return DecodeRequest(recipe=recipe, sampling=SamplingParams(**sampling), **heard)


def _emitted_fields(choice: EmittedChoice) -> dict[str, Any]:
    return {
        "token_ids": list(choice.token_ids),
        "finish_reason": choice.finish_reason,
        "kept": [
            {
                "begin": kept.begin,
                "num_rows": kept.num_rows,
                "layers": len(kept.layers),
                "dtype": str(next(iter(_flat_rows(kept).values())).dtype).removeprefix("torch."),
            }
            for kept in choice.kept
        ],
    }


def _name(part: Part, name: str) -> str:
    return f"{part.name}.{name}"


def _flat(encoded: EncodedLayer) -> dict[str, torch.Tensor]:
    return {_name(part, name): tensor for part, group in encoded.tensors.items() for name, tensor in group.items()}


def _flat_rows(kept: KeptRows) -> dict[str, torch.Tensor]:
    return {
        f"{one.layer}.{name}": group[name]
        for one in kept.layers
        for group in one.tensors.values()
        for name in ("k", "v")
    }


def _rows_of(kept: KeptRows, rank: int, size: int) -> KeptRows:
    """Kept rows of a rank's heads."""

    def own(x: torch.Tensor) -> torch.Tensor:
        return cut_heads(x, (x.shape[0], x.shape[1] // size, x.shape[2]), rank)

    layers = [
        EncodedLayer(
            one.layer, {part: {name: own(t) for name, t in group.items()} for part, group in one.tensors.items()}
        )
        for one in kept.layers
    ]
    return KeptRows(kept.begin, layers)
