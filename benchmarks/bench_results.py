"""What `kvsluice bench` found, and the one reader and writer of its files.

One JSON file a run:

    environment  hardware, versions, commit
    part         one of `options.PARTS`
    models       name, fingerprint, dtype and whether weights are random, of each model
    settings     the options, as they were taken
    limits       what the device gave in the same run: bytes a second of a copy, floating-point operations a second of
                 a matrix product
    recipes      label -> name, fingerprint and slots of the recipe as it ran; rows carry the fingerprint, which frames
                 and evaluations carry too
    rows         what was measured

A ratio says how many times faster a row is than another side of the same run, so above 1 is faster.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..errors import InvalidRequest
from ..evals.results import EvaluatedRecipe, save_json

MAX_FILE_BYTES = 64 << 20

T = TypeVar("T")

Bound = Literal["bandwidth", "matrix product", "host bandwidth", "link to the host"]


@dataclass(frozen=True)
class Timing:
    """Seconds of one action over its repetitions.

    Attributes:
        low_s, high_s: first and third quartile.
    """

    median_s: float
    low_s: float
    high_s: float
    repeats: int


@dataclass(frozen=True)
class Limits:
    """What the device can do, measured in the run.

    Attributes:
        copy_bytes_per_s: of a copy within the device's memory, bytes read and written.
        gemm_flops_per_s: of a square matrix product in the run's dtype.
        host_copy_bytes_per_s: of a copy within the host's memory, bytes read and written.
        to_host_bytes_per_s: of a copy from the device into pinned memory of the host; of a GPU only.
        copy_bytes, gemm_size: how large the first two were.
    """

    copy_bytes_per_s: float
    gemm_flops_per_s: float
    host_copy_bytes_per_s: float
    to_host_bytes_per_s: float | None
    copy_bytes: int
    gemm_size: int


@dataclass(frozen=True)
class Floor:
    """The least time that the limits allow.

    Attributes:
        bound: which limit that is.
        bytes_moved, flops: what has to be moved and computed.
    """

    floor_s: float
    bound: Bound
    bytes_moved: float
    flops: float = 0.0

    @classmethod
    def of(cls, limits: Limits, bytes_moved: float = 0.0, flops: float = 0.0) -> Floor:
        """The later of both limits of the device."""
        moving_s, computing_s = bytes_moved / limits.copy_bytes_per_s, flops / limits.gemm_flops_per_s
        bound: Bound = "bandwidth" if moving_s >= computing_s else "matrix product"
        return cls(max(moving_s, computing_s), bound, bytes_moved, flops)

    @classmethod
    def on_host(cls, limits: Limits, bytes_moved: float) -> Floor:
        """Of bytes that are read and written in the host's memory."""
        return cls(bytes_moved / limits.host_copy_bytes_per_s, "host bandwidth", bytes_moved)

    @classmethod
    def between(cls, limits: Limits, bytes_moved: float) -> Floor:
        """Of bytes that go from the device to the host, or back; on a CPU they are read and written."""
        if limits.to_host_bytes_per_s is None:
            return cls.on_host(limits, 2 * bytes_moved)
        return cls(bytes_moved / limits.to_host_bytes_per_s, "link to the host", bytes_moved)


@dataclass(frozen=True)
class BenchModel:
    """A model that was measured.

    Attributes:
        fingerprint: the one that frames carry; None where only shapes were used.
    """

    name: str
    fingerprint: str | None
    dtype: str
    random_weights: bool


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        what: what was timed, such as `time to first token` or `decode step`.
        side: a recipe's label, `transformers`, or a kernel's implementation.
        model: name of the model.
        recipe_fingerprint: of the resolved recipe; None where no recipe ran.
        context, batch: tokens of a prompt, and prompts at once; None where they mean nothing.
        conditions: what else the row depends on, such as a hit rate.
        time: None when it did not run.
        not_run: why it did not.
        floor: None where no limit applies.
        figures: further numbers; units are in their names.
        ratios: other side -> how many times faster this row is.
        parts: kind of work -> seconds of the device in one repetition, where they were recorded.
    """

    what: str
    side: str
    model: str
    recipe_fingerprint: str | None = None
    context: int | None = None
    batch: int | None = None
    conditions: Mapping[str, Any] = field(default_factory=dict)
    time: Timing | None = None
    not_run: str | None = None
    floor: Floor | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    ratios: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchResults:
    """A run of `kvsluice bench`; the module's docstring says what each part holds."""

    environment: Mapping[str, Any]
    part: str
    models: tuple[BenchModel, ...]
    settings: Mapping[str, Any]
    limits: Limits
    recipes: Mapping[str, EvaluatedRecipe]
    rows: tuple[Row, ...]


def save(path: Path, results: BenchResults) -> None:
    """Write the file, whole or not at all.

    Raises:
        InvalidRequest: it cannot be written.
    """
    save_json(path, asdict(results))


def load(path: Path) -> BenchResults:
    """Read a file that `save` wrote.

    Raises:
        InvalidRequest: there is no such file, or it is something else.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidRequest("results", f"{path} is too large", f"at most {MAX_FILE_BYTES} bytes")
        raw = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as exc:
        raise InvalidRequest("results", f"cannot read {path}", "a file that `kvsluice bench` wrote") from exc
    try:
        return _from_json(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise InvalidRequest("results", f"{path} holds something else", "a file that `kvsluice bench` wrote") from exc


def _from_json(raw: Any) -> BenchResults:
    parts = dict(raw)
    parts["models"] = tuple(_record(BenchModel, one) for one in parts["models"])
    parts["limits"] = _record(Limits, parts["limits"])
    parts["recipes"] = {label: _record(EvaluatedRecipe, one) for label, one in parts["recipes"].items()}
    parts["rows"] = tuple(_row(one) for one in parts["rows"])
    return _record(BenchResults, parts)


def _row(raw: Mapping[str, Any]) -> Row:
    time, floor = raw["time"], raw["floor"]
    return _record(
        Row,
        {
            **raw,
            "time": None if time is None else _record(Timing, time),
            "floor": None if floor is None else _record(Floor, floor),
        },
    )


def _record(kind: type[T], raw: Mapping[str, Any]) -> T:
    known = {one.name for one in fields(kind)}  # type: ignore[arg-type]
    if unknown := raw.keys() - known:
        raise ValueError(f"unknown {sorted(unknown)}")
    return kind(**raw)
