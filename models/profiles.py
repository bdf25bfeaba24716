"""What was calibrated, or published, for a model: where to select tokens and how to store keys. Free of torch.

Profiles are JSON files, under `profiles/` for models that have one and wherever `kvsluice calibrate` wrote it for
others. `Profile` says what one may hold; every key may be left out. What a file does not say is filled in from the
shape: T at half depth, and low-rank keys at 8 bits of rank 0.156 x KV heads x head size, which is what the published
methods use for the models they name; or it is the same for all models, see `compression.resolve`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from ..errors import ConfigError

LOWRANK_SHARE = 0.156
CHUNKS = (1, 2, 4, 8, 16)
MAX_FILE_BYTES = 64 * 1024
MAX_SOURCE = 2000
_LARGEST = {"layer": 1023, "window": 512, "outliers": 4096}


class Shape(Protocol):
    """The part of a model's shape that defaults depend on."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


@dataclass(frozen=True)
class Profile:
    """What a file says; None = nothing. Whether it fits a model is seen when a recipe is filled in for it.

    Attributes:
        fastkv_layer: layer T of propagation that selects row by row, as FastKV (arXiv 2502.01068) does.
        fastkv_rate: share of the rows that go on there.
        fastkv_window: last rows whose queries select there.
        tsp_layer, tsp_rate, tsp_window: the same where whole chunks are selected.
        tsp_recall: share of the rows that decode may have brought back at once, for recipes that leave it open.
        key_codec: slot of a recipe: how keys are stored, with its rank where it has one.
        chunk: rows a chunk, of what decode attends to.
        outliers: chunks a KV head that stay exact.
        source: where the numbers come from, in words.

    Raises:
        ConfigError: names the key and what it allows.
    """

    fastkv_layer: int | None = None
    fastkv_rate: float | None = None
    fastkv_window: int | None = None
    tsp_layer: int | None = None
    tsp_rate: float | None = None
    tsp_window: int | None = None
    tsp_recall: float | None = None
    key_codec: Mapping[str, Any] | None = None
    chunk: int | None = None
    outliers: int | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        for kind in ("fastkv", "tsp"):
            _check_whole(f"{kind}_layer", getattr(self, f"{kind}_layer"), 0, _LARGEST["layer"])
            _check_share(f"{kind}_rate", getattr(self, f"{kind}_rate"), above_zero=True)
            _check_whole(f"{kind}_window", getattr(self, f"{kind}_window"), 1, _LARGEST["window"])
        _check_share("tsp_recall", self.tsp_recall, above_zero=False)
        _check_whole("outliers", self.outliers, 0, _LARGEST["outliers"])
        if self.chunk is not None and (isinstance(self.chunk, bool) or self.chunk not in CHUNKS):
            raise _refused("chunk", self.chunk, ", ".join(map(str, CHUNKS)))
        codec = self.key_codec
        if codec is not None and (not isinstance(codec, Mapping) or not isinstance(codec.get("kind"), str)):
            raise _refused("key_codec", codec, "an object with a string `kind`, as a recipe's slot")
        if self.source is not None and (not isinstance(self.source, str) or len(self.source) > MAX_SOURCE):
            raise _refused("source", self.source, f"text of at most {MAX_SOURCE} characters")

    def stated(self) -> dict[str, Any]:
        """What it says, in the order of its attributes."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def to_json(self) -> str:
        return json.dumps(self.stated(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """The profile that any text describes.

        Raises:
            ConfigError: it is no JSON object, holds a key that is none of a profile's, or a value that is not allowed.
        """
        try:
            raw = json.loads(text, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as exc:
            raise ConfigError("profile: is not JSON; allowed: an object without duplicate keys") from exc
        if not isinstance(raw, dict):
            raise ConfigError("profile: is not an object; allowed: a JSON object")
        known = [field.name for field in fields(cls)]
        for key in raw:
            if key not in known:
                raise ConfigError(f"profile: unknown key {key[:64]!r}; allowed: {', '.join(known)}")
        return cls(**raw)


def read_profile(path: Path) -> Profile:
    """The profile in a file.

    Raises:
        ConfigError: it cannot be read, or holds something else; names the file.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"profile: {path.name} is too large; allowed: at most {MAX_FILE_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"profile: cannot read {path.name}: {exc.strerror}; allowed: a profile's file") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"profile: {path.name} is not text; allowed: a profile's file") from exc
    try:
        return Profile.from_json(text)
    except ConfigError as exc:
        raise ConfigError(f"{exc.message} (in {path.name})") from exc


def stored_profile(model_name: str) -> Profile:
    """The profile that comes with the project for a model; one that says nothing where there is none.

    Args:
        model_name: a built-in name, a name of `SHAPES`, or a path, whose last part counts.
    """
    path = Path(model_name)
    name = path.stem if path.suffix.lower() == ".gguf" else path.name
    return _stored().get(name, Profile())


def load_profile(model_name: str, shape: Shape, file: str | Path | None = None) -> dict[str, Any]:
    """The profile of a model, complete, as recipes are resolved with.

    Args:
        model_name: see `stored_profile`.
        shape: fills in what is not said.
        file: takes the place of the one that comes with the project.

    Raises:
        ConfigError: the file is no profile's.
    """
    half = max(0, shape.num_layers // 2 - 1)
    rank = max(2, round(LOWRANK_SHARE * shape.num_kv_heads * shape.head_dim / 2) * 2)
    defaults = {
        "fastkv_layer": half,
        "tsp_layer": half,
        "tsp_rate": 0.2,
        "key_codec": {"kind": "lowrank", "rank": rank, "bits": 8},
    }
    profile = stored_profile(model_name) if file is None else read_profile(Path(file))
    said = deepcopy(profile.stated())
    said.pop("source", None)
    return defaults | said


@cache
def _stored() -> dict[str, Profile]:
    folder = resources.files(__package__).joinpath("profiles")
    files = [entry for entry in folder.iterdir() if entry.name.endswith(".json")]
    return {entry.name.removesuffix(".json"): Profile.from_json(entry.read_text(encoding="utf-8")) for entry in files}


def _check_whole(key: str, value: object, low: int, high: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _refused(key, value, f"an integer from {low} to {high}")


def _check_share(key: str, value: object, *, above_zero: bool) -> None:
    if value is None:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1 or not math.isfinite(value) or (above_zero and value == 0):  # type: ignore[operator, arg-type]
        raise _refused(key, value, "a number above 0 and at most 1" if above_zero else "a number from 0 to 1")


def _refused(key: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"profile.{key}: got {value!r}"[:160] + f"; allowed: {allowed}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate keys")
    return found
