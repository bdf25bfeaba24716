"""Text that becomes final while tokens arrive. Free of torch."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

from tokenizers import pre_tokenizers

REPLACEMENT = "\ufffd"
MAX_CHARACTER_BYTES = 4  # of UTF-8


def byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    assert set(table) == set(pre_tokenizers.ByteLevel.alphabet())
    return table


class IncrementalDecoder(Protocol):
    """Turns a growing list of tokens into text, never taking back what it gave.

    All pushes and `finish`, concatenated, equal the decoding of all ids at once. A character whose bytes are spread
    over tokens comes when its last byte does.
    """

    def push(self, ids: Sequence[int]) -> str:
        """Add tokens; returns the text that became final."""
        ...

    def finish(self) -> str:
        """The rest, bytes that no character can be made of as U+FFFD. Nothing may be pushed afterwards."""
        ...


class ByteLevelDecoder:
    """For byte-level vocabularies, where a token is a string of bytes whatever stands around it.

    Args:
        token_bytes: bytes of a token id; empty for ids that give no text.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        return self._utf8.decode(b"".join(map(self._token_bytes, ids)))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDecoder:
    """For any other vocabulary: decodes a short window of tokens twice, with and without the new ones.

    Text is held back while it ends in U+FFFD or in a single-byte token, because the next token may change it, but never
    for longer than the four bytes that a character can take. Decoding at once turns a whole run of single-byte tokens
    into U+FFFD for one wrong byte in it; of runs longer than that, only what was still held back turns so here.

    Args:
        decode: text of a list of ids.
        is_open: whether a token may merge with the next one into other text; None for tokens that give no text, across
            which others merge.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], is_open: Callable[[int], bool | None]) -> None:
        self._decode = decode
        self._is_open = is_open
        # the tokens of the text given last, `_num_given` of them, then those that are held back
        self._ids: list[int] = []
        self._num_given = 0
        self._run = 0  # open tokens at the end

    def push(self, ids: Sequence[int]) -> str:
        for token_id in ids:
            state = self._is_open(token_id)
            if state is None:
                # it is no context either: the next word would lose its leading space
                continue
            self._ids.append(token_id)
            self._run = self._run + 1 if state else 0
        num_ids = len(self._ids)
        if not self._run and not self._decode(self._ids).endswith(REPLACEMENT):
            return self._take(num_ids)
        num_held = self._run or num_ids - self._num_given
        return self._take(self._decided()) if num_held > MAX_CHARACTER_BYTES else ""

    def finish(self) -> str:
        return self._take(len(self._ids))

    def _decided(self) -> int:
        """How many of the tokens nothing that follows can change: all but those of a last character's first bytes."""
        decided = num_ids = len(self._ids)
        for end in range(num_ids, num_ids - MAX_CHARACTER_BYTES, -1):
            if not self._run and self._is_open(self._ids[end - 1]):
                continue  # a run that is over is decided as a whole
            decided = end
            if not self._decode(self._ids[:end]).endswith(REPLACEMENT):
                break
        self._run = min(self._run, num_ids - decided)
        return decided

    def _take(self, end: int) -> str:
        """Text of the tokens held back up to `end`."""
        given, text = self._decode(self._ids[: self._num_given]), self._decode(self._ids[:end])
        # a wrong byte after part of its run was given takes that part back: then the new tokens stand by themselves
        new = text[len(given) :] if text.startswith(given) else self._decode(self._ids[self._num_given : end])
        if new:
            del self._ids[: self._num_given]
            end -= self._num_given
        self._num_given = end
        return new
