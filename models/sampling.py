"""From logits to tokens: penalties, filters, counter-based noise, and when a choice ends.

The order is vLLM's (v1 sampler): log-probabilities of the model's own distribution are read first; then min_tokens
masks the ids that would end the choice, logit_bias is added, penalties are applied; greedy choices take the largest
logit; others are divided by the temperature and filtered by min_p, top_k and top_p, each over what those before left.

A token is drawn with noise that is a hash of (seed, choice, position) and its id, so that every worker and every batch
draws the same one.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import InternalError, InvalidRequest
from .drawing import DrawnToken, draw_rows
from .transfers import sent

MAX_LOGPROBS = 20
NOT_FINITE = "the model's logits are not finite"
# as in vLLM; dividing by less would overflow
GREEDY_BELOW = 1e-5
# far beyond any context, and exact in every format that carries them
_MOST = (1 << 31) - 1


@dataclass(frozen=True)
class SamplingParams:
    """What a request asks of sampling; names and meanings as in the OpenAI API and vLLM.

    Attributes:
        max_tokens: most tokens of a choice.
        temperature: 0 (anything below `GREEDY_BELOW`) = greedy.
        top_p, top_k, min_p: filters; 1, 0 and 0 = off.
        repetition_penalty: divides positive and multiplies negative logits of ids in the prompt or the output; 1 = off.
        presence_penalty, frequency_penalty: subtracted once, and once per occurrence, for ids in the output.
        logit_bias: added to the logits of ids.
        seed: of the random numbers.
        stop_token_ids: ids that end a choice besides the model's own.
        min_tokens: ids that end a choice are masked until it has so many tokens.
        ignore_eos: whether the model's own end-of-text ids do not end a choice.
        logprobs: how many of the likeliest alternatives to report beside the sampled token; None = nothing at all.
        n: number of choices.

    Raises:
        InvalidRequest: a value out of range.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_k", "min_tokens", "n", "seed", "logprobs"):
            _check_whole(name, getattr(self, name))
        _check_range("max_tokens", self.max_tokens, 1, _MOST)
        _check_range("temperature", self.temperature, 0, 100)
        _check_range("top_p", self.top_p, 0, 1, open_low=True)
        _check_range("top_k", self.top_k, 0, _MOST)
        _check_range("min_p", self.min_p, 0, 1)
        _check_range("repetition_penalty", self.repetition_penalty, 0.01, 10)
        _check_range("presence_penalty", self.presence_penalty, -2, 2)
        _check_range("frequency_penalty", self.frequency_penalty, -2, 2)
        _check_range("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_range("n", self.n, 1, _MOST)
        _check_range("seed", self.seed, -(1 << 63), (1 << 64) - 1)
        if self.logprobs is not None:
            _check_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        for bias in self.logit_bias.values():
            _check_range("logit_bias", bias, -100, 100)


def _check_range(name: str, value: float, low: float, high: float, open_low: bool = False) -> None:
    # NaN is in no range
    if not low <= value <= high or (open_low and value == low):
        bound = "above" if open_low else "from"
        raise InvalidRequest(f"sampling.{name}", _shown(value), f"a number {bound} {low} to {high}")


def _check_whole(name: str, value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise InvalidRequest(f"sampling.{name}", _shown(value), "a whole number")


def _shown(value: object) -> str:
    # Python refuses to write out very long integers
    return "got a number of many digits" if isinstance(value, int) and abs(value) > 1 << 64 else f"got {value!r}"[:64]


@dataclass(frozen=True)
class Sampled:
    """One sampled token.

    Attributes:
        token_id: its id.
        logprob: natural log of its probability under the model, before temperature, penalties and filters; None when no
            log-probabilities were asked for.
        top: the likeliest (id, logprob) pairs, likeliest first, under the same distribution.
        finish_reason: "" while the choice goes on, else "stop" or "length".
        stop_token: the id that ended the choice, whose text is not part of the answer; None otherwise.
    """

    token_id: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()
    finish_reason: str = ""
    stop_token: int | None = None


class PromptIds:
    """What sampling needs of a prompt, made once and shared, read-only, by all choices of a request.

    Args:
        ids: the prompt.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self.num_tokens = len(ids)
        self._ids = ids
        self._seen: Tensor | None = None

    def seen(self, vocab_size: int, device: torch.device) -> Tensor:
        """Which ids occur: bool [V], shared by the callers, who do not write to it."""
        if self._seen is None or self._seen.device != device or len(self._seen) != vocab_size:
            ids = sent(torch.tensor(self._ids, dtype=torch.int64), device)
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device).index_fill_(0, ids, True)
        return self._seen

    def tensors(self) -> Iterator[Tensor]:
        """What is kept on the device."""
        if self._seen is not None:
            yield self._seen


class SamplerState:
    """Sampling of one choice; a function of its parameters and of the ids so far, nothing else.

    Args:
        params: the request's parameters.
        choice: index of the choice, from 0 to n - 1.
        prompt_ids: the prompt; choices of one request share the work on it when they share one `PromptIds`.
        vocab_size: width of the logits.
        eos_token_ids: the model's own end-of-text ids.

    Raises:
        InvalidRequest: an id of `logit_bias` or `stop_token_ids` is outside the vocabulary, or `min_tokens` and
            `stop_token_ids` leave no id to sample.
    """

    def __init__(
        self,
        params: SamplingParams,
        choice: int,
        prompt_ids: Sequence[int] | PromptIds,
        vocab_size: int,
        eos_token_ids: Sequence[int],
    ) -> None:
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            if any(not 0 <= i < vocab_size for i in ids):
                raise InvalidRequest(
                    f"sampling.{name}", "a token id is out of range", f"ids from 0 to {vocab_size - 1}"
                )
        self.params = params
        self.choice = choice
        self.is_greedy = params.temperature < GREEDY_BELOW
        prompt = prompt_ids if isinstance(prompt_ids, PromptIds) else PromptIds(prompt_ids)
        self._start = prompt.num_tokens
        self._vocab_size = vocab_size
        self._prompt = prompt if params.repetition_penalty != 1 else None
        self._seen: Tensor | None = None  # bool [V]: the ids of prompt and output
        self._counts: Tensor | None = None  # float32 [V]: how often the output has each id
        self._is_counted = bool(self._prompt or params.presence_penalty or params.frequency_penalty)
        self._uncounted: list[int | Tensor] = []  # emitted since the last sampling, not in the tensors yet
        self._num_sampled = 0
        self._stops = frozenset(params.stop_token_ids) | (
            frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        )
        self._masked = sorted({i for i in (*params.stop_token_ids, *eos_token_ids) if i < vocab_size})
        if params.min_tokens and len(self._masked) == vocab_size:
            raise InvalidRequest(
                "sampling.min_tokens", "every token would end the choice", "0, or fewer stop_token_ids"
            )

    @property
    def num_sampled(self) -> int:
        """Tokens of the choice so far, forced ones included."""
        return self._num_sampled

    def sample(self, logits: Tensor) -> Sampled:
        """Draw the next token and move on.

        Args:
            logits: float32 [V]; not changed.

        Raises:
            InternalError: the logits hold NaN, or no token has a positive probability.
        """
        found = sample_rows([self], logits[None])[0]
        if isinstance(found, InternalError):
            raise found
        return found

    @property
    def changes_logits(self) -> bool:
        """Whether the next token is chosen from other logits than the model's."""
        if self._num_sampled < self.params.min_tokens and self._masked:
            return True
        return self._is_counted or bool(self.params.logit_bias)

    @property
    def draw_key(self) -> int:
        """That of the next token's noise, see `drawing.gumbel_noise`."""
        return draw_key(self.params.seed, self.choice, self._start + self._num_sampled)

    def sampled(self, drawn: DrawnToken, num_tokens: int) -> Sampled:
        """A token that was drawn, the choice's `num_tokens`-th, and whether it ends the choice."""
        token_id, _, _, logprob, top = drawn
        if token_id in self._stops:
            return Sampled(token_id, logprob, top, "stop", token_id)
        return Sampled(token_id, logprob, top, "length" if num_tokens >= self.params.max_tokens else "")

    def force(self, token_id: int) -> None:
        """Move on as if `token_id` had been sampled: replay."""
        if self._is_counted:
            self._uncounted.append(token_id)
        self._num_sampled += 1

    def force_drawn(self, ids: Tensor, row: int) -> None:
        """Move on with a token that only the device knows yet: a row of `ids` int64 [rows]."""
        if self._is_counted:
            self._uncounted.append(ids[row : row + 1])
        self._num_sampled += 1

    def tensors(self) -> Iterator[Tensor]:
        """What is kept of its tokens on the device, but for ids that are not counted yet."""
        if self._prompt is not None:
            yield from self._prompt.tensors()
        for held in (self._seen, self._counts):
            if held is not None:
                yield held

    def changed(self, logits: Tensor) -> Tensor:
        """The logits [V] that the next token is chosen from: masked, biased, penalised."""
        params, device = self.params, logits.device
        scores = logits.float().clone()
        if self._num_sampled < params.min_tokens and self._masked:
            scores.index_fill_(0, sent(torch.tensor(self._masked), device), float("-inf"))
        if params.logit_bias:
            biases = sent(torch.tensor(list(params.logit_bias.values()), dtype=torch.float32), device)
            scores.index_add_(0, sent(torch.tensor(list(params.logit_bias)), device), biases)
        if self._is_counted:
            self._count(device)
        if self._seen is not None:
            penalty = params.repetition_penalty
            penalised = torch.where(scores > 0, scores / penalty, scores * penalty)
            scores = torch.where(self._seen, penalised, scores)
        if self._counts is not None:
            counts = self._counts
            scores -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        return scores

    def _count(self, device: torch.device) -> None:
        """Bring the tensors of seen and counted ids up to date: work of the tokens since the last time only."""
        params, vocab_size = self.params, self._vocab_size
        if self._seen is None and self._prompt is not None:
            self._seen, self._prompt = self._prompt.seen(vocab_size, device).clone(), None
        if self._counts is None and (params.presence_penalty or params.frequency_penalty):
            self._counts = torch.zeros(vocab_size, device=device)
        if not self._uncounted:
            return
        parts = [token_id for token_id in self._uncounted if isinstance(token_id, Tensor)]
        known = [token_id for token_id in self._uncounted if not isinstance(token_id, Tensor)]
        if known:
            parts.append(sent(torch.tensor(known), device))
        ids = torch.cat(parts)
        if self._seen is not None:
            self._seen.index_fill_(0, ids, True)
        if self._counts is not None:
            self._counts.index_put_((ids,), torch.ones(len(ids), device=device), accumulate=True)
        self._uncounted.clear()  # last: where memory runs out, they are counted another time


def sample_rows(states: Sequence[SamplerState], logits: Tensor) -> list[Sampled | InternalError]:
    """Draw the next token of every choice and move on; what a choice draws does not depend on the others.

    Args:
        logits: float32 [rows, V]; not changed.

    Returns:
        for every row its token, or what `SamplerState.sample` raises, which leaves the choice where it was.
    """
    found: list[Sampled | InternalError] = []
    for state, drawn in zip(states, draw_rows(states, logits).read(), strict=True):
        if drawn.is_valid:
            state.force(drawn.token_id)
            found.append(state.sampled(drawn, state.num_sampled))
        else:
            found.append(InternalError(NOT_FINITE))
    return found


def draw_key(seed: int, choice: int, position: int) -> int:
    """64 bits, as a signed number, for a position of a choice: alike on every machine."""
    digest = hashlib.blake2b(struct.pack("<QQQ", seed % (1 << 64), choice, position), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
