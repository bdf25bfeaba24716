"""One prompt on its way through the layers: its rows and one layer's KV, nothing of other layers.

    hidden    [n, D]        all rows, overwritten chunk by chunk as the layer runs
    positions [n]           original positions of the rows
    k_pre, k, v [n, Hkv, d] this layer's keys before and after RoPE, and values; handed over when the layer is final.
                            k_pre has rows only for recipes that pack keys before RoPE
    q_window  [w, H, d]     queries of the last w rows, as far as the recipe asks for them
    mass      [Hkv, n]      attention that every row has received so far, and
    query_peak [Hkv, d]     the largest queries so far, where the recipe asks for them

So a prompt of N rows holds N x (hidden row + position + k_pre + k + v), and a few rows more. There is no N x layers
term, but for recipes whose layers share: those hold the rows of the layers of one group. n shrinks when a layer's
recipe lets only some rows go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...compression import make_compressor
from ...compression.interfaces import EncodedLayer, LayerObs
from ...compression.layout import layer_layout
from ...compression.recipe import ModelShape, Recipe
from ...errors import InternalError, KvsluiceError
from ...kernels.rope import apply_rope
from ...models.model import Model
from ...models.sampling import Sampled, SamplerState
from ...models.transfers import sent
from .encoding import Encoder, Encoding, Result
from .prefixes import PromptPrefix


class PrefillSink(Protocol):
    """Where the results of one prompt go. Called from the engine's thread, so no method may block for long.

    Order: `on_layer_start(0)`, `on_layer(0)`, `on_layer_start(1)`, … On a GPU a layer is encoded while the next one
    computes, so `on_layer(0)` may come behind `on_layer_start(1)`, but before `on_layer_start(2)`. Layers that share
    leave together when the last of them is final: `on_layer` for each of them, in order. For the last layer the first
    tokens come before `on_layer`, so that nobody waits for its encoding. When every choice ends with its first token
    the last layer is not encoded at all: nobody will decode.
    """

    def ready(self) -> bool:
        """False holds this prompt back: its next item waits until this is true again."""
        ...

    def on_layer_start(self, layer: int) -> None:
        """The first item of a layer is about to run."""
        ...

    def on_layer(self, encoded: EncodedLayer) -> None:
        """A layer is final; the receiver owns the tensors."""
        ...

    def on_first_tokens(self, sampled: list[Sampled]) -> None:
        """The first token of every choice, in the choices' order."""
        ...

    def on_done(self) -> None:
        """All is handed over. The last call, unless `on_error` is."""
        ...

    def on_error(self, error: KvsluiceError) -> None:
        """The prompt has failed or was cancelled. The last call, unless `on_done` is."""
        ...


class Prompt:
    """The tensors of one prompt.

    Args:
        ids: token ids of the prompt, at least one, each in the vocabulary.
        prefix: started; None = every row is computed, and none is kept for others.
    """

    def __init__(
        self, model: Model, shape: ModelShape, ids: tuple[int, ...], recipe: Recipe, prefix: PromptPrefix | None = None
    ) -> None:
        self.model = model
        self.num_prompt_tokens = len(ids)
        self.compressor = make_compressor(recipe, shape)
        self.layer = 0
        self.hidden = model.embed(_on_device(ids, model.device))
        self.positions = torch.arange(len(ids), dtype=torch.int64, device=model.device)
        self.prefix = prefix
        self._obs: LayerObs | None = None
        self._encoding: Encoding | None = None
        self._encoding_layer = 0
        self._ends_with_last: Tensor | None = None  # bool, whether every selection so far has

    @property
    def num_rows(self) -> int:
        return self.hidden.shape[0]

    def begin_layer(self) -> None:
        """Make room for this layer's KV. Fresh buffers each time: an encoded layer may own the last ones."""
        config = self.model.config
        compressor = self.compressor
        window = min(compressor.query_window(self.layer), self.num_rows)

        def room(rows: int, heads: int) -> Tensor:
            return self.hidden.new_empty(rows, heads, config.head_dim)

        self._obs = LayerObs(
            layer=self.layer,
            positions=self.positions,
            num_prompt_tokens=self.num_prompt_tokens,
            k_pre=room(self.num_rows if compressor.wants_unrotated_keys else 0, config.num_kv_heads),
            k=room(self.num_rows, config.num_kv_heads),
            v=room(self.num_rows, config.num_kv_heads),
            q_window=room(window, config.num_heads),
            mass=self._zeros(self.num_rows) if compressor.wants_mass else None,
            query_peak=self._zeros(config.head_dim) if compressor.wants_query_peak else None,
        )
        if self.prefix is not None:
            self.prefix.load(self._obs)

    def _zeros(self, size: int) -> Tensor:
        """float32 [Hkv, size]."""
        return self.hidden.new_zeros(self.model.config.num_kv_heads, size, dtype=torch.float32)

    @property
    def obs(self) -> LayerObs:
        assert self._obs is not None, "begin_layer comes first"
        return self._obs

    def write(self, begin: int, end: int, q: Tensor, k_pre: Tensor, v: Tensor) -> Tensor:
        """Keep keys and values [end - begin, Hkv, d] of rows [begin, end), and queries as far as the window wants.

        Returns:
            the queries q [end - begin, H, d] after RoPE.
        """
        obs = self.obs
        cos, sin = self.model.rope_tables(self.positions[begin:end], self.num_prompt_tokens)
        q = apply_rope(q, cos, sin)
        if self.compressor.wants_unrotated_keys:
            obs.k_pre[begin:end] = k_pre
        obs.k[begin:end] = apply_rope(k_pre, cos, sin)
        obs.v[begin:end] = v
        peak: Tensor | None = None
        if obs.query_peak is not None:
            by_head = q.abs().amax(dim=0).float().view(len(obs.query_peak), -1, q.shape[2])
            peak = by_head.amax(dim=1)
            torch.maximum(obs.query_peak, peak, out=obs.query_peak)
        if self.prefix is not None:
            self.prefix.keep(self.layer, begin, end, k_pre, v, peak)
        first = self.num_rows - obs.q_window.shape[0]
        if end > first:
            low = max(begin, first)
            obs.q_window[low - first : end - first] = q[low - begin :]
        return q

    @property
    def selects_rows(self) -> bool:
        """Whether fewer rows than this layer's enter the next one."""
        recipe, num_tokens = self.compressor.recipe, self.num_prompt_tokens
        here, there = (layer_layout(recipe, num_tokens, layer).num_rows for layer in (self.layer, self.layer + 1))
        return here != there

    def release_layer(self) -> LayerObs:
        """Let go of the KV of the layer whose rows have all run."""
        obs, self._obs = self.obs, None
        if self.compressor.wants_hidden(self.layer):
            obs.hidden = self.hidden
        return obs

    def encode_layer(self, encoder: Encoder, obs: LayerObs) -> None:
        """Begin to encode the layer that was released."""
        assert self._encoding is None, "one layer at a time"
        self._encoding_layer = self.layer
        self._encoding = encoder.start(self.compressor, obs)

    @property
    def is_encoding(self) -> bool:
        return self._encoding is not None

    @property
    def is_encoded(self) -> bool:
        """Whether there is something to take, at once."""
        return self._encoding is not None and self._encoding.done()

    def take_encoded(self) -> Result:
        """What has become of the layer that was begun: the layers that are ready to leave, in order, and the rows that
        go on, for `keep_rows`; None = all do. Waits for the encoder."""
        assert self._encoding is not None, "begun before"
        encoding, self._encoding = self._encoding, None
        encoded, selected = encoding.take()
        if selected is not None and (self._encoding_layer != self.layer or selected.numel() == 0):
            raise InternalError(f"layer {self._encoding_layer} let go of every row, or of rows that went on already")
        return encoded, selected

    def keep_rows(self, selected: Tensor) -> None:
        """Drop the rows that go no further; `selected` int64 [n] ascends."""
        # looked at when the first token is: the device is not waited for before
        ends = selected[-1] == self.num_rows - 1
        self._ends_with_last = ends if self._ends_with_last is None else self._ends_with_last & ends
        self.hidden = self.hidden.index_select(0, selected)
        self.positions = self.positions.index_select(0, selected)

    def last_row(self) -> Tensor:
        """The row [1, D] behind the last layer that the answer starts from. Waits for the device.

        Raises:
            InternalError: a selection of rows has let go of it.
        """
        if self._ends_with_last is not None and not bool(self._ends_with_last):
            raise InternalError("a recipe let go of the last row, which the answer starts from")
        return self.hidden[-1:]


def _on_device(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [n], without waiting for what the device still has to do."""
    return sent(torch.tensor(ids, dtype=torch.int64), device)


def sample_first(model: Model, last_row: Tensor, samplers: Sequence[SamplerState]) -> list[Sampled]:
    """The first token of every choice, from the last row [1, D] behind the last layer.

    Raises:
        InternalError: the logits are not finite.
    """
    logits = model.logits(last_row)[0]
    if not bool(torch.isfinite(logits).all()):
        raise InternalError("prefill gave logits that are not finite")
    return [sampler.sample(logits) for sampler in samplers]
