"""Rotary position embedding as a checkpoint configures it. Free of torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import BrokenCheckpoint, UnsupportedModel

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]
ROPE_KINDS: tuple[str, ...] = get_args(RopeKind)


@dataclass(frozen=True)
class RopeConfig:
    """Frequencies of the rotary embedding; numbers that a kind does not use keep their neutral default.

    Attributes:
        kind: default (arXiv 2104.09864), linear (position interpolation, arXiv 2306.15595), dynamic (NTK-aware base
            that grows with the sequence), llama3 (Llama 3.1's piecewise scaling) or yarn (arXiv 2309.00071).
        theta: base of the frequencies.
        factor: by how much the context was stretched (all but default).
        original_max_position_embeddings: trained length before stretching (dynamic, llama3, yarn).
        low_freq_factor, high_freq_factor: bounds of llama3's interpolated band, in wavelengths per trained length.
        beta_fast, beta_slow: bounds of yarn's ramp, in rotations over the trained length.
        truncate: whether yarn rounds the bounds of its ramp to whole dimensions.
        attention_factor: multiplies cos and sin (yarn).
    """

    kind: RopeKind
    theta: float
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


def rope_from_hf(raw: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
    """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before) of a `config.json`.

    Raises:
        UnsupportedModel: a kind of scaling, or a partial rotation, that the forward pass does not cover.
        BrokenCheckpoint: a number that is missing or out of range.
    """
    parameters = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise BrokenCheckpoint("config.json: rope_parameters is not an object")
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise UnsupportedModel(
            "config.json: rope_parameters per layer type are not supported; supported: one set for all layers"
        )
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise UnsupportedModel(f"RoPE type {str(kind)[:64]!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
    for source in (parameters, raw):
        if source.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise UnsupportedModel("partial_rotary_factor below 1 is not supported; supported: rotation of whole heads")
    theta = parameters.get("rope_theta", raw.get("rope_theta"))
    theta = 10_000.0 if theta is None else _positive("rope_theta", theta)
    if kind == "default":
        return RopeConfig("default", theta)
    read = _Reader(parameters)
    if kind == "linear":
        return RopeConfig("linear", theta, factor=read.factor())
    if kind == "dynamic":
        # the base grows from the configured length on, whatever `original_max_position_embeddings` says
        return RopeConfig(
            "dynamic", theta, factor=read.factor(), original_max_position_embeddings=max_position_embeddings
        )
    original = raw.get("original_max_position_embeddings")
    if original is None:
        original = parameters.get("original_max_position_embeddings")
    original = max_position_embeddings if original is None else _whole("original_max_position_embeddings", original)
    return _llama3(read, theta, original) if kind == "llama3" else _yarn(read, theta, original, max_position_embeddings)


def _llama3(read: _Reader, theta: float, original: int) -> RopeConfig:
    low, high = read.number("low_freq_factor"), read.number("high_freq_factor")
    if high <= low:
        raise BrokenCheckpoint("config.json: high_freq_factor must be above low_freq_factor")
    return RopeConfig(
        "llama3",
        theta,
        factor=read.factor(),
        original_max_position_embeddings=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(read: _Reader, theta: float, original: int, max_position_embeddings: int) -> RopeConfig:
    given = read.parameters.get("factor")
    factor = max_position_embeddings / original if given is None else read.factor()
    attention_factor = read.optional("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = read.optional("mscale"), read.optional("mscale_all_dim")
        if mscale and mscale_all:
            attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all)
        else:
            attention_factor = _yarn_mscale(factor, 1.0)
    return RopeConfig(
        "yarn",
        theta,
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=read.optional("beta_fast") or 32.0,
        beta_slow=read.optional("beta_slow") or 1.0,
        truncate=read.flag("truncate", True),
        attention_factor=attention_factor,
    )


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True)
class _Reader:
    """Numbers of a RoPE parameter object."""

    parameters: Mapping[str, Any]

    def optional(self, name: str) -> float | None:
        value = self.parameters.get(name)
        return None if value is None else _positive(name, value, zero=True)

    def number(self, name: str) -> float:
        value = self.parameters.get(name)
        if value is None:
            raise BrokenCheckpoint(f"config.json: RoPE parameter {name} is missing")
        return _positive(name, value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.parameters.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise BrokenCheckpoint(f"config.json: RoPE parameter {name} is not a boolean")
        return value

    def factor(self) -> float:
        factor = self.number("factor")
        if factor < 1:
            raise BrokenCheckpoint(f"config.json: RoPE factor must be at least 1, got {factor}")
        return factor


def _positive(name: str, value: object, zero: bool = False) -> float:
    # comparing finds what no float can hold: NaN, infinities and integers that are too large
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise BrokenCheckpoint(f"config.json: {name} is not a finite number")
    if value < 0 or (value == 0 and not zero):
        raise BrokenCheckpoint(f"config.json: {name} must be positive, got {value}")
    return float(value)


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BrokenCheckpoint(f"config.json: {name} is not a positive integer")
    return value
