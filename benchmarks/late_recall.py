"""What it costs that recalled rows come late: rows that were propagated have not seen them.

    python -P -m kvsluice.benchmarks.late_recall --out benchmarks/results/late_recall_cpu.json

The same answers, teacher-forced, over the same prompts, four times: `exact`; without recall; with recall while decoding
(`late`); and with the rows that late recall brought back propagated by prefill from the start, together with those that
the selection chose (`early`). Early and late hold the same rows in every layer and differ in when they came alone. Each
is held against `exact` by the divergence of the next token's distribution, KL(exact || other) in nats a token, and by
how often the likeliest token is the same; `late` is also held against `early`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..compression.interfaces import LayerObs, Part
from ..compression.propagation import Tsp
from ..compression.recipe import Recipe, fill, get_recipe
from ..compression.slots import TspPropagation
from ..errors import InvalidRequest
from ..evals.report import write_results
from ..evals.scoring import Scorer, _Sequence
from ..evals.statistics import interval, resampled_means
from ..evals.suites import Case, Ruler, Unit
from ..evals.tasks import SUITE
from ..evals.texts import python_topics, token_ids
from ..models.checkpoint import DEFAULT_MODEL, locate
from ..models.loader import load_model
from ..models.model import Model
from ..models.profiles import load_profile
from ..models.tokenizer import load_tokenizer
from ..services.model_shape import model_shape

NONE, LATE, EARLY = "without", "late", "early"
PAIRS = ((NONE, "exact"), (LATE, "exact"), (EARLY, "exact"), (LATE, EARLY))


class Distributions(Scorer):
    """Keeps what answers' rows predict.

    Attributes:
        sequence: the last case's.
    """

    sequence: _Sequence

    def run(self, case: Case) -> Tensor:
        """float32 [rows, vocabulary]: log-probabilities behind each of the answer's rows, which prefill's own first
        token is not among."""
        self._kept: list[Tensor] = []
        self.score([case])
        return torch.cat(self._kept)

    def _open(self, case: Case, label: str, tenant: str) -> _Sequence:
        self.sequence = super()._open(case, label, tenant)
        return self.sequence

    def _judge_rows(self, shown: Sequence[tuple[_Sequence, Tensor]]) -> None:
        self._kept += [self.model.logits(rows).float().log_softmax(dim=-1) for _, rows in shown]
        super()._judge_rows(shown)


@contextmanager
def selection(forced: Tensor | None = None) -> Iterator[list[Tensor]]:
    """Have rows go on that were chosen otherwise. Yields a list that those are added to which do."""
    chosen, seen = Tsp.select, list[Tensor]()

    def select(self: Tsp, obs: LayerObs, layer_window: int | None) -> Tensor | None:
        rows = chosen(self, obs, layer_window)
        if rows is None:
            return None
        rows = rows if forced is None else forced.to(rows.device)
        seen.append(rows)
        return rows

    Tsp.select = select  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        Tsp.select = chosen  # type: ignore[method-assign]


def propagated(recipe: Recipe, **numbers: Any) -> Recipe:
    """The recipe with other numbers of its selective propagation."""
    assert isinstance(recipe.propagation, TspPropagation)
    return replace(recipe, propagation=replace(recipe.propagation, **numbers))


def recalled_rows(sequence: _Sequence, chunk: int) -> Tensor:
    """int64, positions of the rows that an answer has brought back and still holds, ascending."""
    begin = len(sequence.case.prompt_ids)
    layers = sequence.cache.rows(begin, begin + sequence.num_done)
    chunks = next((one.tensors[Part.TAIL]["recalled"] for one in layers if "recalled" in one.tensors[Part.TAIL]), None)
    if chunks is None:
        return torch.empty(0, dtype=torch.int64)
    firsts = torch.tensor(sorted(set(chunks[:, 0].tolist())))
    return (firsts[:, None] + torch.arange(chunk)).flatten()


@dataclass(frozen=True)
class Measured:
    """One sample.

    Attributes:
        recalled: rows that came back.
        nats, same: by pair of ways, see `PAIRS`: the mean divergence, and the share of rows whose likeliest token is
            the same.
    """

    task: str
    recalled: int
    nats: Mapping[str, float]
    same: Mapping[str, float]


def measure(model: Model, profile: Mapping[str, Any], recipe: Recipe, task: str, case: Case) -> Measured | None:
    """One sample; None where nothing came back.

    Args:
        recipe: with recall.
    """

    def ran(one: Recipe, forced: Tensor | None = None) -> tuple[Distributions, Tensor, list[Tensor]]:
        scorer = Distributions(model, profile, {one.name: one})
        with selection(forced) as rows:
            return scorer, scorer.run(case), rows

    late, late_says, chosen = ran(recipe)
    back = recalled_rows(late.sequence, recipe.retrieval.chunk)
    if not chosen or not len(back):
        return None
    rows = torch.tensor(sorted({*chosen[0].tolist(), *back.tolist()}))
    whole = propagated(recipe, recall=0.0, rate=(len(rows) + 0.5) / len(case.prompt_ids))
    says = {
        "exact": ran(get_recipe("exact"))[1],
        NONE: ran(propagated(recipe, recall=0.0))[1],
        LATE: late_says,
        EARLY: ran(whole, rows)[1],
    }
    names = {pair: " to ".join(pair) for pair in PAIRS}
    nats = {names[a, b]: float((says[b].exp() * (says[b] - says[a])).sum(dim=-1).mean()) for a, b in PAIRS}
    same = {names[a, b]: float((says[a].argmax(-1) == says[b].argmax(-1)).float().mean()) for a, b in PAIRS}
    return Measured(task, len(back), nats, same)


def summary(found: Sequence[Measured]) -> dict[str, Any]:
    """Means over samples with 95 % bootstrap intervals."""

    def row(values: Sequence[float], name: str) -> dict[str, float]:
        scores = np.array(values, dtype=np.float64)
        mean = interval(scores, resampled_means(scores, name))
        return {"mean": mean.mean, "low": mean.low, "high": mean.high}

    pairs = found[0].nats
    return {
        pair: {
            "nats": row([one.nats[pair] for one in found], pair),
            "same": row([one.same[pair] for one in found], pair),
        }
        for pair in pairs
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each sample, print a line each, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--recipe", default="sluice")
    parser.add_argument("--recall", type=float, default=0.1, help="share of the prompt, enough that none has to leave")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=2, help="of each task")
    parser.add_argument("--tasks", default="niah_single_2,niah_multikey_1,niah_multivalue,niah_multiquery,vt,quote")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="JSON file with all that was measured")
    options = parser.parse_args(argv)
    tasks = options.tasks.split(",")
    if unknown := sorted(set(tasks) - set(SUITE)):
        raise InvalidRequest("--tasks", ", ".join(unknown), ", ".join(SUITE))
    model = load_model(options.model, device=options.device)
    shape, encode = model_shape(model.config), load_tokenizer(options.model).encode
    profile = load_profile(locate(options.model).name, shape)
    filled = fill(get_recipe(options.recipe), shape, profile)
    if not isinstance(filled.propagation, TspPropagation):
        raise InvalidRequest("--recipe", f"{options.recipe} has every row go on", "one that selects rows")
    recipe = propagated(filled, recall=options.recall)
    suite = Ruler(encode, {"python-topics": token_ids(encode, python_topics())}, 0)
    found = []
    for sample in range(options.samples):
        for task in tasks:
            one = measure(model, profile, recipe, task, suite.case(Unit(options.context, sample, task)))
            if one is not None:
                found.append(one)
                print(json.dumps({"task": task, "recalled": one.recalled, **one.nats}), flush=True)
    if not found:
        raise InvalidRequest("--recall", f"{options.recall} brought nothing back in any sample", "more")
    results = {
        "settings": {
            name: getattr(options, name) for name in ("model", "recipe", "recall", "context", "samples", "tasks")
        },
        "summary": summary(found),
        "samples": [vars(one) for one in found],
    }
    print(json.dumps(results["summary"], indent=1))
    if options.out is not None:
        write_results(options.out, results)


if __name__ == "__main__":
    main()
