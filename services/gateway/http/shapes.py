"""What answers look like: the JSON objects of OpenAI's API, and this service's own accounts beside."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from ....protos import generation_pb2 as pb
from ...results import Completion
from .translate import Ask

LEAST_LOGPROB = -9999.0  # what OpenAI's API tells of a token that cannot come

Json = dict[str, Any]
TokenBytes = Callable[[int], bytes]


class Logprob(Protocol):
    """A token with its log-probability: of a message, or of a finished `Completion`."""

    @property
    def token_id(self) -> int: ...
    @property
    def token(self) -> str: ...
    @property
    def logprob(self) -> float: ...
    @property
    def top(self) -> Iterable[Any]: ...


def chat_logprobs(tokens: Iterable[Logprob], token_bytes: TokenBytes) -> Json:
    """Log-probabilities as the chat endpoint tells them."""

    def entry(token: Logprob) -> Json:
        return {
            "token": token.token,
            "logprob": max(token.logprob, LEAST_LOGPROB),
            "bytes": list(token_bytes(token.token_id)),
        }

    content = [entry(token) | {"top_logprobs": [entry(other) for other in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[Logprob], offset: int) -> Json:
    """Log-probabilities as the completions endpoint tells them.

    Args:
        offset: characters of the choice's text before the first of the tokens.
    """
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.token)
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [max(token.logprob, LEAST_LOGPROB) for token in tokens],
        "top_logprobs": [
            {one.token: max(one.logprob, LEAST_LOGPROB) for one in (*token.top, token)} for token in tokens
        ],
        "text_offset": offsets,
    }


def usage(done: Sequence[Completion]) -> Json:
    """Token counts of all prompts together."""
    prompt = sum(one.usage.prompt_tokens for one in done)
    answer = sum(one.usage.completion_tokens for one in done)
    details = {"cached_tokens": sum(one.usage.cached_tokens for one in done)}
    return _usage(prompt, answer) | {"prompt_tokens_details": details}


def _usage(prompt: int, answer: int) -> Json:
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def reports(done: Sequence[Completion]) -> list[Json]:
    """What this service tells beside OpenAI's fields, of each prompt."""
    return [
        {
            "request_id": one.request_id,
            "recipe": asdict(one.recipe),
            "timing": asdict(one.timing),
            "durability": asdict(one.durability),
            "session": None if one.session is None else asdict(one.session),
        }
        for one in done
    ]


def whole_answer(
    ask: Ask, done: Sequence[Completion], echoes: Sequence[str], token_bytes: TokenBytes, fingerprint: str | None
) -> Json:
    """An answer that is not streamed.

    Args:
        done: of each prompt.
        echoes: what the answers to each begin with; empty = nothing.
        fingerprint: of the model; it tells whether a seed draws the same tokens.
    """
    choices = []
    for i, one in enumerate(done):
        for choice in one.choices:
            logprobs: Json | None = None
            index = i * ask.num_choices + choice.index
            told: Json = {"index": index, "finish_reason": choice.finish_reason}
            if ask.chat:
                if ask.logprobs:
                    logprobs = chat_logprobs(choice.logprobs, token_bytes)
                told["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
            else:
                if ask.logprobs:
                    logprobs = completion_logprobs(choice.logprobs, 0)
                told["text"] = (echoes[i] if echoes else "") + choice.text
            choices.append(told | {"logprobs": logprobs})
    kind = "chat.completion" if ask.chat else "text_completion"
    head = _head(ask, kind, fingerprint)
    return head | {"choices": choices, "usage": usage(done), "kvsluice": reports(done)}


def _head(ask: Ask, kind: str, fingerprint: str | None) -> Json:
    return {
        "id": ask.id,
        "object": kind,
        "created": ask.created,
        "model": ask.model,
        "system_fingerprint": fingerprint,
    }


class ChunkShape:
    """The chunks of a streamed answer."""

    def __init__(self, ask: Ask, token_bytes: TokenBytes, fingerprint: str | None) -> None:
        self._ask, self._token_bytes = ask, token_bytes
        self._begun: set[int] = set()
        self._prompt_tokens = self._answer_tokens = 0
        self._offsets: dict[int, int] = {}
        head = json.dumps(_head(ask, "chat.completion.chunk" if ask.chat else "text_completion", fingerprint))
        # all chunks of an answer begin and end alike, and one is made for every token
        self._before = head[:-1] + ', "choices": ['
        self._after = '], "usage": null}' if ask.include_usage else "]}"

    def add_prompt(self, num_tokens: int) -> None:
        """Count the tokens of a prompt, once they are known."""
        self._prompt_tokens += num_tokens

    def chunk(self, prompt: int, chunk: pb.Chunk, echo: str) -> str | None:
        """A chunk as JSON; None where it tells nothing.

        Args:
            prompt: which of the prompts it answers.
            echo: what the choice's text begins with.
        """
        ask, index = self._ask, prompt * self._ask.num_choices + chunk.index
        first = index not in self._begun
        self._answer_tokens += len(chunk.token_ids)
        if not (chunk.text or chunk.finish_reason or ask.logprobs or first):
            return None
        choice: Json = {"index": index}
        if ask.chat:
            choice["delta"] = {"role": "assistant", "content": chunk.text} if first else {"content": chunk.text}
            choice["logprobs"] = chat_logprobs(chunk.logprobs, self._token_bytes) if ask.logprobs else None
        else:
            choice["text"] = echo + chunk.text if first else chunk.text
            choice["logprobs"] = self._logprobs(index, chunk) if ask.logprobs else None
        choice["finish_reason"] = chunk.finish_reason or None
        self._begun.add(index)
        after = self._after
        if ask.continuous_usage:
            after = f'], "usage": {json.dumps(_usage(self._prompt_tokens, self._answer_tokens))}}}'
        return f"{self._before}{json.dumps(choice)}{after}"

    def last(self, done: Sequence[Completion]) -> str:
        """The chunk without choices, with the usage."""
        more = json.dumps({"usage": usage(done), "kvsluice": reports(done)})
        return f"{self._before}], {more[1:]}"

    def _logprobs(self, index: int, chunk: pb.Chunk) -> Json:
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + sum(len(one.token) for one in chunk.logprobs)
        return completion_logprobs(chunk.logprobs, offset)


def models(served: str, recipes: Iterable[str], created: int) -> Json:
    """The served model, by itself and under every recipe's name."""
    return {"object": "list", "data": [model(name, created) for name in (served, *(f"{served}:{r}" for r in recipes))]}


def model(name: str, created: int) -> Json:
    """One of them."""
    return {"id": name, "object": "model", "created": created, "owned_by": "kvsluice"}


def sessions(found: Iterable[pb.SessionInfo]) -> Json:
    """The sessions there are; times in seconds since 1970."""
    data = [
        {
            "id": one.session_id,
            "object": "session",
            "turns": one.turns,
            "tokens": one.tokens,
            "recipe": one.recipe,
            "created": int(one.begun_unix_s),
            "used": int(one.used_unix_s),
            "expires": int(one.expires_unix_s),
        }
        for one in found
    ]
    return {"object": "list", "data": data}
