"""What a pack of work items computes: rows of several prompts through one layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.attention_mass import attention_mass
from ...kernels.causal_attention import causal_attention
from ...models.model import Model
from .batcher import WorkItem
from .state import Prompt


@dataclass(frozen=True)
class Write:
    """What a pack has computed for a prompt, and where it goes once the pack has not failed."""

    target: Tensor
    value: Tensor
    adds: bool = False

    def apply(self) -> None:
        """Without synchronising: value replaces the target, or is added to it."""
        if self.adds:
            self.target.add_(self.value)
        else:
            self.target.copy_(self.value)


Outcome = dict[str, list[Write]]


def run_pack(model: Model, prompts: Mapping[str, Prompt], items: Sequence[WorkItem]) -> Outcome:
    """Take the rows of a pack through their layer, into the prompts' KV buffers. Running it again changes nothing.

    Args:
        prompts: by request, at least those of the items.

    Returns:
        of every prompt, the hidden rows behind the layer and what else becomes of it.
    """
    layer = items[0].layer
    of_items = [prompts[item.request_id] for item in items]
    x = _join([prompt.hidden[item.begin : item.end] for prompt, item in zip(of_items, items, strict=True)])
    sizes = [item.num_rows for item in items]
    rows_in: list[Tensor] = []
    attended: list[Tensor] = []
    rows_out: list[tuple[str, Tensor]] = []
    outcome: Outcome = {item.request_id: [] for item in items}
    parts = zip(*(torch.split(t, sizes) for t in (x, *model.qkv(layer, x))), strict=True)
    for prompt, item, (x_rows, q, k_pre, v) in zip(of_items, items, parts, strict=True):
        q = prompt.write(item.begin, item.end, q, k_pre, v)
        outcome[item.request_id] += _observe(prompt, q, item.begin, item.end)
        first = _first_row_on(item, prompt)
        if first < item.end:
            rows_in.append(x_rows[first - item.begin :])
            attended.append(attend_rows(prompt, q[first - item.begin :], first, item.end))
            rows_out.append((item.request_id, prompt.hidden[first : item.end]))
    if rows_out:
        y = model.finish_layer(layer, _join(rows_in), _join(attended))
        parts_out = torch.split(y, [len(target) for _, target in rows_out])
        for (request_id, target), rows in zip(rows_out, parts_out, strict=True):
            outcome[request_id].append(Write(target, rows))
    return outcome


def _first_row_on(item: WorkItem, prompt: Prompt) -> int:
    """The first row of the item whose output anything depends on."""
    if item.layer + 1 < prompt.model.config.num_layers:
        return item.begin
    return max(item.begin, prompt.num_rows - 1)


def attend_rows(prompt: Prompt, q: Tensor, begin: int, end: int) -> Tensor:
    """Attention of rows [begin, end) over the layer's rows up to `end`."""
    obs = prompt.obs
    positions = prompt.positions[:end]
    window = prompt.model.config.layer_windows[prompt.layer]
    no_gaps = prompt.num_rows == prompt.num_prompt_tokens
    return causal_attention(
        q, obs.k[:end], obs.v[:end], positions[begin:], positions, window, last_rows=True, no_gaps=no_gaps
    )


def _observe(prompt: Prompt, q: Tensor, begin: int, end: int) -> list[Write]:
    """What the recipe's scorer wants to know of the attention of rows [begin, end)."""
    obs = prompt.obs
    if obs.mass is None:
        return []
    positions, window = prompt.positions, prompt.model.config.layer_windows[prompt.layer]
    mass = attention_mass(q, obs.k[:end], positions[begin:end], positions[:end], window)
    if prompt.prefix is not None:
        prompt.prefix.keep_mass(prompt.layer, begin, end, mass)
    return [Write(obs.mass[:, :end], mass, adds=True)]


def _join(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows)
