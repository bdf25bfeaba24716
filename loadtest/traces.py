"""Recorded loads: Mooncake's JSONL, Azure's CSV, and prompts of one's own, a JSON object a line.

- Mooncake (FAST'25): `timestamp` in ms, `input_length`, `output_length`, `hash_ids`, one for each block of 512 prompt
  tokens; equal ids mean equal tokens up to there.
- Azure LLM inference: columns TIMESTAMP, ContextTokens, GeneratedTokens.
- Own prompts: `prompt` (text, token ids or chat messages), and optionally `max_tokens`, `timestamp` in ms, `recipe`.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from ..errors import InvalidRequest

MOONCAKE_BLOCK = 512  # tokens that a hash id stands for
MAX_LINE = 64 << 20  # characters; a prompt of a million tokens fits
MAX_TOKENS = 2**24
MAX_ROWS = 1_000_000

Prompt = str | tuple[int, ...] | tuple[Mapping[str, str], ...]


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One recorded request.

    Attributes:
        time_s: since the first one; None = the file does not say.
        input_tokens, output_tokens: lengths; None = the prompt itself or the option says.
        block_ids: what the prompt's blocks hold, in order, or ().
        prompt: the prompt itself, or None.
        recipe: or "" for the option's.
    """

    time_s: float | None
    input_tokens: int | None
    output_tokens: int | None
    block_ids: tuple[int, ...] = ()
    prompt: Prompt | None = None
    recipe: str = ""


def read_trace(kind: str, path: Path) -> list[TraceRow]:
    """All rows of a file, in order of time, the first at 0.

    Args:
        kind: mooncake, azure or custom.

    Raises:
        InvalidRequest: it cannot be read; names the line that is at fault.
    """
    rows: list[TraceRow] = []
    try:
        with path.expanduser().open(encoding="utf-8", newline="") as lines:
            for row in READERS[kind](lines, path):
                if len(rows) >= MAX_ROWS:
                    raise InvalidRequest("--dataset-path", f"{path} is too long", f"at most {MAX_ROWS} requests")
                rows.append(row)
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise InvalidRequest("--dataset-path", f"cannot read {path}", f"a file in {kind} format") from exc
    if not rows:
        raise InvalidRequest("--dataset-path", f"{path} holds no request", f"a file in {kind} format")
    timed = [row for row in rows if row.time_s is not None]
    if timed and len(timed) < len(rows):
        raise InvalidRequest("--dataset-path", "some requests have a time and some none", "a time for all or for none")
    if not timed:
        return rows
    first_s = min(row.time_s for row in timed if row.time_s is not None)
    return sorted((_shifted(row, first_s) for row in timed), key=lambda row: row.time_s or 0.0)


def _shifted(row: TraceRow, first_s: float) -> TraceRow:
    assert row.time_s is not None
    return TraceRow(row.time_s - first_s, row.input_tokens, row.output_tokens, row.block_ids, row.prompt, row.recipe)


def _json_lines(lines: TextIO, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every object with the place it stands at."""
    number = 0
    while line := lines.readline(MAX_LINE + 1):
        number += 1
        where = f"{path}, line {number}"
        if len(line) > MAX_LINE:
            raise InvalidRequest("--dataset-path", f"{where} is too long", f"at most {MAX_LINE} characters")
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise InvalidRequest("--dataset-path", f"{where} is not JSON", "a JSON object a line") from exc
        if not isinstance(found, dict):
            raise InvalidRequest("--dataset-path", f"{where} is no JSON object", "a JSON object a line")
        yield where, found


def _mooncake(lines: TextIO, path: Path) -> Iterator[TraceRow]:
    for where, found in _json_lines(lines, path):
        input_tokens = _count(found, "input_length", where)
        ids = found.get("hash_ids", [])
        if not isinstance(ids, list) or not all(_is_id(one) for one in ids):
            raise InvalidRequest("--dataset-path", f"{where}: hash_ids", "a list of whole numbers from 0 to 2**63 - 1")
        if len(ids) > -(-input_tokens // MOONCAKE_BLOCK):
            problem = f"{where}: {len(ids)} hash_ids for {input_tokens} tokens"
            raise InvalidRequest("--dataset-path", problem, f"at most one for each block of {MOONCAKE_BLOCK} tokens")
        yield TraceRow(
            _seconds(found, "timestamp", where, 1000.0), input_tokens, _count(found, "output_length", where), tuple(ids)
        )


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _azure(lines: TextIO, path: Path) -> Iterator[TraceRow]:
    reader = csv.DictReader(lines)
    wanted = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    missing = [name for name in wanted if name not in (reader.fieldnames or ())]
    if missing:
        raise InvalidRequest("--dataset-path", f"{path} has no column {missing[0]}", ", ".join(wanted))
    for number, found in enumerate(reader, start=2):
        where = f"{path}, line {number}"
        try:
            moment = datetime.fromisoformat((found["TIMESTAMP"] or "").strip())
            time_s = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
            counts = {name: int(found[name] or "") for name in wanted[1:]}
        except ValueError as exc:
            raise InvalidRequest("--dataset-path", f"{where}: {exc}", "a time and two whole numbers") from exc
        yield TraceRow(time_s, _count(counts, "ContextTokens", where), _count(counts, "GeneratedTokens", where))


def _custom(lines: TextIO, path: Path) -> Iterator[TraceRow]:
    for where, found in _json_lines(lines, path):
        unknown = found.keys() - {"prompt", "max_tokens", "timestamp", "recipe"}
        if unknown:
            problem = f"{where}: unknown {sorted(unknown)[0]!r}"
            raise InvalidRequest("--dataset-path", problem, "prompt, max_tokens, timestamp, recipe")
        recipe = found.get("recipe", "")
        if not isinstance(recipe, str):
            raise InvalidRequest("--dataset-path", f"{where}: recipe", "a recipe's name")
        yield TraceRow(
            _seconds(found, "timestamp", where, 1000.0) if "timestamp" in found else None,
            None,
            _count(found, "max_tokens", where) if "max_tokens" in found else None,
            (),
            _prompt(found.get("prompt"), where),
            recipe,
        )


def _prompt(value: Any, where: str) -> Prompt:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value:
        if all(_is_id(one) for one in value):
            return tuple(value)
        if all(isinstance(one, dict) and {*one} == {"role", "content"} for one in value):
            return tuple(value)
    raise InvalidRequest("--dataset-path", f"{where}: prompt", "text, token ids, or messages of role and content")


def _count(found: Mapping[str, Any], key: str, where: str) -> int:
    value = found.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_TOKENS:
        raise InvalidRequest("--dataset-path", f"{where}: {key} is {str(value)[:32]}", f"0 to {MAX_TOKENS}")
    # a service takes no empty prompt, and an answer has a token
    return max(1, value)


def _seconds(found: Mapping[str, Any], key: str, where: str, units: float) -> float:
    value = found.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidRequest("--dataset-path", f"{where}: {key} is {str(value)[:32]}", "a time in milliseconds")
    return value / units


READERS: Mapping[str, Callable[[TextIO, Path], Iterator[TraceRow]]] = {
    "mooncake": _mooncake,
    "azure": _azure,
    "custom": _custom,
}
