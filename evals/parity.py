"""Do we say what transformers says? Greedy tokens under `exact` against `generate`, token by token.

This is the one rule for comparisons with transformers' tokens, those of the engines without the services included. Two
fp32 programs that sum in different orders differ in the last bits of a logit, so where the two best tokens are closer
than that, either may win. How much that can be:

- One product of rows of length n, summed in fp32, is off by about sqrt(n) * 2^-24 of its size; the longest rows here
  (1536, the MLP) give 2.3e-6. 30 layers of four such steps in sequence add up like a random walk: 2.6e-5 of a logit.
- Logits of this model reach about 50, so 1.3e-3 is the most that rounding explains. Errors mostly cancel in a
  log-probability, and what was measured over these prompts is 1.3e-5.

`NOISE` lies between the two. The log-probabilities that the service reports are held against the reference's with the
same bound, so it is checked in every run and not only assumed.

A token that is not the reference's best counts as equal only where the reference, given the same tokens before it,
puts it less than `NOISE` below its best. Such places are counted and reported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import Random
from typing import Any

import torch

from ..client import Choice, Client, Completion
from ..models.tokenizer import Tokenizer
from .tasks import SUITE, TaskMaker
from .texts import python_topics, token_ids

NOISE = 1e-4
NUM_NEW_TOKENS = 24
END_TOKEN = 2  # end of turn, the only one that ends an answer of this model
REQUEST_TIMEOUT_S = 240.0

CHATS = {
    "chat": [{"role": "user", "content": "What should I pack for a week of hiking in the mountains?"}],
    "chat of three turns": [
        {"role": "system", "content": "Answer in one short sentence."},
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is Paris."},
        {"role": "user", "content": "And which river runs through it?"},
    ],
    "multilingual chat": [{"role": "user", "content": "Übersetze ins Deutsche: „Où est la gare ?“ — и по-русски."}],
}
TEXTS = {
    "code": "def quicksort(items: list[int]) -> list[int]:\n    if len(items) < 2:\n        return items\n    pivot = ",
    "multilingual": "早上好。今天天气很好，我们去公园散步吧。\nこんにちは、世界！ مرحبا بالعالم 🙂 Ça va, merci.\n",
    "one word": "The",
}
DOCUMENTS = {"2K document": ("niah_single_2", 2048), "4K document": ("niah_multiquery", 4096)}
LONG_DOCUMENTS = {"8K document": ("niah_multikey_1", 8192)}


@dataclass(frozen=True)
class Reference:
    """What transformers generates.

    Attributes:
        tokens: greedy tokens; ends with an end-of-text token when that came.
        logprobs: log-probability of each.
    """

    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Verdict:
    """Tokens of one prompt, held against the reference.

    Attributes:
        num_near_ties: places where another token was taken, closer than `NOISE` to the reference's best.
        first_difference: index of the first token that is simply another one, or None.
        logprobs: what the reference, given the same tokens before it, puts each token's log-probability at.
    """

    num_near_ties: int
    first_difference: int | None
    logprobs: list[float]


@dataclass(frozen=True)
class Comparison:
    """One prompt, the service against the reference.

    Attributes:
        num_tokens: tokens compared.
        num_near_ties: places where another token was taken, closer than `NOISE` to the reference's best.
        first_difference: index of the first token that is simply another one, or None.
        logprob_error: largest difference of a token's log-probability; infinite when one is missing, not finite or of
            another token.
    """

    prompt: str
    num_prompt_tokens: int
    num_tokens: int
    num_near_ties: int
    first_difference: int | None
    logprob_error: float

    @property
    def equal(self) -> bool:
        return self.first_difference is None and self.logprob_error < NOISE


def parity_prompts(tokenizer: Tokenizer, *, long: bool = False) -> dict[str, list[int]]:
    """Token ids of prompts of every kind by name; `long` adds the ones that take too long for a test suite."""
    maker = TaskMaker(tokenizer.encode, [token_ids(tokenizer.encode, python_topics())])
    prompts = {name: tokenizer.apply_chat_template(messages) for name, messages in CHATS.items()}
    prompts |= {name: tokenizer.encode(text) for name, text in TEXTS.items()}
    documents = DOCUMENTS | (LONG_DOCUMENTS if long else {})
    for name, (task, num_tokens) in documents.items():
        prompts[name] = SUITE[task](maker, Random(name), num_tokens).prompt_ids
    return prompts


@torch.no_grad()
def generate_reference(
    model: Any, prompt_ids: Sequence[int], num_tokens: int = NUM_NEW_TOKENS, *, ignore_eos: bool = False
) -> Reference:
    """Greedy `generate` of a transformers model."""
    endless = {"min_new_tokens": num_tokens, "eos_token_id": None, "pad_token_id": 0} if ignore_eos else {}
    ids = torch.tensor([list(prompt_ids)])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **endless,
    )
    tokens = output.sequences[0, ids.shape[1] :].tolist()
    rows = torch.stack([step[0] for step in output.logits]).float().log_softmax(-1)
    return Reference(tokens, [float(row[token]) for row, token in zip(rows, tokens, strict=True)])


@torch.no_grad()
def forced_gaps(model: Any, prompt_ids: Sequence[int], tokens: Sequence[int]) -> tuple[list[float], list[float]]:
    """The reference given these tokens: log-probability of each, and how far each lies below the best one."""
    rows = model(torch.tensor([[*prompt_ids, *tokens]]), logits_to_keep=len(tokens) + 1).logits[0, :-1]
    logprobs = rows.float().log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(tokens, dtype=torch.int64)[:, None])[:, 0]
    return own.tolist(), (logprobs.max(-1).values - own).tolist()


def judge(model: Any, prompt_ids: Sequence[int], tokens: Sequence[int], reference: Reference) -> Verdict:
    """Hold tokens against the reference; see the module's docstring for the rule. Their number is not judged."""
    if list(tokens) == reference.tokens:
        return Verdict(0, None, reference.logprobs)
    logprobs, gaps = forced_gaps(model, prompt_ids, tokens)
    near_ties = sum(0.0 < gap < NOISE for gap in gaps)
    return Verdict(near_ties, next((index for index, gap in enumerate(gaps) if not gap < NOISE), None), logprobs)


def compare(
    model: Any, name: str, prompt_ids: Sequence[int], reference: Reference, completion: Completion
) -> Comparison:
    """Hold a completion against the reference."""
    choice = completion.choices[0]
    tokens = list(choice.token_ids)
    if choice.finish_reason == "stop" and tokens[-1:] != [END_TOKEN]:
        tokens.append(END_TOKEN)  # the service need not send the token that ended the answer
    verdict = judge(model, prompt_ids, tokens, reference)
    wrong = verdict.first_difference
    if wrong is None and tokens != reference.tokens and choice.finish_reason == "length":
        wrong = len(tokens) if len(tokens) < NUM_NEW_TOKENS else None  # cut short
    error = _logprob_error(choice, verdict.logprobs)
    return Comparison(name, len(prompt_ids), len(tokens), verdict.num_near_ties, wrong, error)


def _logprob_error(choice: Choice, wanted: Sequence[float]) -> float:
    """The largest difference of a log-probability from those wanted, which may be one more than the choice's tokens."""
    if tuple(item.token_id for item in choice.logprobs) != tuple(choice.token_ids):
        return math.inf
    errors = [abs(item.logprob - own) for item, own in zip(choice.logprobs, wanted, strict=False)]
    return max((error if math.isfinite(error) else math.inf for error in errors), default=0.0)


def ask(client: Client, prompt_ids: Sequence[int], num_tokens: int = NUM_NEW_TOKENS) -> Completion:
    """The service's greedy tokens under `exact`, with their log-probabilities."""
    return client.generate(
        list(prompt_ids),
        recipe="exact",
        temperature=0.0,
        max_tokens=num_tokens,
        logprobs=0,
        timeout_s=REQUEST_TIMEOUT_S,
    )


def compare_singly(
    model: Any, client: Client, prompts: Mapping[str, list[int]], references: Mapping[str, Reference]
) -> list[Comparison]:
    """One request after another."""
    return [compare(model, name, ids, references[name], ask(client, ids)) for name, ids in prompts.items()]


def compare_together(
    model: Any, client: Client, prompts: Mapping[str, list[int]], references: Mapping[str, Reference]
) -> list[Comparison]:
    """All requests at once, so that they share prefill packs and decode batches."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        running = {name: pool.submit(ask, client, ids) for name, ids in prompts.items()}
        completions = {name: future.result() for name, future in running.items()}
    return [compare(model, name, prompts[name], references[name], done) for name, done in completions.items()]
