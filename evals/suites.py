"""What `kvsluice eval` asks: suites of samples that a seed, a context and an index fix.

    ruler      the eleven tasks of `tasks.py`
    multiturn  five questions over one document, see `turn_tasks.py`
    prefix     the same questions as prompts of their own, of which the later ones find the document
    niah       one needle in natural text, over depth and context
    ppl        how well held-out text is continued

A word of caution on `ppl`: natural text rewards recency. The next word mostly depends on the last few hundred, so a
recipe that keeps a window at the end and forgets everything else does well there and finds no needle. It shows that a
recipe does not break a model; that it keeps what matters, only the other suites can show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal, Protocol

from .tasks import (
    LEAST_HAYSTACK,
    SUITE,
    Encode,
    Sample,
    TaskMaker,
    needle_question,
    needle_text,
    random_key,
    random_value,
)
from .turn_tasks import TURN_SUITE, TurnMaker

SUITE_NAMES = ("ruler", "multiturn", "prefix", "niah", "ppl")
NEEDLE = "needle"
ROOM = 64  # prompt and answer together stay by this much below the context
LEAST_CONTEXT = 256

Rule = Literal["all", "share", "nll"]
"""How an answer is judged: right or wrong as a whole, the share of its tokens that are right, or its mean negative
log-likelihood in nats a token."""


@dataclass(frozen=True, order=True)
class Unit:
    """One sample, to be run under every recipe; the fields are the order of work.

    Attributes:
        sample: its index; the same unit means the same prompt in every run of a suite, seed and texts.
    """

    context: int
    sample: int
    task: str
    depth: float | None = None


@dataclass(frozen=True)
class Turn:
    """A later turn of a conversation.

    Attributes:
        prompt_ids: what goes behind the answer before, up to where the new answer starts; at least one token.
        answer_ids: what must follow, at least one token.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A unit's prompt and answer, and those of later turns.

    Attributes:
        prompt_ids: what is prefilled.
        answer_ids: what must follow, at least one token.
        rule: how the answers are judged. Under `nll` the first token is given and those behind it are judged, so that
            every judged token was predicted over the compressed cache; such a case has no later turns.
        later: turns that follow, over the cache that the turns before have left. Between them stand the right answers.
        apart: prompts that begin with the same document, each asked once this one's beginning is known.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    rule: Rule
    later: tuple[Turn, ...] = ()
    apart: tuple[Case, ...] = ()

    @property
    def following_ids(self) -> tuple[int, ...]:
        """All that follows the prompt: answers, and questions between them."""
        parts = [self.answer_ids, *(part for turn in self.later for part in (turn.prompt_ids, turn.answer_ids))]
        return tuple(token for part in parts for token in part)

    @property
    def answers(self) -> tuple[tuple[int, int], ...]:
        """Where in `following_ids` the answer of each turn begins and ends."""
        found, end = [(0, len(self.answer_ids))], len(self.answer_ids)
        for turn in self.later:
            begin = end + len(turn.prompt_ids)
            end = begin + len(turn.answer_ids)
            found.append((begin, end))
        return tuple(found)


class Suite(Protocol):
    """Units and their samples."""

    name: str

    def tasks(self) -> tuple[str, ...]: ...
    def units(self, contexts: Sequence[int], num_samples: int, tasks: Sequence[str]) -> list[Unit]: ...
    def case(self, unit: Unit) -> Case: ...


def _each_task(contexts: Sequence[int], num_samples: int, tasks: Sequence[str]) -> list[Unit]:
    """So many samples of every task at every context, all tasks of one sample together."""
    return [Unit(context, i, task) for context in contexts for i in range(num_samples) for task in tasks]


def _random(text: str, seed: int) -> Random:
    """The generator of a sample; seed 0 draws what the adapter's own report drew."""
    return Random(text if seed == 0 else f"{text} seed {seed}")


class Ruler:
    """RULER-style tasks (Hsieh et al. 2024, arXiv:2404.06654)."""

    name = "ruler"

    def __init__(self, encode: Encode, texts: Mapping[str, Sequence[int]], seed: int) -> None:
        self._maker = TaskMaker(encode, list(texts.values()))
        self._seed = seed

    def tasks(self) -> tuple[str, ...]:
        return tuple(SUITE)

    def units(self, contexts: Sequence[int], num_samples: int, tasks: Sequence[str]) -> list[Unit]:
        return _each_task(contexts, num_samples, tasks)

    def case(self, unit: Unit) -> Case:
        random = _random(f"{unit.task}{unit.context}{unit.sample}", self._seed)
        sample = SUITE[unit.task](self._maker, random, unit.context - ROOM)
        return _case(sample, "share" if unit.task == "quote" else "all")


class Questions:
    """Five questions over one document, the same ones under either name: as turns of a conversation whose document is
    prefilled once, with the first of them, or as prompts of their own (SCBench, arXiv:2412.10319).

    Args:
        apart: as prompts of their own.
    """

    def __init__(self, encode: Encode, texts: Mapping[str, Sequence[int]], seed: int, apart: bool = False) -> None:
        self.name = "prefix" if apart else "multiturn"
        self._apart = apart
        self._maker = TurnMaker(TaskMaker(encode, list(texts.values())))
        self._seed = seed

    def tasks(self) -> tuple[str, ...]:
        return tuple(TURN_SUITE)

    def units(self, contexts: Sequence[int], num_samples: int, tasks: Sequence[str]) -> list[Unit]:
        return _each_task(contexts, num_samples, tasks)

    def case(self, unit: Unit) -> Case:
        random = _random(f"turns {unit.task}{unit.context}{unit.sample}", self._seed)
        sample = TURN_SUITE[unit.task](self._maker, random, unit.context - ROOM)
        rule: Rule = "share" if unit.task == "quote" else "all"
        first = _case(sample.first, rule)
        if self._apart:
            return replace(first, apart=tuple(_case(one, rule) for one in sample.apart))
        later = (Turn(tuple(turn.prompt_ids), tuple(turn.answer_ids)) for turn in sample.later)
        return replace(first, later=tuple(later))


class NeedleGrid:
    """One number hidden in natural text. Sample i has the same text, key and number at every depth: only where the
    fact stands differs.

    Args:
        depths: shares of the text that stand in front of the fact, each from 0 to 1.
    """

    name = "niah"

    def __init__(self, encode: Encode, texts: Mapping[str, Sequence[int]], seed: int, depths: Sequence[float]) -> None:
        self._encode = encode
        self._maker = TaskMaker(encode, list(texts.values()))
        self._seed = seed
        self._depths = tuple(depths)

    def tasks(self) -> tuple[str, ...]:
        return (NEEDLE,)

    def units(self, contexts: Sequence[int], num_samples: int, tasks: Sequence[str]) -> list[Unit]:
        return [
            Unit(context, i, task, depth)
            for context in contexts
            for i in range(num_samples)
            for task in tasks
            for depth in self._depths
        ]

    def case(self, unit: Unit) -> Case:
        assert unit.depth is not None, "units of this suite have a depth"
        random = _random(f"{unit.task}{unit.context}{unit.sample}", self._seed)
        key, value = random_key(random), random_value(random, "number")
        fact = self._encode(needle_text("number", key, value))
        before, after, answer = self._maker.frame(needle_question("number", [key], [value], several=False))
        room = unit.context - ROOM - len(before) - len(after) - len(answer) - len(fact)
        hay = self._maker.haystack(random, max(room, LEAST_HAYSTACK), "text")
        cut = round(unit.depth * len(hay))
        return _case(Sample(before + hay[:cut] + fact + hay[cut:] + after, answer), "all")


class Perplexity:
    """`context` tokens of a text from a random place are prefilled, and the next ones judged, teacher-forced, over the
    compressed cache. A score is the mean negative log-likelihood in nats a token: perplexity is its exponential. Read
    the module's docstring before a conclusion is drawn from it.

    Args:
        num_scored: tokens that are judged.
    """

    name = "ppl"

    def __init__(self, texts: Mapping[str, Sequence[int]], seed: int, num_scored: int) -> None:
        self._texts = texts
        self._seed = seed
        self._num_scored = num_scored

    def tasks(self) -> tuple[str, ...]:
        return tuple(self._texts)

    def num_tokens(self, context: int) -> int:
        """Tokens of a text that a sample takes: context, one that is given, and those that are judged."""
        return context + 1 + self._num_scored

    def units(self, contexts: Sequence[int], num_samples: int, tasks: Sequence[str]) -> list[Unit]:
        return _each_task(contexts, num_samples, tasks)

    def case(self, unit: Unit) -> Case:
        text, wanted = self._texts[unit.task], self.num_tokens(unit.context)
        random = _random(f"{unit.task}{unit.context}{unit.sample}", self._seed)
        start = random.randrange(len(text) - wanted + 1)
        ids = tuple(text[start : start + wanted])
        return Case(ids[: unit.context], ids[unit.context :], "nll")


def _case(sample: Sample, rule: Rule) -> Case:
    return Case(tuple(sample.prompt_ids), tuple(sample.answer_ids), rule)
