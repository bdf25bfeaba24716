"""Angles of the rotary position embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .rope_config import RopeConfig


class RotaryEmbedding:
    """cos and sin tables of one model.

    Frequencies and angles are float32, as in the published implementations, so that fp32 logits agree.

    Args:
        config: the kind of RoPE and its numbers.
        head_dim: size of a head.
        device: where positions will lie.
    """

    def __init__(self, config: RopeConfig, head_dim: int, device: torch.device) -> None:
        self.config = config
        self._exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
        self._growth = head_dim / (head_dim - 2) if head_dim > 2 else 1.0
        self.inverse_frequencies = _inverse_frequencies(config, self._exponents)

    def tables(self, positions: Tensor, num_prompt_tokens: int | Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for rows at the given positions.

        Args:
            positions: int64 [...].
            num_prompt_tokens: length of the prompt that the rows belong to, or int64 of positions' shape when it
                differs between rows. Only dynamic scaling looks at it: a row at p uses the base for length
                max(num_prompt_tokens, p + 1), so that its rotation does not depend on how the rows were batched.

        Returns:
            (cos, sin), float32 [..., d], both halves alike.
        """
        frequencies = self.inverse_frequencies
        if self.config.kind == "dynamic":
            frequencies = self._dynamic(positions, num_prompt_tokens)
        angles = positions.unsqueeze(-1).float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        scale = self.config.attention_factor
        if scale == 1.0:
            return angles.cos(), angles.sin()
        return angles.cos() * scale, angles.sin() * scale

    def _dynamic(self, positions: Tensor, num_prompt_tokens: int | Tensor) -> Tensor:
        """Inverse frequencies [..., d / 2] of the base that each row's length asks for."""
        config = self.config
        limit = config.original_max_position_embeddings
        lengths = positions + 1
        if isinstance(num_prompt_tokens, Tensor):
            lengths = torch.maximum(lengths, num_prompt_tokens)
        else:
            lengths = lengths.clamp(min=num_prompt_tokens)
        # float64, because the last bit of a float32 power depends on how many rows are computed at once
        stretch = config.factor * lengths.clamp(min=limit).double() / limit - (config.factor - 1)
        base = config.theta * stretch**self._growth
        return (1.0 / base.unsqueeze(-1) ** self._exponents.double()).float()


def _inverse_frequencies(config: RopeConfig, exponents: Tensor) -> Tensor:
    plain = 1.0 / (config.theta**exponents)
    if config.kind == "linear":
        return plain / config.factor
    if config.kind == "llama3":
        return _llama3(config, plain)
    if config.kind == "yarn":
        return _yarn(config, exponents)
    return plain


def _llama3(config: RopeConfig, plain: Tensor) -> Tensor:
    """Short wavelengths stay, long ones are divided by the factor, those between are interpolated."""
    length, low, high = config.original_max_position_embeddings, config.low_freq_factor, config.high_freq_factor
    wavelengths = 2 * math.pi / plain
    smooth = (length / wavelengths - low) / (high - low)
    between = (1 - smooth) * plain / config.factor + smooth * plain
    scaled = torch.where(wavelengths > length / low, plain / config.factor, plain)
    is_between = (wavelengths >= length / high) & (wavelengths <= length / low)
    return torch.where(is_between, between, scaled)


def _yarn(config: RopeConfig, exponents: Tensor) -> Tensor:
    """NTK-by-parts (arXiv 2309.00071 §3.2): fast-turning dimensions extrapolate, slow ones interpolate."""
    dim = 2 * len(exponents)

    def dimension_of(rotations: float) -> float:
        length = config.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension_of(config.beta_fast), dimension_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    index = torch.arange(len(exponents), dtype=torch.float32, device=exponents.device)
    extrapolated = 1 - ((index - low) / (high - low)).clamp(0, 1)
    wavelengths = config.theta**exponents
    return (1.0 / (config.factor * wavelengths)) * (1 - extrapolated) + (1.0 / wavelengths) * extrapolated
