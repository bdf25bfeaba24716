"""Time to the first token of a prompt whose document was asked about before, beside that of one whose was not.

    python -P -m kvsluice.benchmarks.bench_prefix --out benchmarks/results/shared_prefixes_cpu.json

Three times a round, over a new document of random tokens, the prefill engine runs a prompt from nothing to its first
token: `fills` is the first question about the document, of which everything is kept; `hits` the second one; `alone` is
the second question on an engine that keeps nothing. They follow each other, so that what else the machine does meets
all three alike; a round gives a ratio, and the median of the rounds counts. The first tokens of `hits` and `alone` are
compared.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from ..compression.recipe import Recipe, get_recipe, resolve
from ..models.loader import load_model
from ..models.model import Model
from ..models.profiles import load_profile
from ..models.sampling import SamplingParams
from ..services.prefill.engine import PrefillEngine
from ..services.prefill.prefix_memory import make_prefix_memory
from .first_token import add_options, check_counts, first_token, write

SAMPLING = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        document_tokens, question_tokens: of each prompt, in this order.
        chunk_tokens, pack_tokens: of the engines.
    """

    recipe: str
    document_tokens: int
    question_tokens: int
    chunk_tokens: int
    pack_tokens: int


@dataclass(frozen=True)
class Round:
    """Seconds to the first token, and what was found.

    Attributes:
        found_tokens: of the prompt of `hits`.
        same_token: whether it was that of `alone`.
    """

    fills_s: float
    hits_s: float
    alone_s: float
    found_tokens: int
    same_token: bool


def measure(model: Model, case: Case, recipe: Recipe, rounds: int, seed: int = 0) -> list[Round]:
    """Run a case.

    Args:
        recipe: resolved for prompts of this length.

    Raises:
        KvsluiceError: whatever prefill failed with.
    """
    draw, vocab_size = random.Random(seed), model.config.vocab_size
    kept_bytes = 2 * case.document_tokens * _row_bytes(model) + (64 << 20)

    def ids(count: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(count)]

    def engine(num_bytes: int) -> PrefillEngine:
        memory = make_prefix_memory(num_bytes, model.device) if num_bytes else None
        return PrefillEngine(model, case.chunk_tokens, case.pack_tokens, prefix_memory=memory)

    shares, alone = engine(kept_bytes), engine(0)
    first_token(alone, ids(case.chunk_tokens), get_recipe("exact"), SAMPLING)  # warms up
    found = []
    for _ in range(rounds):
        document = ids(case.document_tokens)
        first, second = (document + ids(case.question_tokens) for _ in range(2))
        fills, hits = (first_token(shares, ids_of_one, recipe, SAMPLING) for ids_of_one in (first, second))
        whole = first_token(alone, second, recipe, SAMPLING)
        same = hits.sampled[0].token_id == whole.sampled[0].token_id
        found.append(Round(fills.seconds, hits.seconds, whole.seconds, hits.found_tokens, same))
    return found


def _row_bytes(model: Model) -> int:
    """The most that a kept row takes, sums for scorers aside."""
    config = model.config
    width = 2 * config.num_layers * config.num_kv_heads * config.head_dim + config.hidden_size
    return width * model.dtype.itemsize


def summary(rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians of the rounds' seconds and of their ratios."""
    return {
        "fills_s": median(one.fills_s for one in rounds),
        "hits_s": median(one.hits_s for one in rounds),
        "alone_s": median(one.alone_s for one in rounds),
        "hit_over_alone": median(one.hits_s / one.alone_s for one in rounds),
        "fill_over_alone": median(one.fills_s / one.alone_s for one in rounds),
        "found_tokens": rounds[0].found_tokens,
        "same_tokens": sum(one.same_token for one in rounds),
        "rounds": [asdict(one) for one in rounds],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each recipe, print a line each, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--document-tokens", type=int, default=4000)
    parser.add_argument("--question-tokens", type=int, default=96)
    options = parser.parse_args(argv)
    check_counts(options, "document_tokens", "question_tokens")
    model = load_model(options.model, device=options.device)
    results = []
    for name in options.recipes:
        case = Case(
            name,
            options.document_tokens,
            options.question_tokens,
            options.chunk_tokens,
            max(2048, options.chunk_tokens),
        )
        shape = PrefillEngine(model).shape
        num_tokens = case.document_tokens + case.question_tokens
        resolved = resolve(get_recipe(name), shape, num_tokens, load_profile(options.model, shape))
        found = summary(measure(model, case, resolved.recipe, options.rounds))
        found["effective"] = resolved.recipe.name
        results.append(asdict(case) | found)
        print(json.dumps({key: value for key, value in results[-1].items() if key != "rounds"}), flush=True)
    write(options, model, results)


if __name__ == "__main__":
    main()
