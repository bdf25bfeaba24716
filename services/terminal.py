"""`kvsluice generate`: a request from the command line, its answer to the terminal as it comes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..client import Client, Completion, Options, Prompt, Stream
from ..errors import InvalidRequest, KvsluiceError
from .cli_options import Service

EXIT_INTERRUPTED = 130
SESSIONS_TIMEOUT_S = 30.0


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from where the command line says: argument, file, or standard input.

    An argument beside a file is the question about it: the file's text, a blank line, the argument.
    """
    document = None if file is None else _read_text(file)
    if document is not None and prompt is None:
        return document
    question = sys.stdin.read() if prompt is None or prompt == "-" else prompt
    return question if document is None else f"{document.rstrip()}\n\n{question}"


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
        raise InvalidRequest("--file", f"cannot read {file}: {why}", "a text file in UTF-8") from exc


def parse_slots(text: str | None) -> dict[str, Any] | None:
    """The slots that `--slots` gives."""
    if text is None:
        return None
    try:
        slots = json.loads(text)
    except ValueError as exc:
        raise InvalidRequest("--slots", "is not JSON", "a JSON object of recipe slots") from exc
    if not isinstance(slots, dict):
        raise InvalidRequest("--slots", "is not an object", "a JSON object of recipe slots")
    return slots


def stream_to_terminal(service: Service, prompt: Prompt, options: dict[str, Any]) -> int:
    """Run a request. Text goes to standard output, everything else to standard error. Returns an exit status."""
    with Client(service.address, **service.connecting) as client:
        stream = client.stream(prompt, **_typed(options))
        try:
            if options.get("n", 1) == 1:
                _print_text(stream)
            else:
                _print_choices(stream)
        except KeyboardInterrupt:
            stream.cancel()
            return EXIT_INTERRUPTED
    Console(stderr=True, highlight=False).print(_summary(stream.completion), style="dim", soft_wrap=True)
    return 0


def _typed(options: dict[str, Any]) -> Options:
    return options  # type: ignore[return-value]


def _print_text(stream: Stream) -> None:
    printed = False
    try:
        for chunk in stream:
            print(chunk.text, end="", flush=True)
            printed = printed or chunk.text != ""
    except (KvsluiceError, KeyboardInterrupt):
        if printed:
            # what comes next on the terminal gets a line of its own
            print(flush=True)
        raise
    print()


def _print_choices(stream: Stream) -> None:
    """Several choices grow side by side, so they are printed once they are whole."""
    for _ in stream:
        pass
    for choice in stream.completion.choices:
        print(f"[{choice.index}] {choice.text}")


def _summary(done: Completion) -> str:
    usage, recipe, timing = done.usage, done.recipe, done.timing
    name = recipe.effective if recipe.effective == recipe.requested else f"{recipe.requested} -> {recipe.effective}"
    if recipe.fallback_reason:
        name += f" ({recipe.fallback_reason})"
    parts = [
        f"{usage.prompt_tokens} prompt + {usage.completion_tokens} new tokens",
        f"first token {timing.time_to_first_token_s:.2f} s",
    ]
    if timing.decode_s > 0:
        new = usage.completion_tokens - len(done.choices)
        parts.append(f"{new / timing.decode_s:.1f} tokens/s")
    parts.append(f"recipe {name}")
    if recipe.handoff_bytes:
        share = recipe.handoff_bytes / recipe.handoff_bf16_bytes
        parts.append(f"shipped {_size(recipe.handoff_bytes)} ({share:.0%} of bf16)")
    kept = done.durability
    if kept.level != "none":
        parts.append(f"kept {_size(kept.stored_bytes)} ({kept.level})" if kept.kept else "nothing of it is kept")
    if done.session is not None:
        parts.append(f"turn {done.session.turn} of session {done.session.session_id}")
    if usage.cached_tokens:
        parts.append(f"{usage.cached_tokens} prompt tokens not run again")
    if kept.migrations:
        parts.append(f"moved {kept.migrations} times, {kept.stalled_s:.1f} s without a token")
    return " · ".join(parts)


def delete_sessions(service: Service, session_ids: Sequence[str], tenant: str) -> int:
    """Delete sessions. Returns an exit status: 1 where one was not there."""
    missing = 0
    with Client(service.address, timeout_s=SESSIONS_TIMEOUT_S, **service.connecting) as client:
        for session_id in session_ids:
            if not client.delete_session(session_id, tenant):
                missing = 1
                print(f"kvsluice: there is no session {session_id}", file=sys.stderr)
    return missing


def print_sessions(service: Service, as_json: bool, tenant: str) -> None:
    """A table of a service's sessions, or a JSON object a line."""
    with Client(service.address, timeout_s=SESSIONS_TIMEOUT_S, **service.connecting) as client:
        sessions = client.sessions(tenant)
    if as_json:
        for one in sessions:
            print(json.dumps(asdict(one)))
        return
    table = Table("session", "turns", "tokens", "recipe", "stored", "last used", "expires", box=None)
    for one in sessions:
        used, expires = (
            datetime.fromtimestamp(at).isoformat(" ", "seconds") for at in (one.used_unix_s, one.expires_unix_s)
        )
        table.add_row(
            one.session_id, str(one.turns), str(one.tokens), one.recipe, _size(one.stored_bytes), used, expires
        )
    Console(highlight=False, soft_wrap=True).print(table)


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"
