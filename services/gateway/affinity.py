"""Which prompts' beginnings a prefill worker has run, as a gateway remembers it.

Workers share beginnings in chunks (`services.prefill.prefixes`); a gateway knows a beginning by a hash over its chunks,
the tenant and the recipe that was asked for, of token ids, and of texts as they come in, so that what is known of a
prompt can be told before it is tokenized. It is a guess: a worker may have made room since, another gateway may have
sent it other prompts, and hashes may fall together. A wrong guess costs a detour, never a wrong token: the worker
itself compares what it has.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from .waits import saved

BYTES_PER_TOKEN = 4  # about, where a prompt is not tokenized yet
MAX_HASHED = 262_144  # tokens of a beginning: hashing more would hold up others
MAX_REMEMBERED = 16384  # chunks of each worker; 8M tokens in chunks of 512, of prompts that came as text half of that


@dataclass(frozen=True)
class Found:
    """What a worker should not have to run of a prompt.

    Attributes:
        tokens: the first ones.
        share: of the work of a row, that lies in the layers that need not run for them.
    """

    tokens: int = 0
    share: float = 0.0

    @property
    def saved_tokens(self) -> float:
        """What the prompt costs less, in tokens that run whole."""
        return saved(self.tokens * self.share)


class PromptPrefixes:
    """The beginnings of one prompt.

    Args:
        tenant: whose prompt it is.
        recipe: what was asked for; prompts of different recipes may share nothing.
        data: token ids, or what comes in as text.

    Attributes:
        num_tokens: of the whole prompt; of a text, those that it is taken for.
        is_tokenized: known by its token ids.
    """

    def __init__(self, tenant: str, recipe: str, data: Sequence[int] | bytes) -> None:
        self.is_tokenized = not isinstance(data, bytes)
        self._salt = f"{len(tenant)}:{tenant}{self.is_tokenized}{recipe}".encode()
        self._data = data
        self.num_tokens = len(data) if self.is_tokenized else -(-len(data) // BYTES_PER_TOKEN)
        self._names: dict[int, list[bytes]] = {}

    @classmethod
    def of_text(cls, tenant: str, recipe: str, parts: Sequence[str]) -> PromptPrefixes:
        """Of a prompt that is not tokenized yet.

        Args:
            parts: that follow each other; where one ends counts, too.
        """
        # no text holds a byte 0xff
        return cls(tenant, recipe, b"\xff".join(part.encode("utf-8", "surrogatepass") for part in parts))

    def names(self, chunk_tokens: int) -> list[bytes]:
        """A name for the first chunk, the first two, and so on, as far as chunks are whole; none where there is no
        chunk."""
        if chunk_tokens not in self._names:
            self._names[chunk_tokens] = self._made(chunk_tokens) if chunk_tokens else []
        return self._names[chunk_tokens]

    def _made(self, chunk_tokens: int) -> list[bytes]:
        names, digest = [], xxhash.xxh3_128(self._salt)
        size = chunk_tokens * (1 if self.is_tokenized else BYTES_PER_TOKEN)
        for end in range(size, min(len(self._data), MAX_HASHED // chunk_tokens * size) + 1, size):
            part = self._data[end - size : end]
            digest.update(part if isinstance(part, bytes) else array("q", part).tobytes())
            names.append(digest.digest())
        return names


class RunPrefixes:
    """What one worker has run, the last of it."""

    def __init__(self, most: int = MAX_REMEMBERED) -> None:
        self._most = most
        self._shares: OrderedDict[bytes, float] = OrderedDict()  # by the beginning's name, see `Found`

    def remember(
        self,
        prefixes: PromptPrefixes,
        chunk_tokens: int,
        share: float = 1.0,
        cached_tokens: int = 0,
        expected_tokens: int = 0,
    ) -> None:
        """The worker has run a prompt that begins so, of which it had the first `cached_tokens`. Where it was taken to
        have more when the prompt was given to it, by a chunk at least, it has made room, or has none for so much: the
        rest is forgotten. By less than that only its last rows run again, or a text's tokens lie otherwise."""
        names = prefixes.names(chunk_tokens)
        if names and cached_tokens + chunk_tokens <= expected_tokens:
            for name in names[cached_tokens // chunk_tokens :]:
                self._shares.pop(name, None)
            names = names[: cached_tokens // chunk_tokens]
        # the shortest beginning, which most prompts have, is forgotten last
        for name in reversed(names):
            self._shares[name] = share
            self._shares.move_to_end(name)
        while len(self._shares) > self._most:
            self._shares.popitem(last=False)

    def found(self, prefixes: PromptPrefixes, chunk_tokens: int) -> Found:
        """The longest beginning that the worker has run."""
        names = prefixes.names(chunk_tokens)
        for count in range(len(names), 0, -1):
            share = self._shares.get(names[count - 1])
            if share is not None:
                return Found(count * chunk_tokens, share)
        return Found()

    def clear(self) -> None:
        """The worker has begun anew."""
        self._shares.clear()
