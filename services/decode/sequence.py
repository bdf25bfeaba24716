"""What a request and each of its choices need to go on decoding.

After step t the state of a choice is a function of (prompt and emitted token ids, recipe, seed) alone: the cache is
sealed at positions that only the recipe fixes, a replayed token runs through the same step as a sampled one, and random
numbers are a function of (seed, choice, position).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ...compression.interfaces import EncodedLayer, SequenceCache
from ...compression.layout import sealed_end
from ...compression.recipe import Recipe
from ...compression.saved_rows import first_rows
from ...errors import FrameMismatch, KvsluiceError
from ...models.parallel import Ranks
from ...models.sampling import SamplerState, SamplingParams
from ..telemetry import about, where
from .failures import is_out_of_memory
from .scheduler import Demand
from .step import StepRow, sampled_by

if TYPE_CHECKING:
    from .kept_sessions import KeptSession

logger = logging.getLogger(__name__)

REPLAY_KEEP_EVERY = 64  # replayed rows that are kept together, at least
# So many are replayed one by one, as after a loss of what was kept up to the last few tokens: a row by itself rounds as
# it did when it was sampled. More go in blocks, which round as a batch does, and take a step a block.
MOST_ALONE = 64

T = TypeVar("T")


@dataclass(frozen=True)
class DecodeRequest:
    """What a decode worker must know to let a request in.

    Attributes:
        epoch: which attempt at the request this is.
        recipe: resolved, no number open.
        credits: tokens that may be sent before more are granted; None = without limit.
        keep_every: rows after which those of each choice are told, to be kept; None = never.
        history_tokens: of the tokens that every choice begins with, how many are no answer: those of a conversation's
            earlier turns, and of its newest question. They are run behind the prompt like replayed tokens, and are
            prompt to sampling.
        session_key: name of the sequence that a later turn may go on with, which holds tenant, model and recipe; None =
            there is no such turn.
    """

    request_id: str
    epoch: int
    num_prompt_tokens: int
    recipe: Recipe
    sampling: SamplingParams
    credits: int | None = None
    keep_every: int | None = None
    history_tokens: int = 0
    session_key: str | None = None


@dataclass(frozen=True)
class KeptRows:
    """Generated rows of a choice that were kept, from position `begin` on; see `SequenceCache.rows`."""

    begin: int
    layers: Sequence[EncodedLayer]

    @property
    def num_rows(self) -> int:
        """Positions that were kept together."""
        tensors = [t for layer in self.layers[:1] for group in layer.tensors.values() for t in group.values()]
        return len(tensors[0]) if tensors else 0

    @property
    def end(self) -> int:
        """Position behind the last one."""
        return self.begin + self.num_rows

    def first(self, count: int) -> KeptRows:
        """The first `count` of them."""
        return KeptRows(self.begin, first_rows(self.layers, self.begin, count))


def whole_rows(rows: KeptRows, ranks: Ranks | None) -> KeptRows:
    """Rows of all heads, on the rank that leads; on others, which keep none, those of their own."""
    if ranks is None:
        return rows
    layers = []
    for one in rows.layers:
        whole = {
            part: {name: ranks.gather(tensor, 1) for name, tensor in group.items()}
            for part, group in one.tensors.items()
        }
        layers.append(EncodedLayer(one.layer, whole) if ranks.leads else one)  # type: ignore[arg-type]
    return KeptRows(rows.begin, layers)


@dataclass(frozen=True)
class EmittedChoice:
    """What a choice has sent so far.

    Attributes:
        token_ids: behind the prompt, at least one: `DecodeRequest.history_tokens`, then what was sent. Without history
            the first comes from prefill; others are replayed.
        finish_reason: "stop" or "length" when the choice has ended, else empty.
        kept: rows of tokens that need not be replayed, ascending from the end of the prompt.
    """

    token_ids: tuple[int, ...]
    finish_reason: str = ""
    kept: Sequence[KeptRows] = ()


class GuardedCache:
    """A cache whose faults end its own sequence and not the batch: after one, attention gives zeros.

    Attributes:
        error: the first fault.
    """

    def __init__(self, cache: SequenceCache) -> None:
        self.cache = cache
        self.error: Exception | None = None

    def append(self, layer: int, k_pre: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> None:
        self._guard(lambda: self.cache.append(layer, k_pre, k, v, positions))

    def attend(self, layer: int, q: Tensor, positions: Tensor) -> Tensor:
        out = self._guard(lambda: self.cache.attend(layer, q, positions))
        return torch.zeros_like(q) if out is None else out

    def recall(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor] | None:
        return self._guard(lambda: self.cache.recall(layer, like))

    def _guard(self, action: Callable[[], T]) -> T | None:
        if self.error is None:
            try:
                return action()
            except Exception as exc:
                self.error = exc
        return None


class ChoiceRun:
    """One running choice.

    Args:
        cache: the choice's own, over the prompt that it shares with the others.
        begun: tokens behind the prompt, at least one; the last one has not been sampled from yet.
        num_run: how many of them the cache has rows of.
        history_tokens: how many of them were not emitted.
        keep_every: see `DecodeRequest`.
        stored_end: position up to which rows were told before; None = all that the cache has.

    Attributes:
        num_emitted: tokens that were told.
        token_ids: behind the prompt, those that were told included.
        stored_end: position up to which rows were told, to be kept.
        num_steps, bytes_read, rows_recalled: steps that are settled, what attention read in them, and how many rows of
            the prompt came back; the cache may be a step ahead.
    """

    def __init__(
        self,
        cache: SequenceCache,
        sampler: SamplerState,
        num_prompt_tokens: int,
        begun: Sequence[int],
        num_run: int = 0,
        keep_every: int | None = None,
        history_tokens: int = 0,
        stored_end: int | None = None,
    ) -> None:
        self.cache = cache
        self.sampler = sampler
        self.num_prompt_tokens = num_prompt_tokens
        self.num_emitted = len(begun) - history_tokens
        self.token_ids = list(begun)
        self.num_steps = self.bytes_read = self.rows_recalled = 0
        self.guarded = GuardedCache(cache)
        first = num_prompt_tokens + history_tokens
        self._last_position = first + sampler.params.max_tokens - 2  # the last token is not run
        self._position = num_prompt_tokens + num_run
        self.stored_end = self._position if stored_end is None else stored_end
        self._keep_every = keep_every
        self._ahead = deque(begun[num_run:])  # known, not yet run; the last one is sampled from
        self._in_blocks = len(self._ahead) > MOST_ALONE
        self._row = 0  # of the last step that was launched
        self._has_run = False  # the token that is emitted next
        # a cache that was run here may have come to where a block is due; rows that were put into it are sealed as far
        self._rows_left = cache.rows_until_seal(self._position) if stored_end is None else 0
        for token_id in begun[history_tokens:]:
            sampler.force(token_id)

    @property
    def num_rows(self) -> int:
        """Rows behind the prompt that the cache has, or will once the step under way is done."""
        return self._position - self.num_prompt_tokens

    @property
    def samples_next(self) -> bool:
        """Whether the next step gives a new token, rather than replay one."""
        return len(self._ahead) <= 1

    @property
    def _rows_to_tell(self) -> int:
        """Rows after which they are told, to be kept. What is replayed goes by in larger parts."""
        assert self._keep_every is not None
        in_block = self._in_blocks and not self.samples_next
        wanted = max(self._keep_every, REPLAY_KEEP_EVERY) if in_block else self._keep_every
        return min(wanted, self.cache.most_rows_kept)

    def next_row(self, more: Callable[[int], int] = lambda most: 0) -> StepRow:
        """The next step's row, after sealing what is due before it.

        Args:
            more: how many more rows of known tokens it may have, of so many at most. The one that is sampled from has a
                step of its own.
        """
        if self._rows_left == 0:
            self.cache.seal(self._position)
            self._rows_left = self.cache.rows_until_seal(self._position)
        token_id = self._ahead[0] if self._ahead else sampled_by(self._row)
        most = min(len(self._ahead) - 2, self._rows_left - 1) if self._in_blocks else 0
        if self._keep_every is not None:  # what the leash is for: no more than this is run before it is told
            most = min(most, self._rows_to_tell - 1 - (self._position - self.stored_end))
        more_ids = tuple(islice(self._ahead, 1, 1 + more(most))) if most > 0 else ()
        return StepRow(
            token_id, self._position, self.num_prompt_tokens, self._last_position, self.cache, self.guarded, more_ids
        )

    def rows_to_keep(self) -> KeptRows | None:
        """Rows that are to be kept before the next row is run, because there are enough or because sealing would take
        them; call it before `next_row`."""
        if self._keep_every is None or self._position == self.stored_end:
            return None
        begin, end, recipe = self.stored_end, self._position, self.cache.recipe
        is_taken = self._rows_left == 0 and sealed_end(recipe, self.num_prompt_tokens, end) > begin
        if end - begin < self._rows_to_tell and not is_taken:
            return None
        kept = KeptRows(begin, self.cache.rows(begin, end))
        self.stored_end = end
        return kept

    def launched(self, row: int, num_rows: int = 1) -> None:
        """The step is under way whose rows `next_row` gave, as its `row`-th."""
        if self._ahead:
            for _ in range(num_rows):
                self._ahead.popleft()
        else:
            self._has_run = True
        self._row = row
        self._rows_left -= num_rows
        self._position += num_rows

    def settled(self, bytes_read: int, rows_recalled: int) -> None:
        """Count a step that was launched; by its end attention had read `bytes_read`, and so many rows came back."""
        self.num_steps += 1
        self.bytes_read, self.rows_recalled = bytes_read, rows_recalled

    def emit(self, token_id: int) -> None:
        """A new token is told. It runs in the next step, unless that is under way already."""
        self.num_emitted += 1
        self.token_ids.append(token_id)
        if self._has_run:
            self._has_run = False
        else:
            self._ahead.append(token_id)


@dataclass
class RequestRun:
    """A request that was accepted.

    Attributes:
        demand: what is reserved for it when it is let in.
        cache: the prompt's cache while its layers arrive.
        layers: those that have arrived.
        cancelled: choices that were cancelled before the start.
        choices: index -> running choice.
        prompt_ids: once it has started.
        adopted: `cache` is that of the turn before; see `kept_sessions`.
    """

    request: DecodeRequest
    demand: Demand
    cache: SequenceCache | None = None
    layers: set[int] = field(default_factory=set)
    cancelled: set[int] = field(default_factory=set)
    choices: dict[int, ChoiceRun] = field(default_factory=dict)
    prompt_ids: Sequence[int] = ()
    adopted: KeptSession | None = None
    resident_bytes: int = 0
    bytes_read: int = 0
    num_steps: int = 0
    rows_recalled: int = 0

    def held_bytes(self) -> int:
        """Bytes that the request's caches hold now; what choices share counts once."""
        if self.choices:
            caches = [run.cache for run in self.choices.values()]
            return caches[0].shared_nbytes() + sum(cache.own_nbytes() for cache in caches)
        return 0 if self.cache is None else self.cache.nbytes()

    def host_bytes(self) -> int:
        """Bytes of host memory that the request holds now; its choices share them."""
        caches = [run.cache for run in self.choices.values()] or ([] if self.cache is None else [self.cache])
        return caches[0].host_nbytes() if caches else 0

    def tensors(self) -> Iterator[Tensor]:
        """All of the started request's state on the device."""
        for state in self.choices.values():
            yield from state.cache.tensors()
            yield from state.sampler.tensors()

    def relocated(self) -> None:
        """Say that `tensors` lie elsewhere now, with the same bytes."""
        for state in self.choices.values():
            state.cache.relocated()

    def drop_choice(self, index: int) -> None:
        """Let go of a choice's cache and keep its counts."""
        self.resident_bytes = max(self.resident_bytes, self.held_bytes())
        run = self.choices.pop(index)
        self.bytes_read += run.bytes_read
        self.rows_recalled += run.rows_recalled
        self.num_steps += run.num_steps


def add_layer(
    run: RequestRun, encoded: EncodedLayer, num_layers: int, device: torch.device, may_park: bool = False
) -> None:
    """Put an arrived layer into the request's cache.

    Args:
        may_park: the request may be parked, so its memory must be nobody else's.

    Raises:
        FrameMismatch: a layer that the model does not have, one that came before, one that does not fit the recipe, or
            more bytes than the recipe can need.
    """
    request_id, layer, cache = run.request.request_id, encoded.layer, run.cache
    assert cache is not None, "the cache is made when the request is let in"
    if not 0 <= layer < num_layers:
        raise FrameMismatch(f"request {request_id}: layer {layer} arrived, the model has {num_layers}")
    if layer in run.layers:
        raise FrameMismatch(f"request {request_id}: layer {layer} arrived twice")
    try:
        cache.add_layer(on_device(encoded, device, may_park))
    except KvsluiceError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError) as exc:
        if is_out_of_memory(exc):
            raise
        logger.warning(
            "layer %d of request %s does not fit its recipe: %s", layer, request_id, where(exc), extra=about(request_id)
        )
        raise FrameMismatch(f"request {request_id}: layer {layer} does not fit its recipe") from exc
    run.layers.add(layer)
    most = run.demand.prompt_bytes + run.demand.tail_bytes
    if cache.nbytes() > most:
        raise FrameMismatch(
            f"request {request_id}: {len(run.layers)} layers take {cache.nbytes()} bytes, its recipe bounds all "
            f"{num_layers} by {most}"
        )


def on_device(encoded: EncodedLayer, device: torch.device, copy: bool = False) -> EncodedLayer:
    """The layer with its tensors on a device, copied even where they are there already if `copy`."""

    def moved(group: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: tensor.to(device, copy=copy) for name, tensor in group.items()}

    return replace(encoded, tensors={part: moved(group) for part, group in encoded.tensors.items()})
