"""Ranks that hold one model together: each has some heads and a part of every feed-forward block (Megatron-LM,
arXiv 1909.08053 §3).

    rank 0 leads: it plans, samples and talks to the world; the others follow and are told what to run
    queries, keys, values, gate and up are cut by rows, the outputs of attention and feed-forward block by columns, so
    that a layer needs two sums over the ranks; embedding, norms and head are whole everywhere, so that after each sum
    all ranks have the same hidden rows, bit for bit
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError
from .hf_config import ModelConfig

_Store: Any = dist.TCPStore  # type: ignore[attr-defined]
Meeting = Any  # a `TCPStore`, which torch's stubs do not name
SIOCGIFADDR = 0x8915  # of Linux: an interface's IPv4 address
MEETING_TIMEOUT = timedelta(seconds=300)
IDLE = timedelta(days=365)  # a rank that follows waits for work as long as there is none
SUM_TIMEOUT = timedelta(seconds=120)  # but not for its peers in the middle of a layer


def check_size(config: ModelConfig, size: int) -> None:
    """Refuse a number of ranks that does not divide a model.

    Raises:
        ConfigError: names what it would have to divide.
    """
    for name, whole in (
        ("heads", config.num_heads),
        ("KV heads", config.num_kv_heads),
        ("rows of the feed-forward block", config.intermediate_size),
    ):
        if whole % size:
            raise ConfigError(
                f"tensor_parallel_size: {size} does not divide the model's {whole} {name}; allowed: "
                + ", ".join(str(n) for n in range(1, config.num_kv_heads + 1) if divides(config, n))
            )


def divides(config: ModelConfig, size: int) -> bool:
    """Whether a model can be cut into so many parts."""
    return not (config.num_heads % size or config.num_kv_heads % size or config.intermediate_size % size)


def part_of(config: ModelConfig, size: int) -> ModelConfig:
    """The configuration by which one of `size` ranks computes: fewer heads, a part of the feed-forward block."""
    return replace(
        config,
        num_heads=config.num_heads // size,
        num_kv_heads=config.num_kv_heads // size,
        intermediate_size=config.intermediate_size // size,
    )


def cut(x: Tensor, part: Sequence[int], rank: int) -> Tensor:
    """The part of a whole tensor that a rank holds: along the one axis that is shorter in `part`, or all of it.

    Raises:
        ValueError: more than one axis is.
    """
    axes = [axis for axis, (whole, own) in enumerate(zip(x.shape, part, strict=True)) if whole != own]
    if not axes:
        return x
    if len(axes) > 1:
        raise ValueError(f"{list(x.shape)} is not cut into {list(part)} along one axis")
    return x.narrow(axes[0], rank * part[axes[0]], part[axes[0]])


class RanksBroken(BaseException):
    """Another rank is gone, or did something else: nothing can be computed any more. No handler that isolates the
    faults of one request may take it for one, so it is no `Exception`; a process that meets it ends."""


@contextmanager
def _together(what: str) -> Iterator[None]:
    """Memory that runs out here counts, too: what the others send for this would be taken for the next thing."""
    try:
        yield
    except (RuntimeError, dist.DistError) as exc:
        raise RanksBroken(f"ranks of the model no longer {what} together") from exc


class Ranks:
    """This process's place among those that hold a model together, and what they do at once.

    Args:
        rank: of this process, from 0.
        size: number of ranks.
        meeting: where they find each other: `host_meeting` on rank 0, `reach_meeting` on the others.
        device: of the model. Sums of a GPU's tensors go through NCCL, everything else through gloo.

    Raises:
        ConfigError: the others did not come.
    """

    def __init__(self, rank: int, size: int, meeting: Meeting, device: torch.device) -> None:
        self.rank, self.size, self._device = rank, size, device
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, store=meeting, rank=rank, world_size=size, timeout=MEETING_TIMEOUT)
            everyone = list(range(size))
            self._words = dist.new_group(everyone, timeout=IDLE, backend="gloo")
            self._sums = dist.new_group(everyone, timeout=SUM_TIMEOUT, backend=backend)
        except (RuntimeError, ValueError, dist.DistError) as exc:
            raise ConfigError(f"tensor_parallel_size: rank {rank} of {size} cannot reach the others") from exc

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """x, replaced by its sum over all ranks, the same bits everywhere."""
        with _together("sum"):
            dist.all_reduce(x, group=self._sums)
        return x

    def gather(self, x: Tensor, axis: int) -> Tensor | None:
        """The ranks' tensors side by side along an axis, on rank 0; None elsewhere."""
        with _together("gather"):
            x = x.contiguous()
            parts = [torch.empty_like(x) for _ in range(self.size)] if self.leads else None
            dist.gather(x, parts, dst=0, group=self._sums)
            return None if parts is None else torch.cat(parts, dim=axis)

    def tell(self, word: str, **fields: Any) -> None:
        """Have the others do what `word` means to them; JSON values only. Only rank 0 tells."""
        assert self.leads, "the others are told"
        text = json.dumps({"word": word} | fields, separators=(",", ":"), allow_nan=False).encode()
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        with _together("listen"):
            dist.broadcast(torch.tensor([len(data)]), src=0, group=self._words)
            dist.broadcast(data, src=0, group=self._words)

    def hear(self) -> dict[str, Any]:
        """What rank 0 tells next, under `word` what it is. Waits as long as it takes."""
        size = torch.zeros(1, dtype=torch.int64)
        with _together("listen"):
            dist.broadcast(size, src=0, group=self._words)
            data = torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(data, src=0, group=self._words)
        heard: dict[str, Any] = json.loads(data.numpy().tobytes())
        return heard

    def share(self, x: Tensor | None, shape: Sequence[int] = (), dtype: torch.dtype = torch.int64) -> Tensor:
        """A tensor of rank 0 on every rank's device; the others say its shape and dtype."""
        with _together("share"):
            out = torch.empty(*shape, dtype=dtype) if x is None else x.cpu().contiguous()
            dist.broadcast(out, src=0, group=self._words)
        return out.to(self._device) if x is None else x

    def hand_out(self, parts: Sequence[Mapping[str, Tensor]]) -> None:
        """Give every other rank tensors of its own; rank 0's are `parts[0]`, which stay here."""
        for rank, tensors in enumerate(parts[1:], start=1):
            for tensor in tensors.values():
                with _together("share"):
                    dist.send(_bytes_of(tensor), dst=rank, group=self._words)

    def take(self, specs: Mapping[str, tuple[str, Sequence[int]]]) -> dict[str, Tensor]:
        """What rank 0 hands out, on the CPU; of each tensor dtype, as torch names it, and shape."""
        taken = {}
        for name, (dtype, shape) in specs.items():
            tensor = torch.empty(*shape, dtype=getattr(torch, dtype))
            data = _bytes_of(tensor)
            with _together("share"):
                dist.recv(data, src=0, group=self._words)
            taken[name] = data.view(tensor.dtype).view(tensor.shape) if tensor.numel() else tensor
        return taken

    def close(self) -> None:
        """Leave the group; what the others do then fails."""
        dist.destroy_process_group()


def host_meeting(host: str) -> tuple[Meeting, str]:
    """Where ranks find each other: rank 0 listens on `host`, an address of this machine, and on nothing else.

    Returns:
        it, and host:port, which the others are told.
    """
    _use_interface(host)
    listening = socket.create_server((host, 0))
    port = listening.getsockname()[1]
    store = _Store(host, port, None, True, MEETING_TIMEOUT, wait_for_workers=False, master_listen_fd=listening.detach())
    return store, f"{host}:{port}"


def reach_meeting(address: str, own_host: str) -> Meeting:
    """What `host_meeting` gave, from another process, whose own address is `own_host`.

    Raises:
        ConfigError: nobody is there.
    """
    _use_interface(own_host)
    host, _, port = address.rpartition(":")
    try:
        return _Store(host, int(port), None, False, MEETING_TIMEOUT)
    except (RuntimeError, dist.DistError) as exc:
        raise ConfigError(f"tensor_parallel_size: rank 0 is not at {address}") from exc


def _use_interface(host: str) -> None:
    """Have gloo and NCCL listen on the interface of an address alone; without, they go by the host's name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24]
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(found) == host:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
                os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def _bytes_of(x: Tensor) -> Tensor:
    """uint8 [nbytes] on the CPU; shares memory where x is contiguous there."""
    return x.detach().cpu().contiguous().flatten().view(torch.uint8)
