"""Text that becomes final while tokens arrive. Free of torch."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

from tokenizers import pre_tokenizers

REPLACEMENT = "\ufffd"


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

    Text is held back while it ends in U+FFFD or in a single-byte token, because the next token may change it.

    Args:
        decode: text of a list of ids.
        is_open: whether a token may merge with the next one into other text; None for tokens that give no text, across
            which others merge.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], is_open: Callable[[int], bool | None]) -> None:
        self._decode = decode
        self._is_open = is_open
        self._ids: list[int] = []
        self._context = 0
        self._read = 0
        self._open = False

    def push(self, ids: Sequence[int]) -> str:
        self._ids.extend(ids)
        for state in filter(lambda s: s is not None, map(self._is_open, ids)):
            self._open = bool(state)
        if self._open:
            return ""
        text = self._decode(self._ids[self._context :])
        if text.endswith(REPLACEMENT):
            return ""
        return self._take(text)

    def finish(self) -> str:
        return self._take(self._decode(self._ids[self._context :]))

    def _take(self, text: str) -> str:
        new = text[len(self._decode(self._ids[self._context : self._read])) :]
        if new:
            # tokens without text are no context: the next word would lose its leading space
            self._context = self._read
        self._read = len(self._ids)
        return new
