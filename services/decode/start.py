"""How the choices of a request begin: after the prompt, or where another worker's have come to.

What has been emitted is known. The rows of its first tokens may have been kept, and are put into the cache as they are;
the others are replayed, one step each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...compression import bound_nbytes, host_pages
from ...compression.interfaces import SequenceCache
from ...compression.recipe import ModelShape, Recipe
from ...errors import FrameMismatch, InvalidRequest
from ...models.hf_config import ModelConfig
from ...models.model import Model
from ...models.parallel import Ranks
from ...models.sampling import PromptIds, SamplerState
from ..model_shape import model_shape
from .pages import Demand
from .sequence import MOST_ALONE, REPLAY_KEEP_EVERY, ChoiceRun, DecodeRequest, EmittedChoice, RequestRun, on_device
from .turns import Turns

LEASH = 2  # times as many rows as are kept at once may be run before the first of them are


def demand_of(request: DecodeRequest, shape: ModelShape, itemsize: int, page_nbytes: int | None) -> Demand:
    """What admission reserves for a request.

    Args:
        itemsize: of the model's dtype.
        page_nbytes: of host memory, None = there is none.

    Raises:
        InvalidRequest: the prompt is empty, or a number of the recipe is open.
    """
    recipe, num_tokens, sampling = request.recipe, request.num_prompt_tokens, request.sampling
    new_tokens = request.history_tokens + sampling.max_tokens
    if num_tokens < 1:
        raise InvalidRequest("num_prompt_tokens", f"got {num_tokens}", "at least 1")
    recipe.check_resolved()
    one, two = (
        bound_nbytes(recipe, shape, num_tokens, new_tokens, num_choices, itemsize, page_nbytes)
        for num_choices in (1, 2)
    )
    tail_bytes, host_bytes = two - one, 0
    if page_nbytes is not None:
        host_bytes = page_nbytes * host_pages(recipe, shape, num_tokens, itemsize, page_nbytes)
    return Demand(one - tail_bytes, tail_bytes, sampling.n, host_bytes)


def check_ranks(recipe: Recipe, ranks: Ranks | None) -> None:
    """Refuse what ranks that each have some of the heads cannot do.

    Raises:
        InvalidRequest: rows are recalled by what all heads attend to, which no rank knows.
    """
    if ranks is not None and recipe.propagation.recalls:
        raise InvalidRequest("recipe.propagation.recall", "decode is spread over several ranks here", "0")


def most_frame_bytes(request: DecodeRequest, model: Model) -> int:
    """Bytes that a request's layers may have as they arrive, whichever of them this process then holds."""
    return demand_of(request, model_shape(model.whole), model.dtype.itemsize, None).most_bytes


def check_start(
    run: RequestRun, prompt_ids: Sequence[int], emitted: Sequence[EmittedChoice], num_layers: int, vocab_size: int
) -> None:
    """Check that nothing is missing before a request starts.

    Raises:
        FrameMismatch: layers are missing or the prompt has another length than announced.
        InvalidRequest: the emitted tokens are not what the choices need.
    """
    request = run.request
    missing = sorted(set(range(num_layers)) - run.layers)
    if missing:
        raise FrameMismatch(f"request {request.request_id}: layers {missing[:8]} are missing, {len(missing)} in all")
    if len(prompt_ids) != request.num_prompt_tokens:
        raise FrameMismatch(
            f"request {request.request_id}: {len(prompt_ids)} prompt tokens, {request.num_prompt_tokens} were announced"
        )
    if len(emitted) != request.sampling.n:
        raise InvalidRequest("emitted", f"{len(emitted)} choices", f"{request.sampling.n}, one for each choice")
    history = request.history_tokens
    for choice in emitted:
        most = history + request.sampling.max_tokens - (not choice.finish_reason)
        if not max(1, history) <= len(choice.token_ids) <= most:
            allowed = f"{max(1, history)} to {most}, or a finish reason"
            raise InvalidRequest("emitted", f"{len(choice.token_ids)} tokens", allowed)
        if choice.token_ids[:history] != emitted[0].token_ids[:history]:
            raise InvalidRequest("emitted", "choices with different histories", "one history for all choices")
        if min(choice.token_ids) < 0 or max(choice.token_ids) >= vocab_size:
            raise InvalidRequest("emitted", "holds a token id outside the vocabulary", f"0 to {vocab_size - 1}")


def start_choices(
    run: RequestRun,
    cache: SequenceCache,
    prompt_ids: Sequence[int],
    emitted: Sequence[EmittedChoice],
    config: ModelConfig,
    like: Tensor,
) -> tuple[dict[int, ChoiceRun], dict[int, Turns]]:
    """The choices that have not ended, and what each of them may do.

    Args:
        cache: the prompt's, all layers; one of the choices takes it over.
        like: of the model's dtype and device.

    Raises:
        FrameMismatch: see `put_kept`.
    """
    request, history = run.request, run.request.history_tokens
    prompt = PromptIds([*prompt_ids, *emitted[0].token_ids[:history]])
    sampling, num_tokens, every = request.sampling, request.num_prompt_tokens, request.keep_every
    live = [i for i, choice in enumerate(emitted) if not choice.finish_reason and i not in run.cancelled]
    choices, turns = {}, {}
    caches = [*(cache.fork() for _ in live[1:]), cache]  # before rows are put into any
    for index, own in zip(live, caches, strict=False):
        sampler = SamplerState(sampling, index, prompt, config.vocab_size, config.eos_token_ids)
        ids = emitted[index].token_ids
        adopted = run.adopted
        num_run = put_kept(own, emitted[index], num_tokens, like) if adopted is None else adopted.num_rows
        if not own.recipe.window.seal_block:
            # it is reserved anyway, and a tail that grows moves: tables are made anew then, and a longer step captured
            own.reserve(history + sampling.max_tokens - 1 - num_run, like)
        choices[index] = ChoiceRun(
            own, sampler, num_tokens, ids, num_run, every, history, None if adopted is None else adopted.stored_end
        )
        replays, left = len(ids) - 1 - num_run, history + sampling.max_tokens - 1 - num_run
        turns[index] = Turns(replays, left, *leash_of(every, replays))
    return choices, turns


def leash_of(keep_every: int | None, replays: int) -> tuple[float, float]:
    """How far a choice may run ahead of its kept rows, and how much of that is for replays alone."""
    if keep_every is None:
        return math.inf, 0
    slack = LEASH * (max(keep_every, REPLAY_KEEP_EVERY) - keep_every) if replays >= MOST_ALONE else 0
    return LEASH * keep_every + slack, slack


def usable_rows(recipe: Recipe, num_prompt_tokens: int, num_told: int, num_kept: int) -> int:
    """Of how many told tokens the rows need not be computed again, if those of the first `num_kept` are kept. The last
    token is sampled from, so it is run."""
    end = num_prompt_tokens + min(num_told - 1, num_kept)
    # what is attended to until the next choice of chunks is not kept: replay begins where that is due
    every = recipe.retrieval.select_every
    return max(0, end // every * every - num_prompt_tokens)


def put_kept(cache: SequenceCache, choice: EmittedChoice, num_prompt_tokens: int, like: Tensor) -> int:
    """Put the kept rows of a choice into its cache, as far as they are of use. Returns of how many tokens.

    Args:
        like: of the model's dtype and device.

    Raises:
        FrameMismatch: rows do not follow each other, or are not such as the cache holds.
    """
    recipe, have = cache.recipe, num_prompt_tokens
    for rows in choice.kept:
        if rows.begin != have or not rows.num_rows:
            raise FrameMismatch(f"kept rows begin at {rows.begin}, those before end at {have}")
        have += rows.num_rows
    num_run = usable_rows(recipe, num_prompt_tokens, len(choice.token_ids), have - num_prompt_tokens)
    end = num_prompt_tokens + num_run
    dtype = torch.bfloat16 if recipe.window.dtype == "bfloat16" else like.dtype
    for rows in choice.kept:
        if rows.begin < end:
            layers = [on_device(layer, like.device) for layer in rows.first(end - rows.begin).layers]
            tensors = [t for layer in layers for group in layer.tensors.values() for t in group.values()]
            if any(t.is_floating_point() and t.dtype != dtype for t in tensors):
                raise FrameMismatch(f"kept rows are not {str(dtype).removeprefix('torch.')}")
            cache.put_rows(rows.begin, layers)
    return num_run
