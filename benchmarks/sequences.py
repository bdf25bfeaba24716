"""Sequences in a decode engine: opened, filled with synthetic or prefilled layers, committed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..compression.interfaces import EncodedLayer
from ..compression.recipe import Recipe
from ..errors import InternalError, Overloaded
from ..models.sampling import SamplingParams
from ..services.decode.engine import (
    DecodeEngine,
    DecodeRequest,
    EmittedChoice,
    Event,
    FailedEvent,
    FinishedEvent,
    OpenedEvent,
    TokensEvent,
)
from ..services.decode.host_pages import HostPages
from ..services.prefill.engine import PrefillEngine, PrefillJob
from .bench_prefill import PACK_TOKENS
from .options import PREFILL
from .prefill_memory import DiscardingSink
from .subject import Bench
from .synthetic import SyntheticLayers

GPU_SHARE = 0.9  # of the memory that is free beside the weights, for caches
CPU_CACHE_BYTES = 2 << 30


class _Collector(DiscardingSink):
    def __init__(self, take: Callable[[EncodedLayer], None]) -> None:
        super().__init__()
        self._take = take

    def on_layer(self, encoded: EncodedLayer) -> None:
        self._take(encoded)


def fill_layers(
    bench: Bench,
    recipe: Recipe,
    context: int,
    index: int,
    take: Callable[[EncodedLayer], None],
    engine: PrefillEngine | None = None,
) -> None:
    """Hand over every encoded layer of prompt number `index`, drawn at random or made by prefill.

    Args:
        engine: of prefill, so that many prompts share one.

    Raises:
        KvsluiceError: prefill failed.
    """
    if bench.options.kv == PREFILL:
        engine = engine or prefill_engine(bench)
        sink = _Collector(take)
        sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        engine.submit(PrefillJob("filled", 1, bench.prompt(context, index), recipe, sampling), sink)
        while engine.step():
            pass
        if sink.error is not None:
            raise sink.error
        return
    generator = torch.Generator(bench.device).manual_seed(bench.options.seed * 1_000_003 + index)
    layers = SyntheticLayers(recipe, bench.subject.shape, context, bench.dtype, generator)
    for layer in range(bench.subject.shape.num_layers):
        take(layers.layer(layer))


def prefill_engine(bench: Bench) -> PrefillEngine:
    """An engine that fills caches."""
    return PrefillEngine(bench.model, bench.chunk_tokens, max(bench.chunk_tokens, PACK_TOKENS))


def cache_bytes(bench: Bench) -> int:
    """Memory that the engine's caches may take."""
    if bench.options.cache_gib is not None:
        return int(bench.options.cache_gib * (1 << 30))
    if bench.device.type != "cuda":
        return CPU_CACHE_BYTES
    return int(torch.cuda.mem_get_info(bench.device)[0] * GPU_SHARE)


@dataclass(frozen=True)
class Plan:
    """How a recipe's sequences are asked for.

    Attributes:
        requests: what to open; one with as many choices as sequences where they share their prompt.
        num_sequences: over all requests.
        reserved_bytes: of all requests together, on the device.
        host_bytes: of all requests together, in host memory.
    """

    requests: tuple[DecodeRequest, ...]
    num_sequences: int
    reserved_bytes: int
    host_bytes: int


def plan_sequences(
    bench: Bench,
    capacity_bytes: int,
    recipe: Recipe,
    context: int,
    batch: int | None,
    new_tokens: int,
    host: HostPages | None = None,
) -> Plan:
    """Requests for `batch` sequences, or for the most that the engine's own bounds leave room for.

    Raises:
        Overloaded: not even one fits, or `batch` do not.
    """
    sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    request = DecodeRequest("sequence-0", 1, context, recipe, sampling)
    demand = DecodeEngine(bench.model, capacity_bytes, max_num_seqs=1, host=host).demand(request)
    is_shared = bench.options.share_prompt
    shared = demand.prompt_bytes if is_shared else 0
    each = demand.total_bytes - shared
    fitting = max(0, capacity_bytes - shared) // each
    on_host = _fitting_host(demand.host_bytes, host, is_shared)
    wanted = min(fitting, on_host or fitting) if batch is None else batch
    if not 1 <= wanted <= fitting:
        raise Overloaded(
            f"{max(wanted, 1)} sequences may take {shared + max(wanted, 1) * each} bytes; {fitting} fit into the "
            f"{capacity_bytes} of --cache-gib"
        )
    if on_host is not None and wanted > on_host:
        raise Overloaded(
            f"{wanted} sequences may take {wanted * demand.host_bytes} bytes of host memory; {on_host} fit into "
            "--kv-offloading-gib"
        )
    host_bytes = demand.host_bytes * (1 if is_shared else wanted)
    if is_shared:
        requests: tuple[DecodeRequest, ...] = (replace(request, sampling=replace(sampling, n=wanted)),)
    else:
        requests = tuple(replace(request, request_id=f"sequence-{index}") for index in range(wanted))
    return Plan(requests, wanted, shared + wanted * each, host_bytes)


def _fitting_host(each: int, host: HostPages | None, is_shared: bool) -> int | None:
    """How many sequences host memory has room for; None = as many as one likes."""
    if host is None or not each:
        return None
    prompts = host.capacity_bytes // each
    return None if is_shared and prompts else prompts


def start_sequences(bench: Bench, engine: DecodeEngine, plan: Plan, context: int) -> None:
    """Open, fill and commit every request. All are let in before the first is filled, so that none runs meanwhile."""
    for request in plan.requests:
        engine.open(request)
    opened = [event for event in told(engine.step()) if isinstance(event, OpenedEvent)]
    if len(opened) < len(plan.requests):
        raise InternalError(f"{len(opened)} of {len(plan.requests)} sequences were let in")
    prefill = prefill_engine(bench) if bench.options.kv == PREFILL else None
    for index, request in enumerate(plan.requests):

        def take(encoded: EncodedLayer, request_id: str = request.request_id) -> None:
            engine.add_layer(request_id, encoded)

        fill_layers(bench, request.recipe, context, index, take, prefill)
    for index, request in enumerate(plan.requests):
        emitted = [EmittedChoice((choice % bench.subject.config.vocab_size,)) for choice in range(request.sampling.n)]
        engine.commit(request.request_id, bench.prompt(context, index), emitted)


def told(events: list[Event]) -> list[Event]:
    """The events, unless one of them tells of a failure.

    Raises:
        KvsluiceError: the failure.
    """
    for event in events:
        if isinstance(event, FailedEvent):
            raise event.error
    return events


def finished(plan: Plan, events: list[Event], new_tokens: int) -> list[FinishedEvent]:
    """How every request ended.

    Raises:
        InternalError: one has not ended, or not every sequence got its tokens.
    """
    ended = [event for event in events if isinstance(event, FinishedEvent)]
    tokens = sum(len(event.sampled) for event in events if isinstance(event, TokensEvent))
    wanted = plan.num_sequences * (new_tokens - 1)  # the first ones came with the prompts
    if len(ended) != len(plan.requests) or tokens != wanted:
        raise InternalError(f"{len(ended)} of {len(plan.requests)} requests ended, with {tokens} of {wanted} tokens")
    return ended
