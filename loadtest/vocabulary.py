"""Where made-up prompts come from: token ids, and where a tokenizer is given, words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidRequest

MARGIN = 16  # families keep their control tokens at either end: a sixteenth of the vocabulary is left out at both
MAX_VOCAB = 2**22
_WORD = re.compile(r"[Ġ▁]([a-z]{2,12})")

Ids = NDArray[np.int64]


class Vocabulary:
    """Token ids to draw prompts from, and their texts.

    Args:
        ids: usable ids, int64 [words].
        words: text of each, or None where only ids are known.
    """

    def __init__(self, ids: Ids, words: Sequence[str] | None = None) -> None:
        assert words is None or len(words) == len(ids)
        self.ids = ids
        self._words = None if words is None else dict(zip(ids.tolist(), words, strict=True))

    @classmethod
    def of_size(cls, vocab_size: int) -> Vocabulary:
        """Ids of a vocabulary of which nothing is known but its size.

        Raises:
            InvalidRequest: the size makes none.
        """
        if not 2 <= vocab_size <= MAX_VOCAB:
            raise InvalidRequest("--vocab-size", f"got {vocab_size}", f"2 to {MAX_VOCAB}")
        margin = vocab_size // MARGIN
        return cls(np.arange(margin, vocab_size - margin, dtype=np.int64))

    @classmethod
    def of_tokenizer(cls, path: Path) -> Vocabulary:
        """The tokens of a `tokenizer.json` that are a space and a word of small letters: one token each, also in a row.

        Raises:
            InvalidRequest: there is no such file, or it has no words.
        """
        from tokenizers import Tokenizer

        file = path.expanduser()
        file = file / "tokenizer.json" if file.is_dir() else file
        allowed = "a tokenizer.json, or the folder that it lies in"
        try:
            tokenizer: Any = Tokenizer.from_file(str(file))
        except Exception as exc:  # the library raises bare exceptions
            raise InvalidRequest("--tokenizer", f"cannot read {file}", allowed) from exc
        found = {index: match[1] for text, index in tokenizer.get_vocab().items() if (match := _WORD.fullmatch(text))}
        if len(found) < 2:
            raise InvalidRequest("--tokenizer", f"{file} has no tokens that are words", allowed)
        order = sorted(found)
        return cls(np.array(order, dtype=np.int64), [found[index] for index in order])

    @property
    def has_words(self) -> bool:
        return self._words is not None

    def draw(self, count: int, generator: np.random.Generator) -> Ids:
        """Token ids, int64 [count], each as likely as the others."""
        return self.ids[generator.integers(len(self.ids), size=count)]

    def text(self, ids: Sequence[int]) -> str:
        """The words of ids that `draw` gave, each behind a space, as the tokens have it."""
        assert self._words is not None
        return "".join(f" {self._words[index]}" for index in ids)
