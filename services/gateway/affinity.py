"""Which prompts' beginnings a prefill worker has run, as a gateway remembers it.

Workers share beginnings in chunks (`services.prefill.prefixes`); a gateway knows a beginning by a hash over its chunks,
the tenant and the recipe that was asked for. It is a guess: a worker may have made room since, another gateway may have
sent it other prompts, and hashes may fall together. A wrong guess costs a detour, never a wrong token: the worker
itself compares what it has.
"""

from __future__ import annotations

import math
from array import array
from collections import OrderedDict
from collections.abc import Sequence

import xxhash

CHARS_PER_TOKEN = 4  # about, where a prompt is not tokenized yet
CHUNK_TOKENS = 512  # of beginnings that are known by their inputs
MAX_REMEMBERED = 16384  # chunks of each worker; 8M tokens in chunks of 512


class PromptPrefixes:
    """The beginnings of one prompt.

    Args:
        tenant: whose prompt it is.
        recipe: the name that was asked for; prompts of different recipes may share nothing.
        data: the prompt, of which `bytes_per_token` are a token.

    Attributes:
        num_tokens: of the whole prompt.
    """

    def __init__(self, tenant: str, recipe: str, data: bytes, bytes_per_token: int) -> None:
        self._salt = f"{len(tenant)}:{tenant}{recipe}".encode()
        self._data, self._per_token = data, bytes_per_token
        self.num_tokens = -(-len(data) // bytes_per_token)
        self._names: dict[int, list[bytes]] = {}

    @classmethod
    def of_ids(cls, tenant: str, recipe: str, prompt_ids: Sequence[int]) -> PromptPrefixes:
        """Of a tokenized prompt."""
        ids = array("q", prompt_ids)
        return cls(tenant, recipe, ids.tobytes(), ids.itemsize)

    @classmethod
    def of_text(cls, tenant: str, recipe: str, text: str) -> PromptPrefixes:
        """Of a prompt that is not tokenized yet; tokens are those that it is taken for."""
        return cls(tenant, recipe, text.encode("utf-32-le", "surrogatepass"), 4 * CHARS_PER_TOKEN)

    def names(self, chunk_tokens: int) -> list[bytes]:
        """A name for the first chunk, the first two, and so on, as far as chunks are whole; none where there is no
        chunk."""
        if chunk_tokens not in self._names:
            self._names[chunk_tokens] = self._made(chunk_tokens * self._per_token) if chunk_tokens else []
        return self._names[chunk_tokens]

    def _made(self, chunk_bytes: int) -> list[bytes]:
        names, digest = [], xxhash.xxh3_128(self._salt)
        for end in range(chunk_bytes, len(self._data) + 1, chunk_bytes):
            digest.update(self._data[end - chunk_bytes : end])
            names.append(digest.digest())
        return names


class RunPrefixes:
    """What one worker has run, the last of it."""

    def __init__(self, most: int = MAX_REMEMBERED) -> None:
        self._most = most
        self._names: OrderedDict[bytes, None] = OrderedDict()

    def remember(self, prefixes: PromptPrefixes, chunk_tokens: int, cached_tokens: int = 0) -> None:
        """The worker has run a prompt that begins so, of which it had the first `cached_tokens`. Where it was taken to
        have more it has made room, or has none for so much: the rest is forgotten."""
        names = prefixes.names(chunk_tokens)
        if cached_tokens < self.found(prefixes, chunk_tokens):
            for name in names[cached_tokens // chunk_tokens :]:
                self._names.pop(name, None)
            names = names[: cached_tokens // chunk_tokens]
        # the shortest beginning, which most prompts have, is forgotten last
        for name in reversed(names):
            self._names[name] = None
            self._names.move_to_end(name)
        while len(self._names) > self._most:
            self._names.popitem(last=False)

    def found(self, prefixes: PromptPrefixes, chunk_tokens: int) -> int:
        """Tokens of the longest beginning that the worker has run, 0 to the prompt's."""
        names = prefixes.names(chunk_tokens)
        return next((i for i in range(len(names), 0, -1) if names[i - 1] in self._names), 0) * chunk_tokens

    def clear(self) -> None:
        """The worker has begun anew."""
        self._names.clear()


class InputPrefixes:
    """What any worker has run, by requests' inputs as they come in: how much of one is likely not to run again is known
    before it is tokenized and a worker is picked."""

    def __init__(self) -> None:
        self._has_run = RunPrefixes()

    def found(self, prefixes: PromptPrefixes) -> int:
        """Tokens that should not have to run, 0 to the input's."""
        return self._has_run.found(prefixes, CHUNK_TOKENS)

    def remember(self, prefixes: PromptPrefixes, cached_share: float | None) -> None:
        """A request has run, but for so much of it; None = nothing of it is shared."""
        if cached_share is not None:
            self._has_run.remember(prefixes, CHUNK_TOKENS, math.floor(prefixes.num_tokens * cached_share))
