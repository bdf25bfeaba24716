"""Five questions over one document, as `tasks.py` asks one: retrieval in several turns, or from several requests, over
what is computed once (SCBench, arXiv:2412.10319).

The document is that of a task of `tasks.py`, with five facts, people or passages to ask for. The first question stands
behind it in the prompt; the others come as messages of the same conversation, each opened as the first one is, up to
the first words of the answer. Which is asked when is drawn for each sample, apart from where the facts lie: so that
turns differ by nothing but by how many came before. The same questions also come as prompts of their own, each behind
the same document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from .tasks import (
    BEFORE_ANSWER,
    END_OF_TURN,
    FACT_TOKENS,
    PEOPLE,
    PLACES,
    Haystack,
    Question,
    Sample,
    TaskMaker,
    ValueKind,
    distinct,
    max_facts,
    needle_question,
    needle_text,
    random_key,
    random_value,
    state_question,
)

NUM_TURNS = 5
BEFORE_NEXT_USER = "\n<|im_start|>user\n"
"""Behind the end of the assistant's turn, as the default model's chat template has it."""
NUM_MOVES = 15
QUOTE_GIVEN = QUOTE_ASKED = 24
QUOTE_ROOM = 60  # tokens of the words around a quotation, at most
QUOTE_REQUEST = "Continue the quotation from the text above exactly."


@dataclass(frozen=True)
class TurnsSample:
    """A document and its questions.

    Attributes:
        first: the document with the first question, and the first answer.
        later: of each further turn, what goes behind the last answer, up to the first words of the new one; and the
            answer.
        apart: the questions of `later` as prompts of their own, each behind the same document.
    """

    first: Sample
    later: list[Sample]
    apart: list[Sample]


class TurnMaker:
    """Makes samples; every random choice comes from the generator that is passed in.

    Args:
        encode, texts: see `TaskMaker`.
    """

    def __init__(self, maker: TaskMaker) -> None:
        self._maker = maker
        self._encode = maker.encode

    def needles(
        self, random: Random, num_tokens: int, hay: Haystack, kind: ValueKind, num_keys: int = NUM_TURNS
    ) -> TurnsSample:
        """Key-value facts; each turn asks for the value of another key."""
        keys = distinct(lambda: random_key(random), num_keys)
        values = dict(zip(keys, distinct(lambda: random_value(random, kind), num_keys), strict=True))
        pairs = list(values.items())
        random.shuffle(pairs)
        facts = [self._encode(needle_text(kind, key, value)) for key, value in pairs]
        asked = random.sample(keys, NUM_TURNS)
        questions = [needle_question(kind, [key], [values[key]], several=False) for key in asked]
        return self._assemble(random, num_tokens, hay, facts, questions)

    def state(self, random: Random, num_tokens: int, hay: Haystack) -> TurnsSample:
        """People move between places, each of them at least once; each turn asks where another one ends up."""
        people = random.sample(PEOPLE, NUM_TURNS)
        movers = people + random.choices(people, k=NUM_MOVES - NUM_TURNS)
        random.shuffle(movers)
        moves = [(person, random.choice(PLACES)) for person in movers]
        ends = dict(moves)  # the last place of each
        random.shuffle(people)
        facts = [self._encode(f" {person} went to the {place}. ") for person, place in moves]
        return self._assemble(random, num_tokens, hay, facts, [state_question(who, ends[who]) for who in people])

    def quote(self, random: Random, num_tokens: int) -> TurnsSample:
        """Each turn asks to go on with another passage of the text; no two of them overlap."""
        length = QUOTE_GIVEN + QUOTE_ASKED
        room = num_tokens - NUM_TURNS * (length + QUOTE_ROOM)
        if room < NUM_TURNS * length:
            raise ValueError(f"{num_tokens} tokens hold no {NUM_TURNS} passages of {length} and the questions")
        hay = self._maker.haystack(random, room, "text")
        # as many gaps as there are passages, and one behind the last
        cuts = sorted(random.randrange(len(hay) - NUM_TURNS * length + 1) for _ in range(NUM_TURNS))
        starts = [cut + place * length for place, cut in enumerate(cuts)]
        random.shuffle(starts)
        turns = []
        for start in starts:
            middle = start + QUOTE_GIVEN
            turns.append((hay[start:middle], hay[middle : middle + QUOTE_ASKED]))
        before = self._maker.before_text("Here is a text.\n")
        asked, opening = self._encode("\n" + QUOTE_REQUEST), self._encode(BEFORE_ANSWER)
        again = self._encode(END_OF_TURN + BEFORE_NEXT_USER + QUOTE_REQUEST) + opening
        alone = [Sample(before + hay + asked + opening + given, answer) for given, answer in turns]
        later = [Sample(again + given, answer) for given, answer in turns[1:]]
        return TurnsSample(alone[0], later, alone[1:])

    def _assemble(
        self, random: Random, num_tokens: int, hay: Haystack, facts: Sequence[list[int]], questions: Sequence[Question]
    ) -> TurnsSample:
        """All turns together take `num_tokens` tokens; more when the facts alone do."""
        later = [self._later(question) for question in questions[1:]]
        behind = sum(len(turn.prompt_ids) + len(turn.answer_ids) for turn in later)
        first = self._maker.assemble(random, num_tokens - behind, hay, facts, questions[0])
        frames = [self._maker.frame(question) for question in questions]
        document = first.prompt_ids[: len(first.prompt_ids) - len(frames[0][1])]
        return TurnsSample(first, later, [Sample(document + asked, answer) for _, asked, answer in frames[1:]])

    def _later(self, question: Question) -> Sample:
        """A turn behind an answer that has ended its own."""
        asked = self._encode(BEFORE_NEXT_USER + question.question) + self._encode(BEFORE_ANSWER)
        answer = self._encode(" " + question.answer) + self._encode(END_OF_TURN)
        return Sample(asked + self._encode(question.answer_prefix), answer)


def _facts(num_tokens: int, kind: ValueKind) -> int:
    """How many facts fill a document that holds nothing else, the turns behind the first having room."""
    num_facts = max_facts(num_tokens - (NUM_TURNS - 1) * TURN_TOKENS[kind], FACT_TOKENS[kind])
    if num_facts < NUM_TURNS:
        raise ValueError(f"{num_tokens} tokens hold no {NUM_TURNS} facts")
    return num_facts


TURN_TOKENS: Mapping[ValueKind, int] = {"number": 80, "uuid": 110, "word": 80}  # of a question and its answer, at most

TurnTask = Callable[[TurnMaker, Random, int], TurnsSample]

TURN_SUITE: Mapping[str, TurnTask] = {
    "numbers_in_noise": lambda maker, random, size: maker.needles(random, size, "noise", "number"),
    "numbers_in_text": lambda maker, random, size: maker.needles(random, size, "text", "number"),
    "uuids_in_text": lambda maker, random, size: maker.needles(random, size, "text", "uuid"),
    "many_numbers": lambda maker, random, size: maker.needles(
        random, size, "needles", "number", _facts(size, "number")
    ),
    "many_uuids": lambda maker, random, size: maker.needles(random, size, "needles", "uuid", _facts(size, "uuid")),
    "state": lambda maker, random, size: maker.state(random, size, "text"),
    "quote": lambda maker, random, size: maker.quote(random, size),
}
"""The tasks by name; call one as `TURN_SUITE[name](maker, Random(seed), num_tokens)`."""
