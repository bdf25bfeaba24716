"""From logits to tokens: penalties, filters, a counter-based random number, and when a choice ends.

The order is vLLM's (v1 sampler): log-probabilities of the model's own distribution are read first; then min_tokens
masks the ids that would end the choice, logit_bias is added, penalties are applied; greedy choices take the largest
logit; others are divided by the temperature and filtered by min_p, top_k and top_p, each over what those before left.

A random number is a hash of (seed, choice, position), so that every worker and every batch draws the same one.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import InternalError, InvalidRequest

MAX_LOGPROBS = 20
_NOT_FINITE = "the model's logits are not finite"
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
    top: list[tuple[int, float]] = field(default_factory=list)
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
            ids = torch.tensor(self._ids, dtype=torch.int64, device=device)
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device).index_fill_(0, ids, True)
        return self._seen


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
        prompt = prompt_ids if isinstance(prompt_ids, PromptIds) else PromptIds(prompt_ids)
        self._start = prompt.num_tokens
        self._vocab_size = vocab_size
        self._prompt = prompt if params.repetition_penalty != 1 else None
        self._seen: Tensor | None = None  # bool [V]: the ids of prompt and output
        self._counts: Tensor | None = None  # float32 [V]: how often the output has each id
        self._is_counted = bool(self._prompt or params.presence_penalty or params.frequency_penalty)
        self._uncounted: list[int] = []  # emitted since the last sampling, not in the tensors yet
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
    def is_greedy(self) -> bool:
        return self.params.temperature < GREEDY_BELOW

    @property
    def changes_logits(self) -> bool:
        """Whether the next token is chosen from other logits than the model's."""
        masked = self._num_sampled < self.params.min_tokens and bool(self._masked)
        return masked or bool(self.params.logit_bias) or self._is_counted

    @property
    def random_number(self) -> float:
        """That of the next token, in [0, 1)."""
        return uniform(self.params.seed, self.choice, self._start + self._num_sampled)

    def take(self, token_id: int, logprob: float | None, top: list[tuple[int, float]]) -> Sampled:
        """Move on with a token that was chosen."""
        self.force(token_id)
        if token_id in self._stops:
            return Sampled(token_id, logprob, top, "stop", token_id)
        return Sampled(token_id, logprob, top, "length" if self._num_sampled >= self.params.max_tokens else "")

    def force(self, token_id: int) -> None:
        """Move on as if `token_id` had been sampled: replay."""
        if self._is_counted:
            self._uncounted.append(token_id)
        self._num_sampled += 1

    def changed(self, logits: Tensor) -> Tensor:
        """The logits [V] that the next token is chosen from: masked, biased, penalised."""
        params, device = self.params, logits.device
        scores = logits.float().clone()
        if self._num_sampled < params.min_tokens and self._masked:
            scores[torch.tensor(self._masked, device=device)] = float("-inf")
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=device)
            scores[ids] += torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)
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
        ids = torch.tensor(self._uncounted, device=device)
        self._uncounted.clear()
        if self._seen is not None:
            self._seen.index_fill_(0, ids, True)
        if self._counts is not None:
            self._counts.index_put_((ids,), torch.ones(len(ids), device=device), accumulate=True)


def sample_rows(states: Sequence[SamplerState], logits: Tensor) -> list[Sampled | InternalError]:
    """Draw the next token of every choice and move on; what a choice draws does not depend on the others.

    Args:
        logits: float32 [rows, V]; not changed.

    Returns:
        for every row its token, or what `SamplerState.sample` raises, which leaves the choice where it was.
    """
    scores = logits.float()
    if any(state.changes_logits for state in states):
        pairs = zip(states, scores, strict=True)
        scores = torch.stack([state.changed(row) if state.changes_logits else row for state, row in pairs])
    ids: list[int | None] = [None] * len(states)
    for pick, chosen in ((_largest, True), (_drawn, False)):
        at = [i for i, state in enumerate(states) if state.is_greedy is chosen]
        if at:
            rows = scores if len(at) == len(states) else scores[torch.tensor(at, device=scores.device)]
            for i, token_id in zip(at, pick([states[i] for i in at], rows), strict=True):
                ids[i] = token_id
    reports = _logprobs(states, logits, ids)
    return [
        InternalError(_NOT_FINITE) if token_id is None else state.take(token_id, *report)
        for state, token_id, report in zip(states, ids, reports, strict=True)
    ]


def _largest(states: Sequence[SamplerState], scores: Tensor) -> list[int | None]:
    """Index of each row's largest score; None where that is not finite."""
    values, indices = scores.max(-1)
    return [
        int(i) if math.isfinite(v) else None for v, i in torch.stack((values.double(), indices.double())).T.tolist()
    ]


def _drawn(states: Sequence[SamplerState], scores: Tensor) -> list[int | None]:
    """Inverse of each row's cumulative distribution, in order of token ids, at the row's random number; None where the
    distribution is not finite."""
    if len(states) == 1 and scores.device.type != "cpu":
        # a single row may be summed in another order than one of many
        return _drawn([states[0], states[0]], scores.expand(2, -1))[:1]

    def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        numbers = [getattr(state.params, name) for state in states]
        return torch.tensor(numbers, dtype=dtype, device=scores.device)[:, None]

    def wanted(name: str, off: float) -> bool:
        return any(getattr(state.params, name) != off for state in states)

    scores = scores / column("temperature")
    if wanted("min_p", 0):
        probabilities = scores.softmax(-1)
        least = column("min_p") * probabilities.amax(-1, keepdim=True)
        scores = scores.masked_fill(probabilities < least, float("-inf"))
    if wanted("top_k", 0):
        scores = _keep_best(scores, [state.params.top_k for state in states])
    if wanted("top_p", 1):
        scores = _keep_nucleus(scores, column("top_p"))
    cumulative = scores.double().softmax(-1).cumsum(-1)
    # rounding may leave the sum beside 1, so the random number is scaled by it, and stays below it
    totals = cumulative[:, -1:]
    numbers = torch.tensor([state.random_number for state in states], dtype=torch.float64, device=scores.device)
    thresholds = torch.minimum(totals * numbers[:, None], torch.nextafter(totals, torch.zeros_like(totals)))
    found = torch.searchsorted(cumulative, thresholds, right=True)
    pairs = torch.cat((totals, found.double()), dim=1).tolist()
    return [int(index) if math.isfinite(total) else None for total, index in pairs]


def _logprobs(
    states: Sequence[SamplerState], logits: Tensor, ids: Sequence[int | None]
) -> list[tuple[float | None, list[tuple[int, float]]]]:
    """Of every row the chosen token's log-probability and the likeliest ones', where they are asked for."""
    out: list[tuple[float | None, list[tuple[int, float]]]] = [(None, []) for _ in states]
    at = [i for i, state in enumerate(states) if state.params.logprobs is not None and ids[i] is not None]
    if not at:
        return out
    logprobs = logits[torch.tensor(at, device=logits.device)].float().log_softmax(-1)
    most = max(states[i].params.logprobs or 0 for i in at)
    values, indices = logprobs.topk(min(most, logprobs.shape[1]))
    own = logprobs.gather(1, torch.tensor([[ids[i]] for i in at], device=logits.device))[:, 0].tolist()
    for i, chosen, row_ids, row in zip(at, own, indices.tolist(), values.tolist(), strict=True):
        out[i] = chosen, list(zip(row_ids, row, strict=True))[: states[i].params.logprobs]
    return out


def _keep_best(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """Keep the `counts` largest of every row, and what equals the least of them; all where a count is 0."""
    vocab_size = scores.shape[1]
    limits = [count if 0 < count < vocab_size else 0 for count in counts]
    if not any(limits):
        return scores
    best = scores.topk(max(limits)).values
    at = torch.tensor([max(limit, 1) - 1 for limit in limits], device=scores.device)[:, None]
    limited = torch.tensor([limit > 0 for limit in limits], device=scores.device)[:, None]
    return scores.masked_fill((scores < best.gather(1, at)) & limited, float("-inf"))


def _keep_nucleus(scores: Tensor, top_p: Tensor) -> Tensor:
    """Keep of every row the smallest set of likeliest tokens whose probability reaches top_p [rows, 1] (Holtzman et
    al., arXiv 1904.09751)."""
    ascending, order = scores.sort(dim=-1, stable=True)
    drop = (ascending.softmax(-1).cumsum(-1) <= 1 - top_p) & (top_p < 1)
    drop[:, -1] = False
    return scores.masked_fill(torch.zeros_like(drop).scatter_(1, order, drop), float("-inf"))


def uniform(seed: int, choice: int, position: int) -> float:
    """The random number in [0, 1) of a position of a choice, 53 bits, alike on every machine."""
    digest = hashlib.blake2b(struct.pack("<QQQ", seed % (1 << 64), choice, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
