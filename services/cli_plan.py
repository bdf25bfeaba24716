"""`kvsluice plan`: how many sequences fit, what they cost in bytes and seconds, and which GPUs should do what."""

from __future__ import annotations

import json as json_format
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..benchmarks.sizing import Gpu, Load, Plan
    from ..models.config import ModelConfig

_Count = Annotated[int, typer.Option(min=1, max=4096, help="GPUs at hand")]


def plan(
    model: Annotated[
        str, typer.Option(help="name of a shape such as llama-3.1-8b, built-in name, Hugging Face folder or GGUF file")
    ],
    context: Annotated[int, typer.Option(min=1, max=2**24, help="tokens of a prompt", metavar="TOKENS")],
    gpus: _Count = 2,
    recipe: Annotated[str, typer.Option(help="recipe or preset")] = "balanced",
    new_tokens: Annotated[int, typer.Option(min=1, max=2**20, help="tokens of an answer", metavar="TOKENS")] = 512,
    concurrency: Annotated[
        int | None, typer.Option(min=1, max=2**20, help="sequences at once, over all GPUs", metavar="N")
    ] = None,
    dtype: Annotated[str, typer.Option(help="of weights and computation", metavar="bfloat16|float32")] = "bfloat16",
    gpu_memory: Annotated[
        float, typer.Option(min=0.1, max=4096, help="of a GPU; the default is an H100's", metavar="GIB")
    ] = 79.18,
    gpu_tflops: Annotated[
        float, typer.Option(min=0.1, max=1e5, help="of a large matrix product, as `bench` prints it", metavar="TFLOP/S")
    ] = 800.0,
    gpu_bandwidth: Annotated[
        float, typer.Option(min=1, max=1e5, help="of a copy on the GPU, as `bench` prints it", metavar="GB/S")
    ] = 3000.0,
    host_memory: Annotated[
        float, typer.Option(min=0, max=65536, help="of a decode GPU's host, for offloading; 0 = none", metavar="GIB")
    ] = 0.0,
    network: Annotated[
        float, typer.Option(min=0.001, max=1e5, help="between prefill and decode", metavar="GBIT/S")
    ] = 10.0,
    json: Annotated[bool, typer.Option("--json", help="one JSON object instead of tables")] = False,
) -> None:
    """Calculate what a fleet holds and reaches, from the model's shape and the recipe's layout. Needs no GPU."""
    from ..benchmarks.sizing import Gpu, Load, make_plan
    from ..errors import ConfigError

    itemsize = {"bfloat16": 2, "float32": 4}.get(dtype)
    if itemsize is None:
        raise ConfigError(f"dtype: got {dtype[:64]!r}; allowed: bfloat16, float32")
    load = Load(context, new_tokens, gpus, concurrency, network * 1e9)
    gpu = Gpu(int(gpu_memory * 2**30), gpu_tflops * 1e12, gpu_bandwidth * 1e9, int(host_memory * 2**30))
    made = make_plan(model, _shape_of(model), recipe, load, gpu, itemsize)
    if json:
        print(json_format.dumps(as_json(model, load, gpu, made)))
    else:
        _print(model, load, gpu, made)


def _shape_of(model: str) -> ModelConfig:
    from ..models.config import SHAPES

    if model in SHAPES:
        return SHAPES[model]
    # reads a checkpoint's configuration, and loads torch for it
    from ..models.loader import load_config

    return load_config(model)


def settings(load: Load, gpu: Gpu, plan: Plan) -> dict[str, int]:
    """The keys of the configuration that the plan stands for."""
    found = {
        "max_model_len": load.context + load.new_tokens,
        "max_num_seqs": plan.sequences_per_gpu,
        "kv_cache_bytes": plan.cache_bytes,
    }
    return found | ({"kv_offloading_bytes": gpu.host_bytes} if gpu.host_bytes else {})


def as_json(model: str, load: Load, gpu: Gpu, plan: Plan) -> dict[str, Any]:
    """The plan with all that went into it, as plain values."""
    resolved = plan.resolved
    values = asdict(plan)
    values["resolved"] = {
        "requested": resolved.requested,
        "runs": resolved.recipe.name,
        "fingerprint": resolved.recipe.fingerprint,
        "fallback_reason": resolved.fallback_reason,
    }
    told = {"tokens_per_s": plan.tokens_per_s, "settings": settings(load, gpu, plan)}
    return {"model": model, "load": asdict(load), "gpu": asdict(gpu)} | values | told


def _print(model: str, load: Load, gpu: Gpu, plan: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    resolved = plan.resolved
    console.print(f"{model}, {load.context:,} tokens of prompt and {load.new_tokens:,} of answer, {resolved.requested}")
    if resolved.fallback_reason is not None:
        console.print(f"runs exact: {resolved.fallback_reason}")
    table = Table(box=None, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for row in _lines(load, plan):
        table.add_row(*row)
    console.print(table)
    splits = Table("GPUs", "requests/s", "bound by", box=None)
    for one in (*plan.splits[:3], *plan.splits[3:][-1:]):
        splits.add_row(one.text, f"{one.requests_per_s:.3g}", one.bound_by)
    console.print(splits)
    flags = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in settings(load, gpu, plan).items())
    console.print(f"settings: {flags}")
    for line in plan.assumptions:
        console.print(f"assumed: {line}")


def _lines(load: Load, plan: Plan) -> Iterator[tuple[str, str, str]]:
    """What, how much, and a remark."""
    from ..benchmarks.tables import figure, seconds

    def size(value: float) -> str:
        return figure("of_bytes", value)

    one = plan.sequence
    yield "weights, each GPU", size(plan.weights_bytes), ""
    yield "caches, each decode GPU", size(plan.cache_bytes), ""
    yield "a sequence, on the GPU", size(one.device_bytes), f"{one.device_bytes / one.bf16_bytes:.1%} of its bf16 cache"
    if one.host_bytes:
        yield "a sequence, in host memory", size(one.host_bytes), ""
    yield "a sequence, handed off", size(one.handoff_bytes), f"{one.handoff_bytes / one.bf16_bytes:.1%}"
    yield "a sequence, in the store", size(one.store_bytes), "durability tokens"
    yield "sequences, each decode GPU", f"{plan.sequences_per_gpu:,}", "run at once"
    if plan.parked_per_gpu:
        yield "", f"{plan.parked_per_gpu:,}", "more take turns, from host memory"
    hidden = "the network is slower than prefill" if plan.handoff_s > plan.prefill_s else "behind prefill"
    yield "prefill of a prompt", seconds(plan.prefill_s), ""
    yield "handoff of a prompt", seconds(plan.handoff_s), hidden
    yield "decode step, full batch", seconds(plan.step_s), f"{plan.tokens_per_s:,.0f} tokens/s a GPU"
    yield "store, all sequences", size(plan.store_bytes), ""
    if plan.gpus_for_concurrency is not None:
        yield "decode GPUs needed", f"{plan.gpus_for_concurrency:,}", f"for {load.concurrency:,} sequences at once"


def register(app: typer.Typer) -> None:
    """Add `plan` to the command."""
    app.command()(plan)
