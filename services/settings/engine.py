"""What workers run and how much memory they have for it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from .base import MIB, TIB, Positive, Settings

DEFAULT_PREFIX_BYTES = 1024 * MIB


class EngineSettings(Settings):
    """The model, its caches and its work items."""

    model: str = Field(
        "smollm2-135m-longctx", min_length=1, max_length=4096, description="built-in name, Hugging Face folder or GGUF"
    )
    served_model_name: str | None = Field(
        None, min_length=1, max_length=256, description="name that clients use; default: that of --model"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="compute dtype; auto = fp32 on a CPU, bf16 on a GPU"
    )
    profile: str | None = Field(
        None,
        min_length=1,
        max_length=4096,
        description="file of numbers that were calibrated for the model, as `kvsluice calibrate` writes it; default: "
        "what comes with kvsluice for the model",
    )
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d{1,3})?)$", description="cpu, cuda or cuda:N")
    random_weights: bool = Field(False, description="random weights of the model's shape")
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="seed of random weights and of requests that bring none; default: drawn anew"
    )
    max_model_len: int | None = Field(
        None, ge=8, le=2**24, description="tokens of prompt and answer together; default: the model's own"
    )
    max_new_tokens: Positive = Field(4096, description="answer length when a request names none, at most")
    max_num_seqs: Positive = Field(32, description="choices that a decode worker runs together")
    kv_cache_bytes: int = Field(1024 * MIB, ge=MIB, le=64 * TIB, description="KV cache of each decode worker")
    kv_offloading_bytes: int = Field(
        0, ge=0, le=64 * TIB, description="host memory of each decode worker, for values and parked requests; 0 = none"
    )
    kv_time_slice_steps: int = Field(
        128,
        ge=0,
        le=2**20,
        description="decode steps after which a request makes room for one that waits, in the host memory that "
        "kv_offloading_bytes gives; 0 = never",
    )
    tensor_parallel_size: int = Field(
        1, ge=1, le=64, description="processes, with a GPU each, that hold the model of a worker together"
    )
    prefill_tensor_parallel_size: int | None = Field(
        None, ge=1, le=64, description="the same for prefill workers; default: tensor_parallel_size"
    )
    decode_tensor_parallel_size: int | None = Field(
        None,
        ge=1,
        le=64,
        description="the same for decode workers, which park nothing then; default: tensor_parallel_size",
    )
    chunk_tokens: int | None = Field(
        None, ge=16, le=65536, description="rows of one prefill work item; default: 512 on a CPU, 2048 on a GPU"
    )
    prefix_cache_bytes: int | None = Field(
        None,
        ge=0,
        le=64 * TIB,
        description="host memory of each prefill worker for beginnings that prompts of a tenant share, with prefill "
        "workers of one process each; 0 = none; default: 1 GiB on a CPU, none on a GPU",
    )
    default_recipe: str = Field(
        "balanced", min_length=1, max_length=64, description="recipe of requests that name none"
    )
    torch_threads: int | None = Field(
        None, ge=1, le=1024, description="threads of each worker's torch; default: cores / workers"
    )

    @field_validator("kv_offloading_bytes")
    @classmethod
    def _a_page(cls, value: int) -> int:
        if 0 < value < MIB:
            raise ValueError(f"must be 0, or at least {MIB}, one page")
        return value

    @field_validator("prefix_cache_bytes")
    @classmethod
    def _worthwhile(cls, value: int | None) -> int | None:
        if value is not None and 0 < value < MIB:
            raise ValueError(f"must be 0, or at least {MIB}")
        return value

    def prefix_bytes(self, device: str) -> int:
        """`prefix_cache_bytes` of a worker whose model is on a device of this type."""
        if self.prefix_cache_bytes is None:
            return DEFAULT_PREFIX_BYTES if device == "cpu" and self.ranks_of("prefill") == 1 else 0
        return self.prefix_cache_bytes

    def ranks_of(self, role: str) -> int:
        """Processes that hold the model of a worker of a role together."""
        own = {"prefill": self.prefill_tensor_parallel_size, "decode": self.decode_tensor_parallel_size}.get(role)
        return own or self.tensor_parallel_size
