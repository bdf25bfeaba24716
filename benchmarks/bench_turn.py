"""Time to the first token of a conversation's second turn, beside that of its first.

    python -P -m kvsluice.benchmarks.bench_turn --out benchmarks/results/second_turn_cpu.json

A round is a conversation over a new document of random tokens: the prefill engine runs the prompt to its first token
(`first`), the decode engine says a few more and keeps the cache, and the second turn's tokens run behind them over that
cache, on the same engine, up to the first token of its answer (`second`). `again` is what the second turn would take
without a session: all that was said, and the new tokens, as a prompt of their own. A round gives ratios, and the median
of the rounds counts.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from ..compression.recipe import Recipe, get_recipe, resolve
from ..compression.slots import TspPropagation
from ..errors import InternalError
from ..models.checkpoint import locate
from ..models.loader import load_model
from ..models.model import Model
from ..models.profiles import load_profile
from ..models.sampling import SamplingParams
from ..services.decode.engine import DecodeEngine, DecodeRequest, EmittedChoice, FailedEvent, TokensEvent
from ..services.decode.kept_sessions import SessionTurn
from ..services.model_shape import model_shape
from ..services.prefill.engine import PrefillEngine
from .first_token import FirstToken, add_options, check_counts, first_token, write

ANSWER_TOKENS = 4  # of each turn


@dataclass(frozen=True)
class Round:
    """Seconds to the first token."""

    first_s: float
    second_s: float
    again_s: float


class Conversation:
    """Both engines over one model.

    Args:
        capacity_bytes: of decode, sessions included.
    """

    def __init__(self, model: Model, chunk_tokens: int, capacity_bytes: int) -> None:
        self._prefill = PrefillEngine(model, chunk_tokens, max(2048, chunk_tokens))
        self._decode = DecodeEngine(model, capacity_bytes, session_bytes=capacity_bytes // 2)
        self._sampling = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True)
        self._key = ""  # of the conversation that goes on; what others have left makes room

    def prefill(self, ids: Sequence[int], recipe: Recipe) -> FirstToken:
        """Run a prompt."""
        return first_token(self._prefill, ids, recipe, self._sampling, keeps_layers=True)

    def first_turn(self, ids: Sequence[int], recipe: Recipe, done: FirstToken) -> tuple[int, ...]:
        """Decode behind a prompt, and keep the cache. Returns the answer."""
        self._key += "'"
        self._decode.open(DecodeRequest("one", 1, len(ids), recipe, self._sampling, session_key=self._key))
        for layer in done.layers:
            self._decode.add_layer("one", layer)
        said = [one.token_id for one in done.sampled]
        self._decode.commit("one", tuple(ids), [EmittedChoice(tuple(said), done.sampled[0].finish_reason)])
        while self._decode.has_work:
            said += [token.token_id for event in self._step() for token in event.sampled]
        return tuple(said)

    def second_turn(self, ids: Sequence[int], recipe: Recipe, history: Sequence[int]) -> float:
        """Run what follows the prompt over the cache that was kept. Returns seconds to the first new token."""
        begun, begun_s = EmittedChoice(tuple(history)), time.perf_counter()
        request = DecodeRequest(
            "two", 2, len(ids), recipe, self._sampling, history_tokens=len(history), session_key=self._key
        )
        self._decode.open(request)
        self._step()
        if not self._decode.adopt("two", SessionTurn(1, tuple(ids), len(ids), begun)):
            raise InternalError("the first turn's cache was not kept")
        self._decode.commit("two", tuple(ids), [begun])
        came_s = None
        while self._decode.has_work:
            if self._step() and came_s is None:
                came_s = time.perf_counter()
        assert came_s is not None, "a turn has a token"
        return came_s - begun_s

    def _step(self) -> list[TokensEvent]:
        events = self._decode.step()
        for event in events:
            if isinstance(event, FailedEvent):
                raise event.error
        return [event for event in events if isinstance(event, TokensEvent)]


@dataclass(frozen=True)
class Lengths:
    """What is measured, in tokens: the document with its first question, and the second turn's."""

    context: int
    turn: int
    chunk: int


def measure(
    model: Model, lengths: Lengths, recipe: Recipe, rounds: int, capacity_bytes: int, seed: int = 0
) -> list[Round]:
    """Run conversations.

    Args:
        recipe: resolved for prompts of this length.
        capacity_bytes: of decode; two conversations must fit.

    Raises:
        KvsluiceError: whatever the engines failed with.
    """
    draw, vocab_size = random.Random(seed), model.config.vocab_size

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocab_size) for _ in range(count))

    both = Conversation(model, lengths.chunk, capacity_bytes)
    both.prefill(ids(lengths.chunk), get_recipe("exact"))  # warms up
    found = []
    for _ in range(rounds):
        prompt, question = ids(lengths.context), ids(lengths.turn)
        first = both.prefill(prompt, recipe)
        history = (*both.first_turn(prompt, recipe, first), *question)
        second_s = both.second_turn(prompt, recipe, history)
        again = both.prefill((*prompt, *history), recipe)
        found.append(Round(first.seconds, second_s, again.seconds))
    return found


def summary(rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians of the rounds' seconds and of their ratios."""
    return {
        "first_s": median(one.first_s for one in rounds),
        "second_s": median(one.second_s for one in rounds),
        "again_s": median(one.again_s for one in rounds),
        "second_over_first": median(one.second_s / one.first_s for one in rounds),
        "second_over_again": median(one.second_s / one.again_s for one in rounds),
        "rounds": [asdict(one) for one in rounds],
    }


def chosen_recipes(names: Sequence[str], recall: float) -> dict[str, Recipe]:
    """Recipes by label; where `recall` is above 0, those that select rows come with it as well."""
    found = {}
    for name in names:
        recipe = found[name] = get_recipe(name)
        if recall and isinstance(recipe.propagation, TspPropagation):
            propagation = replace(recipe.propagation, recall=recall)
            found[f"{name} with recall"] = replace(recipe, propagation=propagation)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each recipe, print a line each, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--recall", type=float, default=0.05, help="share of the prompt; 0 = without alone")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--turn-tokens", type=int, default=64)
    parser.add_argument("--capacity-gib", type=float, default=4.0, help="memory of decode")
    options = parser.parse_args(argv)
    check_counts(options, "context", "turn_tokens")
    model = load_model(options.model, device=options.device)
    shape = model_shape(model.config)
    profile = load_profile(locate(options.model).name, shape)
    lengths = Lengths(options.context, options.turn_tokens, options.chunk_tokens)
    results = []
    for label, recipe in chosen_recipes(options.recipes, options.recall).items():
        resolved = resolve(recipe, shape, options.context, profile)
        rounds = measure(model, lengths, resolved.recipe, options.rounds, int(options.capacity_gib * (1 << 30)))
        results.append({"recipe": label, "effective": resolved.recipe.name, **asdict(lengths), **summary(rounds)})
        print(json.dumps({key: value for key, value in results[-1].items() if key != "rounds"}), flush=True)
    write(options, model, results)


if __name__ == "__main__":
    main()
