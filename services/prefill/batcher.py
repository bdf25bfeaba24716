"""Which work items of which prompts run next. Pure policy, free of torch.

A work item is (request, layer, chunk of rows). Work is counted in row-layers: one row through one layer. A pack is the
items that run in one step; all are of one layer, so that their linear maps run as one.

Order. A prompt that used up its patience is *urgent*. First come the urgent prompts in order of arrival, then the
others, least remaining work first (ties: order of arrival). The first one that can run leads the pack; others at the
same layer fill what is left of it, in the same order.

Starvation bound. When a later arrival leads a pack in which prompt i (not held back by its receiver) has no item, the
pack's rows are charged to i; i becomes urgent when the charge reaches `patience` x its whole work. From then on no
later arrival leads while i can run. So later arrivals delay i by less than

    patience x work(i) + max_pack_tokens     row-layers,

plus, when i was still waiting for room among the started prompts, what the ones started by then have left
(at most max_active_tokens x num_layers): while an urgent prompt waits for room, no later arrival starts.
Items that fill up a pack that i is in or that an earlier arrival leads are not counted: they take no turn away.

The grid of chunks is fixed by the row's index in its own prompt, so what a row is computed from does not depend on
packing. Rows that were found (`found`) do not run in the layers that they were found for: work counts without them, and
items begin behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...errors import ConfigError, DuplicateRequest


@dataclass(frozen=True)
class WorkItem:
    """Rows [begin, end) of one prompt at one layer."""

    request_id: str
    layer: int
    begin: int
    end: int

    @property
    def num_rows(self) -> int:
        return self.end - self.begin


@dataclass
class _Prompt:
    request_id: str
    arrival: int
    num_rows: int
    patience_rows: float
    layer: int = 0
    done_rows: int = 0
    charged_rows: int = 0
    started: bool = False
    found_rows: int = 0
    found_layers: int = 0

    def first_row(self, layer: int) -> int:
        """The first row of a layer that runs."""
        return self.found_rows if layer < self.found_layers else 0

    @property
    def urgent(self) -> bool:
        return self.charged_rows >= self.patience_rows


class Batcher:
    """Keeps how far every prompt is and plans packs.

    Args:
        num_layers: layers of the model.
        chunk_tokens: rows of a chunk.
        max_pack_tokens: rows of a pack, at least `chunk_tokens`.
        max_active_tokens: prompt rows that may be in flight (started, not finished) at once; a longer prompt runs
            alone.
        patience: see the starvation bound above.
    """

    def __init__(
        self,
        num_layers: int,
        chunk_tokens: int,
        max_pack_tokens: int,
        max_active_tokens: int,
        patience: float = 1.0,
    ) -> None:
        if chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens: got {chunk_tokens}; allowed: at least 1")
        if max_pack_tokens < chunk_tokens:
            raise ConfigError(
                f"max_pack_tokens: got {max_pack_tokens}; allowed: at least chunk_tokens = {chunk_tokens}"
            )
        if max_active_tokens < 1:
            raise ConfigError(f"max_active_tokens: got {max_active_tokens}; allowed: at least 1")
        if patience < 0:
            raise ConfigError(f"patience: got {patience}; allowed: at least 0")
        self.num_layers = num_layers
        self.chunk_tokens = chunk_tokens
        self.max_pack_tokens = max_pack_tokens
        self.max_active_tokens = max_active_tokens
        self.patience = patience
        self._prompts: dict[str, _Prompt] = {}
        self._arrivals = 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._prompts

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def num_pending_tokens(self) -> int:
        """Work left over all prompts, in rows through the whole model, rounded up."""
        # copied first: status reports read this from another thread
        prompts = list(self._prompts.values())
        return -(-sum(self._remaining(p) for p in prompts) // self.num_layers)

    def add(self, request_id: str, num_rows: int) -> None:
        """Queue a prompt of `num_rows` ≥ 1 rows."""
        if request_id in self._prompts:
            raise DuplicateRequest(f"request {request_id} is already running")
        assert num_rows >= 1, "an empty prompt has no work"
        patience_rows = self.patience * num_rows * self.num_layers
        self._prompts[request_id] = _Prompt(request_id, self._arrivals, num_rows, patience_rows)
        self._arrivals += 1

    def found(self, request_id: str, num_rows: int, num_layers: int) -> None:
        """The first rows of a prompt that has not started need not run in its first layers. Counts instead of what was
        found before.

        Args:
            num_rows: a multiple of `chunk_tokens`, fewer than the prompt's.
            num_layers: all that these rows pass.
        """
        prompt = self._prompts[request_id]
        assert not prompt.started, "found before it starts"
        assert num_rows % self.chunk_tokens == 0 and num_rows < prompt.num_rows, "whole chunks, and a row is left"
        prompt.found_rows, prompt.found_layers = num_rows, num_layers
        prompt.done_rows = prompt.first_row(0)
        prompt.patience_rows = self.patience * self._remaining(prompt)

    def remove(self, request_id: str) -> None:
        """Forget a prompt that is finished, cancelled or failed."""
        del self._prompts[request_id]

    def plan(self, ready: Callable[[str], bool]) -> list[WorkItem]:
        """The items of the next pack, leader first; empty when nothing can run.

        Args:
            ready: whether a prompt may run now (False = its receiver holds it back).
        """
        waiting = [p for p in sorted(self._prompts.values(), key=self._rank) if ready(p.request_id)]
        runnable = self._runnable(waiting)
        if not runnable:
            return []
        leader = runnable[0]
        items: list[WorkItem] = []
        room = self.max_pack_tokens
        active_tokens = self._active_tokens()
        for prompt in runnable:
            if prompt.layer != leader.layer:
                continue
            if not prompt.started and not self._has_room(prompt, active_tokens):
                continue
            taken = self._take(prompt, room)
            if taken and not prompt.started:
                prompt.started = True
                active_tokens += prompt.num_rows
            items += taken
            room -= sum(item.num_rows for item in taken)
        self._charge(waiting, leader, items)
        return items

    def advance(self, items: Sequence[WorkItem]) -> list[str]:
        """Count the items of a pack as done. Returns the prompts whose layer is now complete, in the pack's order."""
        complete = []
        for item in items:
            prompt = self._prompts.get(item.request_id)
            if prompt is None:
                continue
            assert (prompt.layer, prompt.done_rows) == (item.layer, item.begin), "items run in order"
            prompt.done_rows = item.end
            if item.end == prompt.num_rows:
                complete.append(item.request_id)
        return complete

    def next_layer(self, request_id: str, num_rows: int) -> None:
        """Move a prompt whose layer is complete to the next one, which `num_rows` of its rows enter."""
        prompt = self._prompts[request_id]
        assert prompt.done_rows == prompt.num_rows and 1 <= num_rows <= prompt.num_rows, (
            "a layer ends with all its rows"
        )
        prompt.layer += 1
        prompt.num_rows = num_rows
        prompt.done_rows = prompt.first_row(prompt.layer)
        assert prompt.layer < self.num_layers, "the last layer's prompts are removed"

    def _remaining(self, prompt: _Prompt) -> int:
        done_rows = prompt.done_rows - prompt.first_row(prompt.layer)
        not_run = max(0, prompt.found_layers - prompt.layer) * prompt.found_rows
        return (self.num_layers - prompt.layer) * prompt.num_rows - not_run - done_rows

    def _active_tokens(self) -> int:
        return sum(p.num_rows for p in self._prompts.values() if p.started)

    def _has_room(self, prompt: _Prompt, active_tokens: int) -> bool:
        return active_tokens == 0 or active_tokens + prompt.num_rows <= self.max_active_tokens

    def _rank(self, prompt: _Prompt) -> tuple[int, int, int]:
        return (0, prompt.arrival, 0) if prompt.urgent else (1, self._remaining(prompt), prompt.arrival)

    def _runnable(self, waiting: Sequence[_Prompt]) -> list[_Prompt]:
        """Those of `waiting` that are started or may start, in the same order."""
        active_tokens = self._active_tokens()
        runnable = []
        last_start: int | None = None  # later arrivals than this one may not start
        for prompt in waiting:
            if not prompt.started:
                if last_start is not None and prompt.arrival > last_start:
                    continue
                if not self._has_room(prompt, active_tokens):
                    if prompt.urgent and last_start is None:
                        last_start = prompt.arrival
                    continue
            runnable.append(prompt)
        return runnable

    def _take(self, prompt: _Prompt, room: int) -> list[WorkItem]:
        items = []
        begin = prompt.done_rows
        while begin < prompt.num_rows:
            end = min(begin + self.chunk_tokens, prompt.num_rows)
            if end - begin > room:
                break
            items.append(WorkItem(prompt.request_id, prompt.layer, begin, end))
            room -= end - begin
            begin = end
        return items

    def _charge(self, waiting: Sequence[_Prompt], leader: _Prompt, items: Sequence[WorkItem]) -> None:
        num_rows = sum(item.num_rows for item in items)
        in_pack = {item.request_id for item in items}
        for prompt in waiting:
            if prompt.arrival < leader.arrival and prompt.request_id not in in_pack:
                prompt.charged_rows += num_rows
