"""What an evaluation has done so far: a file of JSON lines, so that a run that was stopped goes on where it was.

The first line is the run's identity: all that a score depends on. Each further line is one unit with its outcomes,
written when it is done; what a kill cuts short is the last line, which is dropped. Which contexts, tasks and samples
are wanted is no part of the identity, so a run may be extended.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TextIO

from ..errors import InvalidRequest
from .suites import Unit

FIRST_LINE = '{"identity":'
Record = dict[str, Any]
"""A unit's fields and what came out of it; see `evaluator.Evaluator.evaluate`."""


def unit_of(record: Mapping[str, Any]) -> Unit:
    """The unit that a record is about."""
    return Unit(record["context"], record["sample"], record["task"], record["depth"])


def check_writable(results: Path) -> None:
    """Make sure that the work towards a file of results can be kept, before a model is read.

    Raises:
        InvalidRequest: it cannot.
    """
    _opened(work_path(results)).close()


def _opened(path: Path) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a+", encoding="utf-8", errors="surrogateescape")
    except OSError as exc:
        raise _cannot_write(path, exc) from exc


def _cannot_write(path: Path, exc: OSError) -> InvalidRequest:
    return InvalidRequest("--json", f"cannot write {path}: {exc.strerror}", "a file that can be written")


def work_path(results: Path) -> Path:
    """Where the work towards a file of results is kept."""
    return results.with_name(results.name.removesuffix(".json") + ".work.jsonl")


class WorkFile:
    """An open work file; one process writes it at a time.

    Args:
        path: made when it is not there.
        identity: of this run; JSON values.
        fresh: forget what is there.

    Attributes:
        done: units with their records, those of earlier runs included.

    Raises:
        InvalidRequest: it cannot be written, another run writes it or has left it with another identity, or it is no
            work file.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], fresh: bool = False) -> None:
        self.done: dict[Unit, Record] = {}
        self._path = path
        self._file = _opened(path)
        try:
            self._open({key: json.loads(json.dumps(value)) for key, value in identity.items()}, fresh)
        except BaseException:
            self._file.close()
            raise

    def add(self, record: Record) -> None:
        """Keep a finished unit; it survives the end of this process, however that comes."""
        self.done[unit_of(record)] = record
        self._write(record)

    def close(self) -> None:
        self._file.close()

    def _open(self, identity: Mapping[str, Any], fresh: bool) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise InvalidRequest(
                "--json", f"another run writes {self._path}", "a file of its own for each run"
            ) from exc
        if fresh:
            self._file.truncate(0)
        self._file.seek(0)
        text = self._file.read()
        whole, _, rest = text.rpartition("\n")
        if not whole and (FIRST_LINE.startswith(rest) or rest.startswith(FIRST_LINE)):
            self._file.truncate(0)
            self._write({"identity": identity})
            return
        self._take(whole.split("\n"), identity)
        # what stands behind the last line's end was cut short
        self._file.truncate(len(whole.encode(errors="surrogateescape")) + 1)

    def _take(self, lines: list[str], identity: Mapping[str, Any]) -> None:
        try:
            before: dict[str, Any] = json.loads(lines[0])["identity"]
            records = [json.loads(line) for line in lines[1:]]
            self.done = {unit_of(record): record for record in records}
        except (ValueError, KeyError, TypeError) as exc:
            raise InvalidRequest("--json", f"{self._path} is no work file", "--fresh, to begin anew") from exc
        if before != identity:
            names = [name for name in (*identity, *before) if before.get(name) != identity.get(name)]
            changes = [
                f"{name}: {_shown(before.get(name))} → {_shown(identity.get(name))}" for name in dict.fromkeys(names)
            ]
            raise InvalidRequest(
                "--json",
                f"{self._path} holds the work of another run ({'; '.join(changes)})",
                "the settings of that run, another file, or --fresh to begin anew",
            )

    def _write(self, line: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n")
            self._file.flush()
        except OSError as exc:
            raise _cannot_write(self._path, exc) from exc


Keep = Callable[[Record], None]


@contextmanager
def kept(path: Path | None, identity: Mapping[str, Any], fresh: bool) -> Iterator[tuple[dict[Unit, Record], Keep]]:
    """Records that are there already, and where new ones go.

    Args:
        path: of the work file; None = they are kept in memory alone.
        identity, fresh: see `WorkFile`.

    Raises:
        InvalidRequest: see `WorkFile`.
    """
    if path is None:
        done: dict[Unit, Record] = {}

        def keep(record: Record) -> None:
            done[unit_of(record)] = record

        yield done, keep
        return
    with closing(WorkFile(path, identity, fresh)) as work:
        yield work.done, work.add


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:197] + "..."
