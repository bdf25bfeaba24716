"""Build every compiled kernel for an H100 on a machine without a GPU, at shapes of real models, and print what each
takes: a line of name, shared bytes, bytes of spilled registers a thread. Run by `test_builds.py`."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kvsluice.kernels.attention_mass import attention_mass
from kvsluice.kernels.attention_partial import attention_partial, merge_partials
from kvsluice.kernels.causal_attention.triton import merge
from kvsluice.kernels.dispatch import TRITON, forced
from kvsluice.kernels.landmarks import score_landmarks, select_chunks
from kvsluice.kernels.quantize import dequantize, dequantize_chunks, quantize
from kvsluice.kernels.rms_norm import add_rms_norm, rms_norm
from kvsluice.kernels.rope import apply_rope
from kvsluice.kernels.sparse_reconstruct import low_rank_chunks
from kvsluice.kernels.swiglu import swiglu

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
OBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Hopper:
    """Stands in for a driver: kernels are built for compute capability 9.0 and not launched."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def build(kernel: JITFunction[Any], grid: Any) -> Any:
    """What `kernel[grid]` calls instead of launching."""

    def call(*args: Any, **kwargs: Any) -> None:
        built = kernel.run(*args, grid=grid, warmup=True, **kwargs)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"])
            file.flush()
            usage = subprocess.run([OBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
        stack = re.search(r"STACK:(\d+)", usage.stdout)
        print(kernel.__name__, built.metadata.shared, stack[1] if stack else -1)

    return call


def zeros(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


def attention(heads: int, group: int, d: int, dtype: torch.dtype) -> None:
    """Ops that multiply queries and keys."""
    q, k = zeros(300, heads * group, d, dtype=dtype), zeros(700, heads, d, dtype=dtype)
    at = torch.arange(700)
    out = attention_partial(q[:2], k.transpose(0, 1), k.transpose(0, 1), at, at[-2:], 100)
    merge_partials([out, out])
    attention_mass(q, k, at[-300:], at, 100)
    score_landmarks(q[:2], k.to(torch.int8), zeros(700, heads, dtype=F16))


def rows(d: int, dtype: torch.dtype) -> None:
    """Ops on rows."""
    x = zeros(100, 12, d, dtype=dtype)
    rms_norm(x[:, :8], x[0, 0], 1e-5)
    add_rms_norm(x.flatten(1), x.flatten(1), x[0].flatten(), 1e-5)
    apply_rope(x[:, :8], zeros(100, d), zeros(100, d))
    swiglu(*x.flatten(1).chunk(2, -1))
    merge([(x[:, :8], zeros(8, 100))] * 2, dtype)
    low_rank_chunks(zeros(9, 8, 160), zeros(160, 8, d, dtype=dtype), torch.zeros(9, dtype=torch.int64))
    for bits, group, axis in ((4, 32, "channel"), (2, 24, "token"), (8, 160, "token")):
        packed = quantize(x[:96], bits, group, axis)
        dequantize(*packed, bits, group, axis, d)
        chosen = torch.zeros(9, dtype=torch.int64)
        dequantize_chunks(*packed, chosen, chosen, 8, bits, group, axis, d)


def main() -> None:
    driver.set_active(Hopper())
    JITFunction.__getitem__ = build
    with forced(TRITON):
        for shape in ((8, 4, 128, BF16), (9, 3, 64, BF16), (2, 8, 96, F32), (4, 1, 256, F32)):
            attention(*shape)
        for d, dtype in ((64, F16), (128, BF16), (256, F32)):
            rows(d, dtype)
        hidden = torch.zeros(2, 8, 5000, dtype=torch.bool)
        select_chunks(zeros(2, 32, 5000), 8, 256, hidden)
        select_chunks(zeros(2, 32, 500), 8, 64, None)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
