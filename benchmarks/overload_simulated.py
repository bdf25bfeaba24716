"""The gateway's admission before a simulated engine: what is served in time, from half its capacity to ten times that.

Prompts run one after the other at a rate; each choice then makes a token a step. The policy, its queue and its measures
are the gateway's own; only time and the engine are made up.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from ..errors import Overloaded
from ..kvstore.identity import TenantId
from ..services.gateway.admission import AdmissionPolicy, Ask
from ..services.gateway.fair_queue import Place
from ..services.gateway.waits import Backlog, Throughput
from ..services.keys import UNLIMITED, TenantLimits


@dataclass(frozen=True)
class Tenant:
    """Who asks.

    Attributes:
        share: of all arrivals.
    """

    name: str
    share: float
    limits: TenantLimits = UNLIMITED


@dataclass(frozen=True)
class Engine:
    """What serves.

    Attributes:
        prompt_tokens_per_s: of prompts, which run one after the other.
        step_s: of decode, whatever the batch.
        max_num_seqs: choices that decode together.
    """

    prompt_tokens_per_s: float
    step_s: float
    max_num_seqs: int


@dataclass(frozen=True)
class Shape:
    """What is asked: lognormal lengths about these means."""

    prompt_tokens: float = 600.0
    answer_tokens: float = 80.0
    spread: float = 0.5

    def draw(self, source: random.Random) -> tuple[int, int]:
        """Tokens of a prompt and of its answer."""
        shift = self.spread**2 / 2
        prompt, answer = (
            max(1, round(source.lognormvariate(math.log(mean) - shift, self.spread)))
            for mean in (self.prompt_tokens, self.answer_tokens)
        )
        return prompt, answer


def capacity(engine: Engine, shape: Shape) -> float:
    """Requests a second that the engine can serve without end."""
    prefill_s = shape.prompt_tokens / engine.prompt_tokens_per_s
    return 1 / max(prefill_s, (prefill_s + shape.answer_tokens * engine.step_s) / engine.max_num_seqs)


@dataclass
class Outcome:
    """What became of the requests that came after the warm-up."""

    offered: int = 0
    good: int = 0
    late: int = 0
    shed: Counter[str] = field(default_factory=Counter)
    ttft_s: list[float] = field(default_factory=list)
    good_of: Counter[str] = field(default_factory=Counter)
    tokens_of: Counter[str] = field(default_factory=Counter)


class Simulation:
    """One run.

    Args:
        rate: arrivals a second, a Poisson process.
        slo_ttft_s: a request whose first token comes later is not good.
        max_ttft_s: see `AdmissionPolicy`.
    """

    def __init__(
        self,
        engine: Engine,
        shape: Shape,
        tenants: list[Tenant],
        rate: float,
        slo_ttft_s: float,
        max_ttft_s: float | None,
        max_queue: int = 1024,
        seed: int = 0,
    ) -> None:
        self._engine, self._shape, self._tenants = engine, shape, tenants
        self._rate, self._slo_s = rate, slo_ttft_s
        self._source, self._numbers = random.Random(seed), count()
        self.now_s = 0.0
        self.policy = AdmissionPolicy(
            engine.max_num_seqs, max_queue, lambda: self.now_s, max_ttft_s, backlog=self._backlog
        )
        self._throughput = Throughput(lambda: self.now_s)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._pending: list[tuple[Place, int]] = []  # prompts that run or wait to, with their tokens
        self._asked: dict[Place, tuple[float, str, int, int]] = {}
        self.outcome = Outcome()

    def run(self, warm_up_s: float, measured_s: float) -> Outcome:
        """Let time pass, until what came in the measured part has ended."""
        self._begin_s, self._end_s = warm_up_s, warm_up_s + measured_s
        self._at(self._source.expovariate(self._rate), self._arrive)
        while self._events:
            self.now_s, _, event = heapq.heappop(self._events)
            event()
        return self.outcome

    def _at(self, when_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._numbers), event))

    def _arrive(self) -> None:
        after_s = self.now_s + self._source.expovariate(self._rate)
        if after_s < self._end_s:
            self._at(after_s, self._arrive)
        (tenant,) = self._source.choices(self._tenants, [one.share for one in self._tenants])
        prompt, answer = self._shape.draw(self._source)
        counts = self._begin_s <= self.now_s
        self.outcome.offered += counts
        ask = Ask(1, TenantId(tenant.name), tenant.limits, prompt)
        try:
            place, starts = self.policy.offer(ask)
        except Overloaded as exc:
            self.outcome.shed[exc.reason] += counts
            return
        self._asked[place] = (self.now_s, tenant.name, prompt, answer)
        if starts:
            self._start(place)

    def _backlog(self) -> Backlog:
        return Backlog([tokens for _, tokens in self._pending], 1, self._throughput.speed)

    def _start(self, place: Place) -> None:
        tokens = self._asked[place][2]
        self._throughput.begin(idle=not self._pending)
        self._pending.append((place, tokens))
        if len(self._pending) == 1:
            self._prefill()

    def _prefill(self) -> None:
        _, tokens = self._pending[0]
        self._at(self.now_s + tokens / self._engine.prompt_tokens_per_s, self._first_token)

    def _first_token(self) -> None:
        place, tokens = self._pending.pop(0)
        self._throughput.end(tokens)
        if self._pending:
            self._prefill()
        asked_s, tenant, _, answer = self._asked[place]
        ttft_s = self.now_s - asked_s
        if asked_s >= self._begin_s:
            self.outcome.ttft_s.append(ttft_s)
            good = ttft_s <= self._slo_s
            self.outcome.good += good
            self.outcome.late += not good
            self.outcome.good_of[tenant] += good
        self._at(self.now_s + answer * self._engine.step_s, lambda: self._ended(place))
        for started in self.policy.go_on():
            self._start(started)

    def _ended(self, place: Place) -> None:
        asked_s, tenant, prompt, answer = self._asked.pop(place)
        if asked_s >= self._begin_s:
            self.outcome.tokens_of[tenant] += prompt + answer
        self.policy.answered(answer)
        for started in self.policy.end(place, 1, prompt + answer):
            self._start(started)


def measure(
    name: str, engine: Engine, shape: Shape, tenants: list[Tenant], loads: list[float], slo_s: float, max_ttft_s: float,
    measured_s: float = 600.0, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Goodput at each multiple of the capacity, as rows of a JSON file."""
    most, rows = capacity(engine, shape), list[dict[str, Any]]()
    for load in loads:
        run = Simulation(engine, shape, tenants, load * most, slo_s, max_ttft_s, seed=seed)
        outcome = run.run(60.0, measured_s)
        ttft = sorted(outcome.ttft_s)
        rows.append(
            {
                "load": load,
                "offered_per_s": outcome.offered / measured_s,
                "goodput_per_s": outcome.good / measured_s,
                "late": outcome.late,
                "shed": dict(sorted(outcome.shed.items())),
                "ttft_p50_s": ttft[len(ttft) // 2] if ttft else None,
                "ttft_p99_s": ttft[int(len(ttft) * 0.99)] if ttft else None,
                "goodput_per_s_by_tenant": {one.name: outcome.good_of[one.name] / measured_s for one in tenants},
                "tokens_per_s_by_tenant": {one.name: outcome.tokens_of[one.name] / measured_s for one in tenants},
            }
        )
    peak = max(row["goodput_per_s"] for row in rows)
    for row in rows:
        row["of_peak"] = row["goodput_per_s"] / peak if peak else 0.0
    return {"name": name, "capacity_per_s": most, "slo_ttft_s": slo_s, "max_ttft_s": max_ttft_s, "rows": rows}
