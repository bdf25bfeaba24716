"""Workers whose model several processes hold: rank 0 is the worker itself, the others are its children on the same
machine and compute with it (`--tensor-parallel-size`).

    worker (rank 0) ── its engine, its gRPC service, its frames
       ├── python -m kvsluice.services.ranks (rank 1) ── a part of the model, told what to run
       └── …

Children get the configuration on standard input, which also tells them when their worker is gone: they end with it. A
child that ends takes the worker with it, as nothing can be computed without it; both are then started anew together.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import InternalError
from .config import ServeConfig
from .lifecycle import end_process
from .telemetry import configure_logging
from .worker import compute_dtype, use_threads

if TYPE_CHECKING:
    import torch

    from ..models.model import Model
    from ..models.parallel import Ranks

WAIT_S = 10.0


class Children:
    """The other ranks of a worker.

    Args:
        address: where they find rank 0.
        lost: called when one of them ends before it is told to.
    """

    def __init__(self, config: ServeConfig, role: str, host: str, address: str, lost: Callable[[], None]) -> None:
        self._lost = lost
        self._ending = False
        told = {"config": config.to_json(), "role": role, "host": host, "address": address}
        self._processes = [self._start(told | {"rank": rank}) for rank in range(1, config.ranks_of(role))]

    def _start(self, told: dict[str, Any]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-m", __spec__.name]
        child = subprocess.Popen(command, stdin=subprocess.PIPE)  # noqa: S603 - this module
        assert child.stdin is not None
        child.stdin.write(json.dumps(told).encode() + b"\n")
        child.stdin.flush()
        threading.Thread(target=self._watch, args=(child,), name=f"rank-{told['rank']}", daemon=True).start()
        return child

    def _watch(self, child: subprocess.Popen[bytes]) -> None:
        child.wait()
        if not self._ending:
            self._lost()

    @contextmanager
    def ending(self) -> Iterator[None]:
        """While their engines tell them to end; then wait for that, and end those that do not."""
        self._ending = True
        yield
        for child in self._processes:
            try:
                child.wait(WAIT_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def load_parallel_model(config: ServeConfig, role: str, host: str) -> tuple[Model, Children | None]:
    """The model of a worker, or its part where other processes hold the rest; they are started.

    Args:
        role: prefill, decode or both.
        host: the worker's own address.

    Raises:
        KvsluiceError: the model cannot be loaded, or not be held by so many.
    """
    from ..models.loader import load_config
    from ..models.parallel import Ranks, check_size, host_meeting

    size = config.ranks_of(role)
    if size == 1:
        return load_part(config, None, _device(config, 0)), None
    check_size(load_config(config.model, random_weights=config.random_weights), size)
    meeting, address = host_meeting(host)

    def lost() -> None:
        end_process(InternalError("a rank of the model is gone"))

    children = Children(config, role, host, address, lost)
    device = _device(config, 0)
    return load_part(config, Ranks(0, size, meeting, device), device), children


def load_part(config: ServeConfig, ranks: Ranks | None, device: torch.device) -> Model:
    """What a process holds of the model."""
    from ..models.loader import load_model
    from .device import check_device

    check_device(str(device))
    return load_model(
        config.model,
        dtype=compute_dtype(config.dtype),
        device=device,
        random_weights=config.random_weights,
        seed=config.seed or 0,
        ranks=ranks,
    )


def _device(config: ServeConfig, rank: int) -> torch.device:
    """Ranks have neighbouring GPUs."""
    import torch

    device = torch.device(config.device)
    return device if device.type == "cpu" else torch.device("cuda", (device.index or 0) + rank)


def follow(told: dict[str, Any]) -> None:
    """Be a rank until rank 0 has no more to do."""
    from ..models.parallel import Ranks, reach_meeting

    config, role, rank = ServeConfig.from_json(told["config"]), told["role"], told["rank"]
    configure_logging(config.log_level, config.log_format, f"rank-{rank}")
    use_threads(config.torch_threads, config.processes_of(role))()
    size, device = config.ranks_of(role), _device(config, rank)
    ranks = Ranks(rank, size, reach_meeting(told["address"], told["host"]), device)
    model = load_part(config, ranks, device)
    if role == "prefill":
        from .prefill.parallel import Follower

        Follower(model).run()
    else:
        from .decode.making import make_engine
        from .decode.parallel import Follower as DecodeFollower

        DecodeFollower(make_engine(model, config)).run()


def end_with(worker: BinaryIO) -> None:
    """End this process when the one that holds the other end of a pipe is gone."""
    while worker.read(1):
        pass
    os._exit(1)


def main() -> None:
    """A child's whole life."""
    told = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=end_with, args=(sys.stdin.buffer,), daemon=True).start()
    follow(told)
    # what the pipe's reader waits for does not come any more
    os._exit(0)


if __name__ == "__main__":
    main()
