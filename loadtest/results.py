"""The file that `kvsluice loadtest --json` writes, and its one reader and writer.

format       of the file, 1
environment  hardware, versions, commit of the client
settings     the options as they were taken, and what the service said of itself
runs         one, or one a trial of a search; the last is the one that is reported
    rate         as it was asked for
    figures      by vLLM's names, times in ms
    recipes      the main figures of each recipe, where there are several
    goals        of --slo: name, bound, value, whether it was met
    client       how well the client kept up
    invalid      why the figures do not describe the service, or null
    stationary   whether the queue had stopped growing, or null where nobody looked
    requests     columns: one entry a request, times in seconds since the start
    itl          histogram of gaps between messages: middle of the bucket in seconds, count
    tokens       answer tokens by second
search       of --find-max-rate: what was found, or null
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import InvalidRequest
from .outcomes import Outcome, Recording

FORMAT = 1
MAX_FILE_BYTES = 1 << 30
COLUMNS = tuple(one.name for one in fields(Outcome))
_WRITTEN_BY = "a file that `kvsluice loadtest --json` wrote"


@dataclass(frozen=True)
class RunResults:
    """One run, as the module's docstring says."""

    rate: str
    settings: dict[str, Any]
    figures: dict[str, Any]
    recipes: dict[str, dict[str, Any]]
    goals: list[dict[str, Any]]
    client: dict[str, Any]
    invalid: str | None
    stationary: bool | None
    requests: dict[str, list[Any]] = field(default_factory=dict)
    itl: list[list[float]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)

    @property
    def is_met(self) -> bool:
        """Whether every goal was met; true when there are none."""
        return all(one["met"] for one in self.goals)

    def outcomes(self) -> list[Outcome]:
        """The requests again, warm-up included.

        Raises:
            InvalidRequest: the file was written without them.
        """
        if not self.requests:
            raise InvalidRequest("results", "the file holds no requests", "one written without --no-requests")
        try:
            rows = zip(*(self.requests[name] for name in COLUMNS), strict=True)
            return [Outcome(*row) for row in rows]
        except (KeyError, TypeError, ValueError) as exc:
            raise InvalidRequest("results", "the file's requests do not fit", _WRITTEN_BY) from exc


@dataclass(frozen=True)
class LoadResults:
    """A file of results."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    runs: list[RunResults]
    search: dict[str, Any] | None = None
    format: int = FORMAT

    @property
    def last(self) -> RunResults:
        """The run that is reported."""
        return self.runs[-1]


def request_columns(recording: Recording) -> dict[str, list[Any]]:
    """A recording's requests as the file holds them, times to the microsecond."""
    rows = sorted(recording.outcomes, key=lambda one: one.index)
    return {name: [_rounded(getattr(row, name)) for row in rows] for name in COLUMNS}


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


def save(path: Path, results: LoadResults) -> None:
    """Write the file, whole or not at all.

    Raises:
        InvalidRequest: it cannot be written.
    """
    text = json.dumps(asdict(results), ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, text, "--json")


def write_whole(path: Path, text: str, option: str) -> None:
    """Write a file so that nobody sees half of it.

    Raises:
        InvalidRequest: it cannot be written; names the option.
    """
    with _refusing(path, option):
        _beside(path, text).replace(path)


def check_writable(path: Path, option: str) -> None:
    """Make sure that a file can be written, before any work.

    Raises:
        InvalidRequest: it cannot.
    """
    with _refusing(path, option):
        _beside(path, "").unlink()


def _beside(path: Path, text: str) -> Path:
    beside = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text(text, encoding="utf-8")
    return beside


@contextmanager
def _refusing(path: Path, option: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise InvalidRequest(option, f"cannot write {path}: {exc.strerror}", "a file that can be written") from exc


def load(path: Path) -> LoadResults:
    """Read a file that `save` wrote.

    Raises:
        InvalidRequest: there is no such file, or it is something else.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidRequest("results", f"{path} is too large", f"at most {MAX_FILE_BYTES} bytes")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise InvalidRequest("results", f"cannot read {path}", _WRITTEN_BY) from exc
    try:
        if raw["format"] != FORMAT:
            raise InvalidRequest("results", f"{path} has format {raw['format']}", f"format {FORMAT}")
        return LoadResults(**{**raw, "runs": _runs(raw["runs"])})
    except (KeyError, TypeError, AttributeError) as exc:
        raise InvalidRequest("results", f"{path} holds something else", _WRITTEN_BY) from exc


def _runs(raw: Sequence[Mapping[str, Any]]) -> list[RunResults]:
    if not raw:
        raise KeyError("runs")
    return [RunResults(**one) for one in raw]
