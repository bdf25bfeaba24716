"""Drawing tokens from logits, on the logits' device: nothing here waits for it until `Drawn.read`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .transfers import Fetched, sent

if TYPE_CHECKING:
    from .sampling import SamplerState

# SplitMix64's constants, as signed numbers
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)
_FIELDS = 3  # of a row in `Drawn`: the token, whether it could be drawn, whether its logits are all finite


class DrawnToken(NamedTuple):
    """What was drawn for a row.

    Attributes:
        token_id: within the vocabulary whatever the logits were.
        is_valid: there was a token to draw: the scores that it was chosen from have a finite largest one or sum.
        is_finite: all logits of the row are finite numbers.
        logprob, top: see `sampling.Sampled`.
    """

    token_id: int
    is_valid: bool
    is_finite: bool
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()


class Drawn:
    """The tokens of some rows, on the device and on their way to the host.

    Args:
        ids: int64 [rows] on the device.
        is_valid, is_finite: bool [rows].
        reports: float64 [reported, 1 + 2 most]: the token's log-probability, those of the likeliest ones, their ids.
        wanted: row -> how many of the likeliest ones it asked for, of the rows that have a report.
    """

    def __init__(
        self, ids: Tensor, is_valid: Tensor, is_finite: Tensor, reports: Tensor | None, wanted: dict[int, int]
    ) -> None:
        self.ids = ids
        self._wanted = wanted
        # as one copy; float64 holds every id and every float32 as it is
        numbers = torch.stack((ids, is_valid, is_finite)).double()
        self._numbers = Fetched(numbers if reports is None else torch.cat((numbers.flatten(), reports.flatten())))

    def read(self) -> list[DrawnToken]:
        """Of every row, once the device has drawn them."""
        numbers, num_rows = self._numbers.wait(), len(self.ids)
        flat = numbers.flatten()
        ids, is_valid, is_finite = flat[: _FIELDS * num_rows].view(_FIELDS, num_rows).tolist()
        found = [DrawnToken(int(i), v > 0, f > 0) for i, v, f in zip(ids, is_valid, is_finite, strict=True)]
        if self._wanted:
            reports = flat[_FIELDS * num_rows :].view(len(self._wanted), -1).tolist()
            for (row, wanted), (logprob, *likeliest) in zip(self._wanted.items(), reports, strict=True):
                most = len(likeliest) // 2
                top = [(int(i), value) for value, i in zip(likeliest[:most], likeliest[most:], strict=True)]
                found[row] = found[row]._replace(logprob=logprob, top=top[:wanted])
        return found


def draw_rows(states: Sequence[SamplerState], logits: Tensor) -> Drawn:
    """Draw the next token of every choice; what a choice draws does not depend on the others. No choice moves on.

    Args:
        logits: float32 [rows, V]; not changed, and not read any more when the result is.
    """
    scores = logits.float()
    if any(state.changes_logits for state in states):
        pairs = zip(states, scores, strict=True)
        scores = torch.stack([state.changed(row) if state.changes_logits else row for state, row in pairs])
    greedy = [i for i, state in enumerate(states) if state.is_greedy]
    if len(greedy) == len(states):
        ids, is_valid = _largest(scores)
    elif not greedy:
        ids, is_valid = _drawn(states, scores)
    else:
        others = [i for i, state in enumerate(states) if not state.is_greedy]
        order = sent(torch.tensor(greedy + others), scores.device)
        first, second = order[: len(greedy)], order[len(greedy) :]
        parts = _largest(scores[first]), _drawn([states[i] for i in others], scores[second])
        back = order.argsort()
        ids, is_valid = (torch.cat(pair)[back] for pair in zip(*parts, strict=True))
    # of rows that are not finite an index may be anything, and the next step looks it up
    ids = ids.clamp(0, logits.shape[1] - 1)
    wanted = {i: state.params.logprobs for i, state in enumerate(states) if state.params.logprobs is not None}
    reports = _reports(logits, ids, wanted) if wanted else None
    ends = torch.stack(logits.aminmax(dim=1))  # one pass; NaN is both ends of its row
    return Drawn(ids, is_valid, ends.isfinite().all(dim=0), reports, wanted)


def _largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Index of each row's largest score, and whether that is finite."""
    values, indices = scores.max(-1)
    return indices, values.isfinite()


def _drawn(states: Sequence[SamplerState], scores: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row a draw from the softmax of what the filters leave, and whether there was anything to draw.

    The largest of the scores plus Gumbel noise is such a draw (Maddison et al., arXiv 1411.0030, section 2). Unlike an
    inverse of the cumulative distribution it hardly depends on rounding: other last bits of the logits change a token
    only where the two best sums are that close, whatever the size of the vocabulary.
    """
    if len(states) == 1 and scores.device.type != "cpu":
        # a single row may be summed in another order than one of many
        ids, is_valid = _drawn([states[0], states[0]], scores.expand(2, -1))
        return ids[:1], is_valid[:1]
    params = [state.params for state in states]
    numbers = torch.tensor([(one.temperature, one.min_p, one.top_p) for one in params], dtype=torch.float64)
    # of the bits a float64 is as good a carrier as any, and one copy brings both
    keys = torch.tensor([state.draw_key for state in states]).view(torch.float64)
    columns = sent(torch.cat((numbers, keys[:, None]), dim=1), scores.device)
    temperature, min_p, top_p = columns[:, :3].float().T[:, :, None]
    scores = scores / temperature
    if any(one.min_p for one in params):
        probabilities = scores.softmax(-1)
        least = min_p * probabilities.amax(-1, keepdim=True)
        scores = scores.masked_fill(probabilities < least, float("-inf"))
    if any(one.top_k for one in params):
        scores = _keep_best(scores, [one.top_k for one in params])
    if any(one.top_p != 1 for one in params):
        scores = _keep_nucleus(scores, top_p)
    return _largest(scores + gumbel_noise(columns[:, 3].contiguous().view(torch.int64), scores.shape[1]))


def gumbel_noise(keys: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise float32 [rows, V], a function of the row's key and the token id alone.

    Integers are mixed as in SplitMix64 (Steele et al., OOPSLA 2014), so every device has the same bits up to the last
    one of its logarithm.

    Args:
        keys: int64 [rows], of all 64 bits.
    """
    bits = keys[:, None] + torch.arange(1, vocab_size + 1, device=keys.device) * _GOLDEN_GAMMA
    for shift, factor in ((30, _MIX[0]), (27, _MIX[1])):
        bits = (bits ^ _shifted(bits, shift)) * factor
    bits = _shifted(bits ^ _shifted(bits, 31), 11)
    # float32 is fine near 0, where the rarest tokens win, and must not reach 1, where the noise would be -inf
    uniform = ((bits.double() + 0.5) * 2.0**-53).float().clamp_max(1 - 2.0**-24)
    return -(-torch.log1p(-uniform)).log()


def _shifted(bits: Tensor, by: int) -> Tensor:
    """int64 moved right by so many bits, zeros coming in."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _reports(logits: Tensor, ids: Tensor, wanted: dict[int, int]) -> Tensor:
    """Of the rows in `wanted` the chosen token's log-probability and the likeliest ones', see `Drawn`."""
    at = sent(torch.tensor(list(wanted)), logits.device)
    logprobs = logits[at].float().log_softmax(-1)
    values, indices = logprobs.topk(min(max(wanted.values()), logprobs.shape[1]))
    own = logprobs.gather(1, ids[at][:, None])
    return torch.cat((own.double(), values.double(), indices.double()), dim=1)


def _keep_best(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """Keep the `counts` largest of every row, and what equals the least of them; all where a count is 0."""
    vocab_size = scores.shape[1]
    limits = [count if 0 < count < vocab_size else 0 for count in counts]
    if not any(limits):
        return scores
    best = scores.topk(max(limits)).values
    limit = sent(torch.tensor(limits), scores.device)[:, None]
    least = best.gather(1, (limit - 1).clamp_min(0))
    return scores.masked_fill((scores < least) & (limit > 0), float("-inf"))


def _keep_nucleus(scores: Tensor, top_p: Tensor) -> Tensor:
    """Keep of every row the smallest set of likeliest tokens whose probability reaches top_p [rows, 1] (Holtzman et
    al., arXiv 1904.09751)."""
    ascending, order = scores.sort(dim=-1, stable=True)
    drop = (ascending.softmax(-1).cumsum(-1) <= 1 - top_p) & (top_p < 1)
    drop[:, -1] = False
    return scores.masked_fill(torch.zeros_like(drop).scatter_(1, order, drop), float("-inf"))
