"""Long-context tasks in the manner of RULER (Hsieh et al. 2024, arXiv:2404.06654) over real text.

A sample is a prompt that ends where the answer starts, and the answer: the model is right when it continues the
prompt with exactly the answer's tokens. Facts ("needles") are woven into running text, repeated noise, or other facts.
The long-context adapter was trained on these tasks, so their wording is part of the model: samples of one seed must
never change, and a test holds hashes of them.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Literal

Encode = Callable[[str], list[int]]
"""Text to token ids; the strings of special tokens become their ids, and none is added."""
Haystack = Literal["noise", "text", "needles"]
ValueKind = Literal["number", "uuid", "word"]

ADJECTIVES = (
    "amber brisk calm dusty eager faint gentle hollow icy jolly keen lively mellow noble odd plain quiet rapid silent "
    "tidy upbeat vivid warm young zesty bold crisp dim early fresh grand huge idle"
).split()
NOUNS = (
    "anchor basket candle desert engine feather garden harbor island jacket kettle ladder marble needle orchard pencil "
    "quarry ribbon saddle temple umbrella valley window yacht zipper bridge castle dragon falcon guitar hammer insect "
    "jungle"
).split()
PEOPLE = "Mary John Sandra Daniel Alice Peter Laura Simon Emma Oscar".split()
PLACES = "kitchen garden office bedroom bathroom hallway park school library cinema".split()
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
BEFORE_USER = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
BEFORE_ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
END_OF_TURN = "<|im_end|>"

MAX_FACTS = 800
LEAST_HAYSTACK = 16  # tokens of text around the facts, however short the prompt


@dataclass(frozen=True)
class Sample:
    """A question over a long text.

    Attributes:
        prompt_ids: chat-formatted prompt, ending with the first words of the assistant's answer.
        answer_ids: what the assistant must go on with, end of turn included (but for `quote`, which has none).
    """

    prompt_ids: list[int]
    answer_ids: list[int]


@dataclass(frozen=True)
class Question:
    """The words around the haystack, and the answer."""

    intro: str
    question: str
    answer_prefix: str
    answer: str


def random_key(random: Random) -> str:
    """An adjective and a noun, such as `brisk-anchor`."""
    return f"{random.choice(ADJECTIVES)}-{random.choice(NOUNS)}"


def random_value(random: Random, kind: ValueKind) -> str:
    """Seven digits, a UUID-like string, or another key."""
    if kind == "number":
        return str(random.randint(1_000_000, 9_999_999))
    if kind == "uuid":
        return "-".join("".join(random.choices("0123456789abcdef", k=size)) for size in (8, 4, 4, 4, 12))
    return random_key(random)


def distinct(make: Callable[[], str], count: int) -> list[str]:
    """The first `count` different values that `make` gives."""
    found: list[str] = []
    while len(found) < count:
        value = make()
        if value not in found:
            found.append(value)
    return found


def needle_text(kind: ValueKind, key: str, value: str) -> str:
    """One fact, as the adapter was trained to read it."""
    return f" One of the special magic {kind}s for {key} is: {value}. "


def needle_question(kind: ValueKind, keys: Sequence[str], values: Sequence[str], *, several: bool) -> Question:
    """Ask for the values of `keys`; `several` when more than one value answers."""
    word = kind + ("s" if several else "")
    named = ", and ".join([", ".join(keys[:-1]), keys[-1]]) if len(keys) > 1 else keys[0]
    return Question(
        intro=f"Some special magic {kind}s are hidden within the following text. Make sure to memorize "
        "them. I will quiz you about them afterwards.\n",
        question=f"What {'are all' if several else 'is'} the special magic {word} for {named} mentioned in the "
        "provided text?",
        answer_prefix=f"The special magic {word} for {named} mentioned in the provided text "
        f"{'are' if several else 'is'}",
        answer=", ".join(values),
    )


def state_question(who: str, place: str) -> Question:
    """Ask where somebody is in the end."""
    return Question(
        intro="Read the following text; some people move between places in it.\n",
        question=f"Where is {who} at the end of the text?",
        answer_prefix=f"At the end of the text, {who} is in the",
        answer=place,
    )


class TaskMaker:
    """Makes samples; every random choice comes from the generator that is passed in.

    Args:
        encode: the model's tokenizer.
        texts: token ids of natural texts, each longer than the longest prompt where prompts shall not repeat text.
    """

    def __init__(self, encode: Encode, texts: Sequence[Sequence[int]]) -> None:
        self.encode = encode
        self._texts = [list(text) for text in texts]
        self._noise = encode(NOISE)
        self._before_user = encode(BEFORE_USER)
        self._before_answer = encode(BEFORE_ANSWER)
        self._end_of_turn = encode(END_OF_TURN)

    def haystack(self, random: Random, num_tokens: int, kind: Haystack) -> list[int]:
        """`num_tokens` tokens to hide facts in."""
        if kind == "noise":
            return (self._noise * (num_tokens // len(self._noise) + 1))[:num_tokens]
        text = random.choice(self._texts)
        start = random.randrange(max(1, len(text) - num_tokens))
        hay = text[start : start + num_tokens]
        while len(hay) < num_tokens:
            hay = hay + text[: num_tokens - len(hay)]
        return hay

    def weave(self, random: Random, hay: list[int], facts: Sequence[list[int]]) -> list[int]:
        """The facts in their order at random places of the haystack."""
        cuts = sorted(random.randrange(len(hay) + 1) for _ in facts)
        woven: list[int] = []
        begin = 0
        for cut, fact in zip(cuts, facts, strict=True):
            woven += hay[begin:cut] + fact
            begin = cut
        return woven + hay[begin:]

    def assemble(
        self, random: Random, num_tokens: int, hay: Haystack, facts: Sequence[list[int]], question: Question
    ) -> Sample:
        """A sample of `num_tokens` tokens with its answer; longer when the facts alone take more."""
        before, after, answer = self.frame(question)
        if hay == "needles":
            body = [token for fact in facts for token in fact]
        else:
            room = num_tokens - len(before) - len(after) - len(answer) - sum(map(len, facts))
            body = self.weave(random, self.haystack(random, max(room, LEAST_HAYSTACK), hay), facts)
        return Sample(before + body + after, answer)

    def frame(self, question: Question) -> tuple[list[int], list[int], list[int]]:
        """Token ids that stand before the text, after it, and in the answer."""
        before = self.before_text(question.intro)
        asked, prefix = self.encode("\n" + question.question), self.encode(question.answer_prefix)
        return before, asked + self._before_answer + prefix, self.encode(" " + question.answer) + self._end_of_turn

    def before_text(self, intro: str) -> list[int]:
        """Token ids that open a prompt."""
        return self._before_user + self.encode(intro)

    def needles(
        self,
        random: Random,
        num_tokens: int,
        hay: Haystack,
        num_keys: int,
        kind: ValueKind,
        num_values: int = 1,
        num_queries: int = 1,
    ) -> Sample:
        """Key-value facts; asks for all values of `num_queries` of the `num_keys` keys (RULER: niah)."""
        keys = distinct(lambda: random_key(random), num_keys)
        asked = random.sample(keys, num_queries)
        values = {key: [random_value(random, kind) for _ in range(num_values if key in asked else 1)] for key in keys}
        pairs = [(key, value) for key in keys for value in values[key]]
        random.shuffle(pairs)
        facts = [self.encode(needle_text(kind, key, value)) for key, value in pairs]
        answers = [value for wanted in asked for key, value in pairs if key == wanted]
        question = needle_question(kind, asked, answers, several=num_values * num_queries > 1)
        return self.assemble(random, num_tokens, hay, facts, question)

    def variable_tracking(
        self, random: Random, num_tokens: int, hay: Haystack, num_chains: int = 1, num_hops: int = 4
    ) -> Sample:
        """Chains of variable assignments; asks which variables hold the first chain's value (RULER: vt)."""
        size = num_hops + 1
        names = distinct(lambda: "".join(random.choices(string.ascii_uppercase, k=5)), num_chains * size)
        chains, numbers = [], []
        for begin in range(0, len(names), size):
            own = names[begin : begin + size]
            numbers.append(str(random.randint(10_000, 99_999)))
            copies = [f" VAR {new} = VAR {old}. " for old, new in pairwise(own)]
            chains.append([f" VAR {own[0]} = {numbers[-1]}. ", *copies])
        facts = []
        while left := [chain for chain in chains if chain]:
            facts.append(self.encode(random.choice(left).pop(0)))
        question = Question(
            intro="Memorize and track the chain(s) of variable assignment hidden in the following text.\n",
            question=f"Find all variables that are assigned the value {numbers[0]} in the text above.",
            answer_prefix="According to the chain(s) of variable assignment in the text above, "
            f"{size} variables are assigned the value {numbers[0]}, they are:",
            answer=" ".join(names[:size]),
        )
        return self.assemble(random, num_tokens, hay, facts, question)

    def state(self, random: Random, num_tokens: int, hay: Haystack, num_people: int = 4, num_moves: int = 12) -> Sample:
        """People move between places; asks where one of them ends up, so the last fact counts, not the first."""
        people = random.sample(PEOPLE, num_people)
        moves = [(random.choice(people), random.choice(PLACES)) for _ in range(num_moves)]
        who = random.choice(moves)[0]
        question = state_question(who, [place for person, place in moves if person == who][-1])
        facts = [self.encode(f" {person} went to the {place}. ") for person, place in moves]
        return self.assemble(random, num_tokens, hay, facts, question)

    def quote(self, random: Random, num_tokens: int, num_given: int = 24, num_asked: int = 24) -> Sample:
        """Asks to go on with a quotation from the text, so every part of the text may be needed."""
        around = 120  # room for the words around the text
        hay = self.haystack(random, num_tokens - around - num_given - num_asked, "text")
        start = random.randrange(len(hay) - num_given - num_asked)
        prompt = (
            self.before_text("Here is a text.\n")
            + hay
            + self.encode("\nContinue the quotation from the text above exactly.")
            + self._before_answer
        )
        middle, end = start + num_given, start + num_given + num_asked
        return Sample(prompt + hay[start:middle], hay[middle:end])


def max_facts(num_tokens: int, tokens_per_fact: int) -> int:
    """How many facts fill a prompt that holds nothing else."""
    return min(MAX_FACTS, (num_tokens - 300) // tokens_per_fact)


FACT_TOKENS: Mapping[ValueKind, int] = {"number": 36, "uuid": 70, "word": 36}

Task = Callable[[TaskMaker, Random, int], Sample]

SUITE: Mapping[str, Task] = {
    "niah_single_1": lambda maker, random, size: maker.needles(random, size, "noise", 1, "number"),
    "niah_single_2": lambda maker, random, size: maker.needles(random, size, "text", 1, "number"),
    "niah_single_3": lambda maker, random, size: maker.needles(random, size, "text", 1, "uuid"),
    "niah_multikey_1": lambda maker, random, size: maker.needles(random, size, "text", 4, "number"),
    "niah_multikey_2": lambda maker, random, size: maker.needles(
        random, size, "needles", max_facts(size, FACT_TOKENS["number"]), "number"
    ),
    "niah_multikey_3": lambda maker, random, size: maker.needles(
        random, size, "needles", max_facts(size, FACT_TOKENS["uuid"]), "uuid"
    ),
    "niah_multivalue": lambda maker, random, size: maker.needles(random, size, "text", 4, "number", 4, 1),
    "niah_multiquery": lambda maker, random, size: maker.needles(random, size, "text", 4, "number", 1, 4),
    "vt": lambda maker, random, size: maker.variable_tracking(random, size, "noise", 1, 4),
    "state": lambda maker, random, size: maker.state(random, size, "text", 4, 12),
    "quote": lambda maker, random, size: maker.quote(random, size),
}
"""The eleven tasks of an evaluation; call one as `SUITE[name](maker, Random(seed), num_tokens)`."""


def training_sample(maker: TaskMaker, random: Random, num_tokens: int) -> Sample:
    """A sample of a random task with random settings, in the mixture that the adapter was trained on."""
    hay: Haystack = random.choice(["text", "text", "text", "noise"])
    share = random.random()
    if share < 0.45:
        return _training_needles(maker, random, num_tokens, hay)
    if share < 0.58:
        num_keys = random.choice([1, 4, 8])
        kind: ValueKind = random.choice(["number", "word"])
        return maker.needles(random, num_tokens, hay, num_keys, kind, random.choice([2, 4]), 1)
    if share < 0.74:
        num_chains = random.choice([1, 1, 2, 4])
        return maker.variable_tracking(random, num_tokens, hay, num_chains, random.choice([2, 3, 4]))
    if share < 0.84:
        num_people = random.choice([2, 4, 8])
        return maker.state(random, num_tokens, hay, num_people, random.choice([6, 12, 24]))
    return maker.quote(random, num_tokens)


def _training_needles(maker: TaskMaker, random: Random, num_tokens: int, hay: Haystack) -> Sample:
    only_facts = random.random() < 0.25
    num_keys = 0 if only_facts else random.choice([1, 2, 4, 8, 16, 32])
    kind: ValueKind = random.choice(["number", "number", "uuid", "word"])
    if only_facts:
        hay = "needles"
        num_keys = min(max(4, (num_tokens - 300) // FACT_TOKENS[kind]), MAX_FACTS)
    num_queries = 1
    if random.random() >= 0.7 and num_keys >= 4:
        num_queries = random.choice([2, 4])
    return maker.needles(random, num_tokens, hay, num_keys, kind, 1, num_queries)
