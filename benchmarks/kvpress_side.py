"""kvpress's side of a comparison: its presses on transformers' model, scored by forced answer tokens.

kvpress (PyPI, Apache-2.0) is no dependency. Of it only the modules of single presses are loaded, not the package's
front: that one imports libraries which nothing here needs (datasets, fire, cachetools, ...) and wraps every attention
function of transformers in the process, so that the run without a press would no longer be transformers' own.

The press sees what ours sees: the whole prompt, question and answer prefix included. (kvpress's pipeline presses the
context alone, and its query-aware evaluation context and question; the end of the user's turn and the answer prefix
then run over the pressed cache. A context that is the whole prompt is the pipeline's case of an empty question.) As in
its pipeline, prefill is one pass under the press's hooks, attention in it is dense, and what follows goes on at the
prompt's original positions.

Instead of token by token, the answer goes through in one pass. The layers of a pressed cache differ in length
(PyramidKV), and transformers makes one mask for all, so attention is a function of our own that masks by each layer's
length: whatever a press left lies before the answer.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INSTALL = 'pip install --no-deps "kvpress>=0.5.5"'
_ATTENTION = "kvsluice_by_cache_length"


class PeerMissing(ImportError):
    """kvpress is not installed; the message says how to get it."""


def kvpress_version() -> str:
    """The installed version; "unknown" for a folder without its metadata."""
    try:
        return version("kvpress")
    except PackageNotFoundError:
        return "unknown"


def load_press(module: str, name: str) -> Any:
    """A class of kvpress by its module and name, such as `snapkv_press`, `SnapKVPress`.

    Raises:
        PeerMissing: kvpress is not installed.
    """
    if "kvpress" not in sys.modules:
        spec = importlib.util.find_spec("kvpress")
        if spec is None:
            # its metadata asks for older versions of transformers than ours, hence --no-deps
            raise PeerMissing(f"the comparison needs kvpress: {INSTALL}")
        # the package without its front, see above
        sys.modules["kvpress"] = importlib.util.module_from_spec(spec)
    return getattr(importlib.import_module(f"kvpress.presses.{module}"), name)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, H, q, d] over [1, Hkv, k, d], whose last q rows are the queries' own."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    mask = None
    if num_queries != num_keys:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)
    out = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=kwargs["scaling"], enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class Forced:
    """One prompt with its answer forced.

    Attributes:
        predicted: at every place of the answer, the token that the model puts first.
        kept_rows: rows of the prompt that each layer's cache holds for each KV head.
    """

    predicted: tuple[int, ...]
    kept_rows: tuple[int, ...]


class PeerModel:
    """A transformers model that presses can be put on.

    Args:
        model: a causal LM with the layers that kvpress supports (Llama, Mistral, Qwen, Phi-3).
    """

    def __init__(self, model: Any) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(_ATTENTION, _attention)
        model.set_attn_implementation(_ATTENTION)
        self.model = model

    @torch.no_grad()
    def force(
        self, prompt_ids: Sequence[int], answer_ids: Sequence[int], press: Any = None, *, moved: bool = False
    ) -> Forced:
        """Prefill the prompt, press its cache, pass the answer over what is left.

        Args:
            press: of kvpress; None = the dense model.
            moved: the press turns the keys that it keeps to positions 0, 1, ..., and the answer follows those.
        """
        from transformers import DynamicCache

        device = self.model.device
        prompt = torch.tensor([list(prompt_ids)], device=device)
        cache: Any = DynamicCache()
        with press(self.model) if press is not None else nullcontext():
            # presses look for cache_position, which newer versions of transformers no longer hand to the layers
            positions = torch.arange(prompt.shape[1], device=device)
            hidden = self.model.model(input_ids=prompt, past_key_values=cache, cache_position=positions)[0][:, -1:]
        kept_rows = tuple(layer.keys.shape[2] for layer in cache.layers)
        start = cache.get_seq_length() if moved else prompt.shape[1]
        if len(answer_ids) > 1:
            forced = torch.tensor([list(answer_ids[:-1])], device=device)
            positions = torch.arange(start, start + forced.shape[1], device=device)[None]
            later = self.model.model(input_ids=forced, past_key_values=cache, position_ids=positions)[0]
            hidden = torch.cat((hidden, later), dim=1)
        best: list[int] = self.model.lm_head(hidden)[0].argmax(dim=-1).tolist()
        return Forced(tuple(best), kept_rows)
