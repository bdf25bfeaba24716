"""Whole passes through a model: the dense reference, and rows that attend to caches of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..kernels.causal_attention import causal_attention
from ..kernels.rope import apply_rope
from .model import Model


class AttendCache(Protocol):
    """What the forward pass asks of a sequence's cache; compressed or not."""

    def append(self, layer: int, k_pre: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Add rows [q, Hkv, d] (k_pre before RoPE, k after) at positions int64 [q]."""
        ...

    def attend(self, layer: int, q: Tensor, positions: Tensor) -> Tensor:
        """Attention of q [Q, H, d] (after RoPE) at positions int64 [Q] over rows at positions <= their own."""
        ...

    def recall(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Other rows of the sequence that go on behind this layer, before those of the pass: hidden rows [R, D] of the
        dtype of `like` and their positions int64 [R], or None. `append` and `attend` get them, too, from here on."""
        ...


@dataclass
class Rows:
    """Rows of one sequence in a batch.

    Attributes:
        ids: int64 [q] token ids, q >= 1.
        positions: int64 [q], ascending.
        cache: the sequence's cache; the pass appends these rows to it.
        num_prompt_tokens: length of the sequence's prompt, for dynamic RoPE.
    """

    ids: Tensor
    positions: Tensor
    cache: AttendCache
    num_prompt_tokens: int


class StepCache(Protocol):
    """What a step asks of the caches of its rows, all at once."""

    def append(self, layer: int, k_pre: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Add a row [rows, Hkv, d] to each sequence."""
        ...

    def attend(self, layer: int, q: Tensor, positions: Tensor, window: int | None) -> Tensor:
        """q [rows, H, d] -> [rows, H, d]."""
        ...

    def recall(self, layer: int, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Rows that go on behind this layer, behind those that are there at positions int64 [rows]: hidden rows [R, D]
        of the dtype of `like`, their positions int64 [R], and the rows of the step that they came for, int64 [R]; None
        = none do. `append` and `attend` get them, too, from here on."""
        ...


def forward_hidden(model: Model, ids: Tensor) -> Tensor:
    """Dense causal pass over one sequence: ids int64 [n] -> hidden rows [n, D] after the last layer."""
    x = model.embed(ids)
    positions = torch.arange(len(ids), device=ids.device)
    cos, sin = model.rope_tables(positions, len(ids))
    for layer, window in enumerate(model.config.layer_windows):
        q, k, v = model.qkv(layer, x)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        attn = causal_attention(q, k, v, positions, positions, window, last_rows=True)
        x = model.finish_layer(layer, x, attn)
    return x


def forward_tokens(model: Model, ids: Tensor) -> Tensor:
    """Dense causal pass over one sequence, the oracle of tests and perplexity.

    Args:
        model: the model.
        ids: int64 [n], on the model's device.

    Returns:
        Logits float32 [n, V]: 4 n V bytes.
    """
    return model.logits(forward_hidden(model, ids))


def forward_rows(model: Model, batch: Sequence[Rows]) -> Tensor:
    """Pass the rows of several sequences, each over its own cache, which grows by them.

    Linear layers and norms run over all rows at once, appending and attention per sequence. A sequence may have rows of
    its prompt join on the way (`AttendCache.recall`).

    Args:
        model: the model.
        batch: at least one entry.

    Returns:
        [sum q, D] hidden rows after the last layer, in the order of the batch.
    """
    own_sizes = sizes = [len(rows.ids) for rows in batch]
    x = model.embed(torch.cat([rows.ids for rows in batch]))
    at = [rows.positions for rows in batch]
    positions = torch.cat(at)
    cos, sin = model.rope_tables(positions, _prompt_lengths(model, batch, sizes))
    for layer in range(model.config.num_layers):
        q, k_pre, v = model.qkv(layer, x)
        q, k = apply_rope(q, cos, sin), apply_rope(k_pre, cos, sin)
        attn = []
        parts = zip(batch, at, *(torch.split(rows, sizes) for rows in (q, k_pre, k, v)), strict=True)
        for rows, own_at, q_rows, k_pre_rows, k_rows, v_rows in parts:
            rows.cache.append(layer, k_pre_rows, k_rows, v_rows, own_at)
            attn.append(rows.cache.attend(layer, q_rows, own_at))
        x = model.finish_layer(layer, x, torch.cat(attn))
        recalled = [rows.cache.recall(layer, x) for rows in batch]
        if any(more is not None for more in recalled):
            of_rows = torch.split(x, sizes)
            x = torch.cat([t for more, rows in zip(recalled, of_rows, strict=True) for t in (*_first(more, 0), rows)])
            at = [torch.cat((*_first(more, 1), own_at)) for more, own_at in zip(recalled, at, strict=True)]
            sizes, positions = [len(own_at) for own_at in at], torch.cat(at)
            cos, sin = model.rope_tables(positions, _prompt_lengths(model, batch, sizes))
    if sizes != own_sizes:
        x = torch.cat([rows[len(rows) - size :] for rows, size in zip(torch.split(x, sizes), own_sizes, strict=True)])
    return x


def _first(recalled: tuple[Tensor, Tensor] | None, index: int) -> tuple[Tensor, ...]:
    return () if recalled is None else (recalled[index],)


def forward_step(
    model: Model, ids: Tensor, positions: Tensor, num_prompt_tokens: int | Tensor, caches: StepCache
) -> Tensor:
    """Pass one row of every sequence, all attending together. Nothing in it waits for the device. Sequences may have
    rows of their prompts join on the way (`StepCache.recall`).

    Args:
        model: the model.
        ids, positions: int64 [rows].
        num_prompt_tokens: for dynamic RoPE, of every row or int64 [rows].
        caches: those of the rows' sequences.

    Returns:
        [rows, D] hidden rows after the last layer.
    """
    x = model.embed(ids)
    cos, sin = model.rope_tables(positions, num_prompt_tokens)
    for layer, window in enumerate(model.config.layer_windows):
        q, k_pre, v = model.qkv(layer, x)
        q, k = apply_rope(q, cos, sin), apply_rope(k_pre, cos, sin)
        caches.append(layer, k_pre, k, v, positions)
        x = model.finish_layer(layer, x, caches.attend(layer, q, positions, window))
        recalled = caches.recall(layer, x, positions)
        if recalled is not None:
            rows, at, of = recalled
            x, positions = torch.cat((x, rows)), torch.cat((positions, at))
            if isinstance(num_prompt_tokens, Tensor):
                num_prompt_tokens = torch.cat((num_prompt_tokens, num_prompt_tokens[of]))
            cos, sin = model.rope_tables(positions, num_prompt_tokens)
    return x[: len(ids)]


def _prompt_lengths(model: Model, batch: Sequence[Rows], sizes: list[int]) -> int | Tensor:
    """Prompt length of every row; a tensor only where it matters and differs, because building one costs a copy."""
    if model.config.rope.kind != "dynamic" or len({rows.num_prompt_tokens for rows in batch}) == 1:
        return batch[0].num_prompt_tokens
    lengths = [rows.num_prompt_tokens for rows, size in zip(batch, sizes, strict=True) for _ in range(size)]
    return torch.tensor(lengths, device=model.device)
