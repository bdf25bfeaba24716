"""From bodies of OpenAI's API to the messages that every door hands on, and what the answer has to look like."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ....errors import InvalidRequest
from ....protos import generation_pb2 as pb
from ...api import Options, build_request
from ...validation import MAX_CHOICES
from .schemas import COMPLETION_TOKENS, Body, ChatBody, CompletionBody, Message

Prompt = str | list[int]

_SAME = (
    "temperature top_p n seed stop presence_penalty frequency_penalty top_k min_p repetition_penalty min_tokens "
    "stop_token_ids ignore_eos slots durability session_id session_turn timeout_s"
).split()

# fields by the names that gRPC's clients know -> as OpenAI's clients know them; the first that fits counts
_NAMES = (
    ("sampling.", ""),
    ("chat.messages", "messages"),
    ("chat", "messages"),
    ("token_ids", "prompt"),
    ("recipe.name", "recipe"),
    ("recipe.slots_json", "slots"),
    ("recipe.slots", "slots"),
    ("recipe.", "slots."),
)


@dataclass(frozen=True)
class Ask:
    """A request of one of the endpoints.

    Attributes:
        id: of the answer, as in `chatcmpl-…`.
        model: as the client named it.
        created: seconds since 1970.
        chat: of the chat endpoint.
        requests: one a prompt.
        num_choices: of each of them.
        echoes: the prompts, where answers begin with theirs; empty = they do not.
        stream, include_usage, continuous_usage: as asked for.
        logprobs: whether they are told.
        timeout_s: until the deadline; None = the server's.
        names: the client's names of fields that are spelled otherwise inside, beside those of `_NAMES`.
    """

    id: str
    model: str
    chat: bool
    requests: tuple[pb.GenerateRequest, ...]
    num_choices: int = 1
    echoes: tuple[Prompt, ...] = ()
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    logprobs: bool = False
    timeout_s: float | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    def renamed(self, error: InvalidRequest) -> InvalidRequest:
        """The error by the client's names of fields."""
        return renamed(error, self.names)


def renamed(error: InvalidRequest, names: Mapping[str, str]) -> InvalidRequest:
    """An error of the validator by the names that OpenAI's API has for its field."""
    if error.field in names:
        return type(error)(names[error.field], error.problem, error.allowed)
    for inner, outer in _NAMES:
        if error.field.startswith(inner):
            return type(error)(outer + error.field.removeprefix(inner), error.problem, error.allowed)
    return error


def completion(body: CompletionBody, served: str, request_id: str) -> Ask:
    """What `POST /v1/completions` asks for. Raises `InvalidRequest`, by inner names of fields."""
    prompts = _prompts(body.prompt)
    options = _options(body, served)
    options["max_tokens"] = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    if body.logprobs is not None:
        options["logprobs"] = body.logprobs
        if body.echo:
            raise InvalidRequest("echo", "is not supported with logprobs", "one of them")
    if len(prompts) > 1:
        _check_several(len(prompts), body)
    ids = [request_id] if len(prompts) == 1 else [f"{request_id}-{i}" for i in range(len(prompts))]
    requests = tuple(
        build_request(prompt, _typed(options | {"request_id": one})) for prompt, one in zip(prompts, ids, strict=True)
    )
    return _ask(
        body, False, f"cmpl-{request_id}", requests, body.logprobs is not None, echoes=prompts if body.echo else ()
    )


def chat(body: ChatBody, served: str, request_id: str) -> Ask:
    """What `POST /v1/chat/completions` asks for. Raises `InvalidRequest`, by inner names of fields."""
    if not body.messages:
        raise InvalidRequest("messages", "is missing or empty", "a list of messages")
    messages = [_message(f"messages[{i}]", message) for i, message in enumerate(body.messages)]
    options = _options(body, served) | {"request_id": request_id}
    names = {"sampling.logprobs": "top_logprobs"}
    if body.max_completion_tokens is not None:
        if body.max_tokens not in (None, body.max_completion_tokens):
            raise InvalidRequest("max_tokens", "differs from max_completion_tokens", "one of them")
        options["max_tokens"] = body.max_completion_tokens
        names["sampling.max_tokens"] = "max_completion_tokens"
    elif body.max_tokens is not None:
        options["max_tokens"] = body.max_tokens
    if body.logprobs:
        options["logprobs"] = body.top_logprobs or 0
    elif body.top_logprobs is not None:
        raise InvalidRequest("top_logprobs", "is given without logprobs", "only where logprobs is true")
    request = build_request(messages, _typed(options))
    return _ask(body, True, f"chatcmpl-{request_id}", (request,), bool(body.logprobs), names=names)


def split_model(model: str, served: str) -> tuple[str, str]:
    """(the model's name, the recipe that is named behind it or "")."""
    recipe = model.removeprefix(f"{served}:")
    return (model, "") if recipe == model else (served, recipe)


def _ask(
    body: Body, is_chat: bool, answer_id: str, requests: tuple[pb.GenerateRequest, ...], logprobs: bool, **more: Any
) -> Ask:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options", "is given without stream", "only where stream is true")
    told = body.stream_options
    return Ask(
        answer_id,
        body.model,
        is_chat,
        requests,
        num_choices=body.n or 1,
        stream=bool(body.stream),
        include_usage=bool(told and told.include_usage),
        continuous_usage=bool(told and told.continuous_usage_stats),
        logprobs=logprobs,
        timeout_s=body.timeout_s,
        **more,
    )


def _options(body: Body, served: str) -> dict[str, Any]:
    options = {name: getattr(body, name) for name in _SAME if getattr(body, name) is not None}
    options["model"], recipe = split_model(body.model, served)
    if recipe and body.recipe not in (None, "", recipe):
        raise InvalidRequest("recipe", "is not the one that model names", f"{recipe[:64]}, or leave it out")
    options["recipe"] = recipe or body.recipe or ""
    if body.timeout_s is not None and body.timeout_s <= 0:
        raise InvalidRequest("timeout_s", f"got {body.timeout_s:g}", "seconds, more than 0")
    if body.logit_bias is not None:
        try:
            options["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
        except ValueError:
            raise InvalidRequest("logit_bias", "has a key that is no token id", "ids as decimal numbers") from None
    return options


def _prompts(value: Any) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if _are_ids(value):
            return (value,)
        if all(isinstance(item, list) and item and _are_ids(item) for item in value):
            return tuple(value)
    allowed = "a text, a list of texts, a list of token ids, or a list of such lists"
    raise InvalidRequest("prompt", "is missing, empty or of another type", allowed)


def _are_ids(items: Sequence[Any]) -> bool:
    return all(type(item) is int for item in items)  # and no bool


def _check_several(num_prompts: int, body: Body) -> None:
    most = max(1, MAX_CHOICES // max(1, body.n or 1))
    if num_prompts > most:
        raise InvalidRequest("prompt", f"has {num_prompts} prompts", f"at most {most} with n = {body.n or 1}")
    if body.session_id:
        raise InvalidRequest("prompt", f"has {num_prompts} prompts in a session", "one")


def _message(path: str, message: Message) -> dict[str, str]:
    # what newer models call the system's role
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": _content(f"{path}.content", message.content)}


def _content(path: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(path, "is missing or of another type", "a text, or a list of text parts")
    texts = []
    for i, part in enumerate(content):
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
        if kind != "text":
            shown = f"is a part of type {kind[:32]!r}" if isinstance(kind, str) else "has no type"
            raise InvalidRequest(f"{path}[{i}]", shown, "parts of type text")
        if not isinstance(text, str):
            raise InvalidRequest(f"{path}[{i}].text", "is missing or of another type", "a text")
        texts.append(text)
    return "".join(texts)


def _typed(options: dict[str, Any]) -> Options:
    return options  # type: ignore[return-value]
