"""What a fleet holds and reaches, calculated before there is one: bytes from the recipe's layout, which is what the
workers themselves reserve by, and times from rates that were measured on one GPU. Free of torch.

    shape of the model ─┐
    recipe, context ────┼─> Sequence: bytes on the device, on the host, on the network, in the store
    GPU, network ───────┘      └─> Plan: sequences a GPU, seconds of each stage, how many GPUs for which role
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..compression.recipe import ModelShape, Recipe, Resolved, get_recipe, resolve
from ..compression.sizes import bound_nbytes, encoded_nbytes, host_pages
from ..errors import ConfigError
from ..models.config import ModelConfig
from ..models.profiles import load_profile
from ..services.model_shape import model_shape
from ..services.prefill.flops import prompt_flops

PAGE_BYTES = 1 << 20  # of host memory, as decode workers have them
GIB = 1 << 30

# Shares of what one H100 gives, from benchmarks/results/bench_{prefill,decode_32k,decode_122k}_h100.json;
# tests/unit/benchmarks/test_sizing.py compares what is calculated here with what was measured there.
PREFILL_SHARE = 0.72  # of the rate of a large matrix product, from 32,768 tokens on
WHOLE_SHARE = 1.0  # of the rate of a copy, by decode steps that read all of a cache of plain rows
PACKED_SHARE = 0.23  # the same of packed or retrieved caches, over all bytes that lie on the device
WHOLE_LAYER_S = 47e-6  # of a step for each layer, beside what is read
PACKED_LAYER_S = 113e-6
PREFILL_WORK_BYTES = 3 * GIB  # of a prompt beside the weights; 2.8 GiB at 130,000 tokens
DECODE_WORK_BYTES = 3 * GIB  # of captured steps and their buffers, beside weights and caches


@dataclass(frozen=True)
class Gpu:
    """One GPU and the memory that its host has for it.

    Attributes:
        memory_bytes: of the device; the defaults are those of an H100 with 80 GB, measured.
        matrix_flops_per_s: of a large matrix product in bf16.
        copy_bytes_per_s: of a copy within the device, bytes read and written.
        host_bytes: pinned memory for values and parked requests; 0 = none.
        share: of the device's memory that the worker may take.
    """

    memory_bytes: int = 85_017_493_504
    matrix_flops_per_s: float = 8.0e14
    copy_bytes_per_s: float = 3.0e12
    host_bytes: int = 0
    share: float = 0.92


@dataclass(frozen=True)
class Load:
    """What is asked of the fleet.

    Attributes:
        context: tokens of a prompt.
        new_tokens: of an answer.
        num_gpus: at hand.
        concurrency: sequences that run at once, over the whole fleet; None = as many as fit.
        network_bits_per_s: of each GPU's, between the workers.
    """

    context: int
    new_tokens: int = 512
    num_gpus: int = 2
    concurrency: int | None = None
    network_bits_per_s: float = 10e9


@dataclass(frozen=True)
class Sequence:
    """Bytes of one sequence, all upper bounds that hold until its answer has ended.

    Attributes:
        device_bytes, host_bytes: what a decode worker reserves in each memory.
        handoff_bytes: sent from prefill to decode, without headers.
        store_bytes: in the store at durability `tokens`: the prompt as it was sent, and generated rows.
        bf16_bytes: of the prompt's whole KV cache in bf16.
    """

    device_bytes: int
    host_bytes: int
    handoff_bytes: int
    store_bytes: int
    bf16_bytes: int


@dataclass(frozen=True)
class Split:
    """GPUs by role, and what they reach together.

    Attributes:
        prefill, decode: GPUs of each role; both 0 where each GPU does both.
        both: GPUs that do both.
        requests_per_s: finished in the long run.
        bound_by: the role that limits it, or the network.
    """

    prefill: int
    decode: int
    both: int
    requests_per_s: float
    bound_by: str

    @property
    def text(self) -> str:
        return f"{self.both} of both roles" if self.both else f"{self.prefill} prefill, {self.decode} decode"


@dataclass(frozen=True)
class Plan:
    """A calculated fleet.

    Attributes:
        resolved: the recipe as it runs at this context.
        weights_bytes: on every GPU.
        cache_bytes: of a decode GPU for caches: `--kv-cache-bytes`.
        sequences_per_gpu: that a decode GPU runs at once.
        parked_per_gpu: more that it takes in and lets take turns, their bytes in host memory.
        prefill_s: of one prompt on one GPU.
        handoff_s: of one prompt over the network, alone on it.
        step_s: of a decode step with `sequences_per_gpu`.
        splits: every way to share the GPUs out: by requests a second, the best one first, and at the end all GPUs of
            both roles. That one often finishes as many, but its decode steps wait behind pieces of prompts.
        gpus_for_concurrency: decode GPUs for the wanted concurrency; None where none was wanted.
    """

    resolved: Resolved
    sequence: Sequence
    weights_bytes: int
    cache_bytes: int
    sequences_per_gpu: int
    parked_per_gpu: int
    prefill_s: float
    handoff_s: float
    step_s: float
    splits: tuple[Split, ...]
    gpus_for_concurrency: int | None
    store_bytes: int
    assumptions: tuple[str, ...]

    @property
    def tokens_per_s(self) -> float:
        """Of a decode GPU whose batch is full."""
        return self.sequences_per_gpu / self.step_s


def parameter_count(config: ModelConfig) -> int:
    """Numbers in a model's weights."""
    hidden, dim = config.hidden_size, config.head_dim
    queries, rows = config.num_heads * dim, config.num_kv_heads * dim
    layer = hidden * (2 * queries + 2 * rows + 3 * config.intermediate_size) + 2 * hidden
    layer += config.qkv_bias * (queries + 2 * rows) + config.o_bias * hidden
    layer += config.mlp_bias * (2 * config.intermediate_size + hidden) + config.qk_norm * 2 * dim
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    return config.num_layers * layer + embeddings + hidden


def size_sequence(config: ModelConfig, recipe: Recipe, load: Load, itemsize: int, on_host: bool) -> Sequence:
    """Bytes of one sequence under a resolved recipe.

    Args:
        itemsize: bytes of a number in the compute dtype, 2 or 4.
        on_host: values may lie in host memory.
    """
    shape = model_shape(config)
    page = PAGE_BYTES if on_host else None
    grown = 2 * shape.num_layers * shape.kv_width * itemsize * load.new_tokens
    encoded = encoded_nbytes(recipe, shape, load.context, itemsize)
    return Sequence(
        device_bytes=bound_nbytes(recipe, shape, load.context, load.new_tokens, 1, itemsize, page),
        host_bytes=PAGE_BYTES * host_pages(recipe, shape, load.context, itemsize, PAGE_BYTES) if on_host else 0,
        handoff_bytes=encoded,
        store_bytes=encoded + grown,
        bf16_bytes=shape.bf16_kv_bytes(load.context),
    )


def make_plan(model: str, config: ModelConfig, recipe: str, load: Load, gpu: Gpu, itemsize: int = 2) -> Plan:
    """Calculate a fleet.

    Args:
        model: by which its profile is found.
        recipe: name or preset.

    Raises:
        ConfigError: the model does not take such a context, or does not fit such a GPU.
        InvalidRecipe: there is no such recipe, or it does not fit the model.
    """
    shape = model_shape(config)
    if load.context + load.new_tokens > shape.max_position_embeddings:
        most = shape.max_position_embeddings
        raise ConfigError(
            f"context: {load.context} and {load.new_tokens} new tokens; allowed: at most {most} together for {model}"
        )
    resolved = resolve(get_recipe(recipe), shape, load.context, load_profile(model, shape))
    weights = parameter_count(config) * itemsize
    cache = int(gpu.memory_bytes * gpu.share) - weights - DECODE_WORK_BYTES
    sequence = size_sequence(config, resolved.recipe, load, itemsize, gpu.host_bytes > 0)
    if cache < sequence.device_bytes:
        need = (weights + DECODE_WORK_BYTES + sequence.device_bytes) / gpu.share / GIB
        raise ConfigError(
            f"gpu_memory: {gpu.memory_bytes / GIB:.4g} GiB hold no sequence of {load.context} tokens beside "
            f"{weights / GIB:.3g} GiB of weights; allowed: at least {need:.3g}"
        )
    running, parked = _fitting(sequence, cache, gpu)
    step_s = _step_s(config, resolved.recipe, sequence, weights, running, gpu)
    prefill_s = _prefill_s(config, shape, resolved.recipe, load, gpu)
    handoff_s = 8 * sequence.handoff_bytes / load.network_bits_per_s
    splits = sorted(
        _splits(load, prefill_s, handoff_s, step_s / running), key=lambda one: (one.both, -one.requests_per_s)
    )
    num_sequences = load.concurrency or max(1, splits[0].decode + splits[0].both) * (running + parked)
    return Plan(
        resolved=resolved,
        sequence=sequence,
        weights_bytes=weights,
        cache_bytes=cache,
        sequences_per_gpu=running,
        parked_per_gpu=parked,
        prefill_s=prefill_s,
        handoff_s=handoff_s,
        step_s=step_s,
        splits=tuple(splits),
        gpus_for_concurrency=None if load.concurrency is None else -(-load.concurrency // (running + parked)),
        store_bytes=num_sequences * sequence.store_bytes,
        assumptions=tuple(_assumptions(load, gpu, itemsize, num_sequences)),
    )


def _fitting(sequence: Sequence, cache_bytes: int, gpu: Gpu) -> tuple[int, int]:
    """Sequences that run at once on a decode GPU, and those that wait for their turn in host memory."""
    running = cache_bytes // sequence.device_bytes
    if not gpu.host_bytes:
        return running, 0
    if sequence.host_bytes:
        running = min(running, gpu.host_bytes // sequence.host_bytes)
    if running < 1:
        raise ConfigError(
            f"host_memory: {gpu.host_bytes / GIB:.3g} GiB hold no sequence's values; "
            f"allowed: 0, or at least {sequence.host_bytes / GIB:.3g}"
        )
    left = gpu.host_bytes - running * sequence.host_bytes
    return running, max(0, int(0.9 * left)) // (sequence.device_bytes + sequence.host_bytes)


def _reads_whole_rows(recipe: Recipe) -> bool:
    kinds = {codec.kind for tier in recipe.tiers() for codec in (tier.key_codec, tier.value_codec)}
    return kinds <= {"native", "dense"} and not recipe.retrieval.needs_grid


def _prefill_s(config: ModelConfig, shape: ModelShape, recipe: Recipe, load: Load, gpu: Gpu) -> float:
    return prompt_flops(config, shape, recipe, load.context).of_model / (PREFILL_SHARE * gpu.matrix_flops_per_s)


def _step_s(config: ModelConfig, recipe: Recipe, sequence: Sequence, weights: int, running: int, gpu: Gpu) -> float:
    """Seconds of a decode step with a full batch."""
    whole = _reads_whole_rows(recipe)
    share, layer_s = (WHOLE_SHARE, WHOLE_LAYER_S) if whole else (PACKED_SHARE, PACKED_LAYER_S)
    read_s = (weights + running * sequence.device_bytes / share) / gpu.copy_bytes_per_s
    return config.num_layers * layer_s + read_s


def _splits(load: Load, prefill_s: float, handoff_s: float, token_s: float) -> Iterator[Split]:
    """Every way to share the GPUs out. `token_s` are a GPU's seconds for each token of a full batch; each GPU has the
    network for itself."""
    answer_s = load.new_tokens * token_s
    yield Split(0, 0, load.num_gpus, load.num_gpus / (prefill_s + answer_s), "both")
    for prefill in range(1, load.num_gpus):
        decode = load.num_gpus - prefill
        rates = {
            "prefill": prefill / prefill_s,
            "decode": decode / answer_s,
            "network": min(prefill, decode) / handoff_s,
        }
        bound = min(rates, key=lambda role: rates[role])
        yield Split(prefill, decode, 0, rates[bound], bound)


def _assumptions(load: Load, gpu: Gpu, itemsize: int, num_sequences: int) -> Iterator[str]:
    """What the numbers stand on, a sentence each."""
    yield f"weights and computation in {'bf16' if itemsize == 2 else 'fp32'}, a whole model on each GPU"
    yield (
        f"a worker takes {gpu.share:.0%} of {gpu.memory_bytes / GIB:.4g} GiB, of which "
        f"{DECODE_WORK_BYTES / GIB:.3g} GiB for buffers"
    )
    yield f"every prompt has {load.context:,} tokens and every answer {load.new_tokens:,}; all arrive independently"
    yield (
        f"prefill reaches {PREFILL_SHARE:.0%} of {gpu.matrix_flops_per_s / 1e12:.4g} TFLOP/s, as measured on one H100 "
        "from 32,768 tokens on; at 8,192 it is up to a third slower"
    )
    yield (
        f"decode reads {gpu.copy_bytes_per_s / 1e12:.3g} TB/s of plain rows, {PACKED_SHARE:.0%} of that of packed "
        "ones, the lower of two measured values: many sequences of 124,928 tokens are up to a half faster"
    )
    yield f"{load.network_bits_per_s / 1e9:.4g} Gbit/s for each GPU, frames without their headers"
    yield f"the store keeps {num_sequences:,} sequences at durability tokens; Redis itself takes a few percent more"
    if gpu.host_bytes:
        yield f"{gpu.host_bytes / GIB:.4g} GiB of pinned host memory a decode GPU, a tenth of what is left kept free"
