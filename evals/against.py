"""What transformers' own model says to the same samples: one dense pass a sample, in the same dtype."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidRequest
from ..models.checkpoint import BUILTIN_MODELS, DEFAULT_MODEL
from . import reference_model
from .outcomes import Outcome, turn_scores
from .results import EXACT, Agreement, TokenDifference
from .suites import Case
from .workfile import Record

# nats a token that rounding explains: in float32 as `parity.NOISE` derives it; half precision keeps 8 or 11 bits of a
# logit, of which a mean over hundreds of tokens cancels most
NOISE = {"float32": 1e-4}
HALF_NOISE = 1e-2


class Reference:
    """The model in transformers.

    Args:
        model: a built-in name or a Hugging Face folder.

    Raises:
        InvalidRequest: another kind of model.
    """

    def __init__(self, model: str, dtype: torch.dtype, device: torch.device) -> None:
        check_reference(model)
        loaded: Any
        if model == DEFAULT_MODEL:
            loaded = reference_model.load_long_context(dtype)
        elif model in BUILTIN_MODELS:
            loaded = reference_model.load_base(dtype)
        else:
            from transformers import AutoModelForCausalLM

            loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa")
            loaded.eval()
        self._model: Any = loaded.to(device)
        self._device = device

    @torch.no_grad()
    def judge(self, case: Case, exact: Outcome) -> Record:
        """JSON: its `score` and those of the `turns`, and under `difference` the first token that it and `exact` choose
        differently, or None."""
        given = 1 if case.rule == "nll" else 0
        following = torch.tensor(case.following_ids[given:], device=self._device)
        ids = torch.tensor([[*case.prompt_ids, *case.following_ids]], device=self._device)
        output = self._model(ids, logits_to_keep=len(following) + 1, use_cache=False)
        logits = output.logits[0, :-1].float()
        if case.rule == "nll":
            score = float(torch.nn.functional.cross_entropy(logits, following))
            return {"score": score, "turns": [score], "difference": None}
        logits = torch.cat([logits[begin:end] for begin, end in case.answers])
        predicted = logits.argmax(-1).tolist()
        turns = turn_scores(case, predicted)
        difference = _difference(case, exact, predicted, logits)
        return {"score": fmean(turns), "turns": list(turns), "difference": difference}


def check_reference(model: str) -> None:
    """Refuse a model that transformers is not asked to load here."""
    if model not in BUILTIN_MODELS and not Path(model).is_dir():
        raise InvalidRequest("--against", f"does not know {model[:64]!r}", f"{', '.join(BUILTIN_MODELS)}, a folder")


def _difference(case: Case, exact: Outcome, predicted: Sequence[int], logits: Tensor) -> Record | None:
    pairs = zip(predicted, exact.predicted, strict=True)
    at = next((index for index, (theirs, ours) in enumerate(pairs) if theirs != ours), None)
    if at is None:
        return None
    answers = [token for begin, end in case.answers for token in case.following_ids[begin:end]]
    best = logits[at].topk(2).values
    return {
        "token": at,
        "answer": answers[at],
        "exact": exact.predicted[at],
        "transformers": predicted[at],
        "gap": float(best[0] - best[1]),
        "exact_gap": float(best[0] - logits[at, exact.predicted[at]]),
    }


def agreement(records: Sequence[Record], dtype: str, *, in_nats: bool) -> Agreement:
    """`exact` against transformers over all records. Scores in nats count as equal where rounding explains them."""
    most = NOISE.get(dtype, HALF_NOISE) if in_nats else 0.0
    gaps = [abs(record["reference"]["score"] - record["outcomes"][EXACT]["score"]) for record in records]
    places = ("context", "task", "depth", "sample")
    differences = [
        TokenDifference(**{name: record[name] for name in places}, **record["reference"]["difference"])
        for record in records
        if record["reference"]["difference"] is not None
    ]
    return Agreement(
        samples=len(records),
        equal_scores=sum(gap <= most for gap in gaps),
        equal_tokens=None if in_nats else len(records) - len(differences),
        differences=tuple(differences),
    )
