"""What a process tells the controller of itself, every few seconds: a sign of life, and what there is to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..gateway.membership import Member, Role


@dataclass(frozen=True)
class Load:
    """Of a worker, or of a gateway's requests.

    Attributes:
        running, waiting: requests.
        pending_tokens: of prompts that have not run.
        usage: reserved share of the KV cache, on the device or in host memory, whichever is fuller.
    """

    running: int = 0
    waiting: int = 0
    pending_tokens: int = 0
    capacity_bytes: int = 0
    free_bytes: int = 0
    host_capacity_bytes: int = 0
    host_free_bytes: int = 0

    @property
    def idle(self) -> bool:
        return not (self.running or self.waiting or self.pending_tokens)

    @property
    def usage(self) -> float:
        pools = ((self.capacity_bytes, self.free_bytes), (self.host_capacity_bytes, self.host_free_bytes))
        return max((1 - free / capacity for capacity, free in pools if capacity), default=0.0)


@dataclass(frozen=True)
class GatewaySight:
    """What a gateway sees of the workers.

    Attributes:
        generation: of the membership that it goes by.
        uses: attempts under way, by worker.
        queue_s: how long a request waits for a worker, by worker; for those where that is known.
        admission_s: how long a request waits until it may go to any worker at all.
        ready: whether requests are served.
    """

    generation: int = 0
    uses: Mapping[str, int] = field(default_factory=dict)
    queue_s: Mapping[str, float] = field(default_factory=dict)
    admission_s: float = 0.0
    ready: bool = False


@dataclass(frozen=True)
class Report:
    """One process's account of itself.

    Attributes:
        incarnation: of the process; a restarted one has another.
        address: where it serves, host:port; empty where it cannot start.
        node: address of the machine.
        error: what keeps it from serving.
        error_type: the class of the error tree that this is.
        package: version of kvsluice.
        sight: of a gateway.
        http_address: of a gateway's OpenAI API; empty = it has none.
    """

    worker_id: str
    incarnation: str
    roles: tuple[Role, ...]
    address: str
    node: str
    pid: int
    model: str
    max_num_seqs: int
    package: str
    load: Load = Load()
    sight: GatewaySight | None = None
    error: str = ""
    error_type: str = ""
    http_address: str = ""

    def members(self, draining: bool) -> list[Member]:
        return [
            Member(self.worker_id, role, self.address, self.incarnation, self.model, self.max_num_seqs, draining)
            for role in self.roles
        ]
