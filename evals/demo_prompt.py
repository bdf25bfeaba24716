"""The demo's document: some pages of Python's language reference with facts hidden in it, and questions about them."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from .tasks import Encode, TaskMaker, distinct, needle_question, needle_text, random_key, random_value
from .texts import python_topics, token_ids

NUM_TOKENS = 4096
NUM_FACTS = 8
SEED = 0
KEYS_OF_QUESTIONS = (1, 1, 1, 3)  # how many facts each question asks for


@dataclass(frozen=True)
class DemoQuestion:
    """One question over the document.

    Attributes:
        text: the question as a person reads it.
        prompt_ids: the whole prompt, document included, ending with the first words of the answer.
        values: what must come next, in order.
    """

    text: str
    prompt_ids: list[int]
    values: list[str]

    def given(self, answer: str) -> list[str | None]:
        """The values that an answer gives, position by position; None where it gives none."""
        said = [part.strip() for part in answer.split(",")]
        return [said[i] if i < len(said) else None for i in range(len(self.values))]

    def num_right(self, answer: str) -> int:
        """How many of the asked values stand in their place."""
        return sum(given == value for given, value in zip(self.given(answer), self.values, strict=True))


def demo_questions(encode: Encode, num_tokens: int = NUM_TOKENS, seed: int = SEED) -> list[DemoQuestion]:
    """The questions of the demo; all of them over one document of about `num_tokens` tokens, facts included."""
    random = Random(seed)
    maker = TaskMaker(encode, [token_ids(encode, python_topics())])
    facts = {key: random_value(random, "number") for key in distinct(lambda: random_key(random), NUM_FACTS)}
    needles = [encode(needle_text("number", key, value)) for key, value in facts.items()]
    hay = maker.haystack(random, num_tokens - sum(map(len, needles)), "text")
    document = maker.weave(random, hay, needles)
    order = random.sample(list(facts), NUM_FACTS)
    questions = []
    for num_keys in KEYS_OF_QUESTIONS:
        keys, order = order[:num_keys], order[num_keys:]
        values = [facts[key] for key in keys]
        question = needle_question("number", keys, values, several=num_keys > 1)
        before, after, _ = maker.frame(question)
        questions.append(DemoQuestion(question.question, before + document + after, values))
    return questions
