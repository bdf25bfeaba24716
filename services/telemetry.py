"""What a process tells of itself: log lines and recorded events. None of it ever holds prompts or answers."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Lock
from typing import Literal, Protocol

FieldValue = str | int | float | bool
LogFormat = Literal["text", "json"]

current_request_id: ContextVar[str] = ContextVar("current_request_id", default="")
"""Set by a handler once it knows the request's id, so that log lines and the error it ends with can name it."""


@dataclass(frozen=True)
class Recorded:
    """One event.

    Attributes:
        name: what happened, such as ``decode.frame_acked``.
        at_s: when, on this process's monotonic clock.
        fields: request id, layer, bytes and the like.
    """

    name: str
    at_s: float
    fields: dict[str, FieldValue] = field(default_factory=dict)


class Recorder(Protocol):
    """Where the events of requests go. Called from any thread; must not block."""

    def record(self, name: str, **fields: FieldValue) -> None: ...


class NullRecorder:
    """Keeps nothing."""

    def record(self, name: str, **fields: FieldValue) -> None:
        return None


class MemoryRecorder:
    """Keeps the newest events in memory, in the order in which they happened."""

    def __init__(self, max_events: int = 100_000) -> None:
        self._max_events = max_events
        self._events: list[Recorded] = []
        self._lock = Lock()

    def record(self, name: str, **fields: FieldValue) -> None:
        with self._lock:
            self._events.append(Recorded(name, time.monotonic(), fields))
            if len(self._events) > self._max_events:
                del self._events[: self._max_events // 2]

    def events(self, name: str | None = None, **fields: FieldValue) -> list[Recorded]:
        """The events of that name whose fields include those given."""
        with self._lock:
            events = list(self._events)
        return [
            e
            for e in events
            if (name is None or e.name == name) and all(e.fields.get(k) == v for k, v in fields.items())
        ]


def where(exc: BaseException) -> str:
    """Type and place of a foreign exception. Its text is left out: it may hold prompts or paths."""
    frames = traceback.extract_tb(exc.__traceback__)
    places = " < ".join(f"{f.name}:{f.lineno}" for f in reversed(frames[-4:]))
    return f"{type(exc).__name__} at {places}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (RFC 3339, UTC), `level`, `logger`, `process`, `request_id` where the line is
    about one, `message`, and `error` where an exception is logged, as `where` gives it."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": self._process,
        }
        request_id = getattr(record, "request_id", "") or current_request_id.get()
        if request_id:
            line["request_id"] = request_id
        line["message"] = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = where(record.exc_info[1])
        return json.dumps(line, ensure_ascii=False)


def about(request_id: str) -> dict[str, str]:
    """`extra` of a log line that is about a request, from a thread that handles many."""
    return {"request_id": request_id}


def configure_logging(level: str, log_format: LogFormat = "text", process: str = "") -> None:
    """Send the package's log lines to standard error; called once by a process's entry point, never on import.

    Args:
        process: what JSON lines call this process, such as a worker's id.
    """
    root = logging.getLogger("kvsluice")
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter(process) if log_format == "json" else text)
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False
