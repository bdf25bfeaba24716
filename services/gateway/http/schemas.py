"""Bodies of requests, as OpenAI's API documents them, with this service's own fields beside.

What a field may hold is said by the validator that all doors share; here is only its JSON type. Fields that OpenAI
knows and this service does not are refused by name, unless their value says what happens anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ....errors import InvalidRequest

COMPLETION_TOKENS = 16  # of a completion that names no max_tokens, as OpenAI has it

_NOTHING: tuple[Any, ...] = (False, [], {}, "")


class _Fields(BaseModel):
    """Fields of a JSON object; null counts as absent.

    Attributes:
        HARMLESS: fields of OpenAI's that ask for nothing; any value.
        NEUTRAL: fields that are not supported -> values that ask for nothing.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True, protected_namespaces=())
    HARMLESS: ClassVar[frozenset[str]] = frozenset()
    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def check_others(self, path: str = "") -> None:
        """Raises `InvalidRequest` for a field that cannot be honoured."""
        for name, value in (self.model_extra or {}).items():
            if value is None or name in self.HARMLESS:
                continue
            if name not in self.NEUTRAL:
                known = ", ".join(sorted(type(self).model_fields))
                raise InvalidRequest(path + name[:64], "is not a field of this request", known)
            # True equals 1, which is no switch
            if not any(value == other and type(value) is type(other) for other in self.NEUTRAL[name]):
                raise InvalidRequest(path + name, "is not supported", "leave it out")


class StreamOptions(_Fields):
    """How a stream is told."""

    NEUTRAL = {"include_obfuscation": _NOTHING}

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's, which load testers ask for


class Message(_Fields):
    """One message of a chat; `content` is checked by `translate`."""

    NEUTRAL = dict.fromkeys(
        ("name", "refusal", "audio", "annotations", "tool_calls", "tool_call_id", "function_call", "reasoning_content"),
        _NOTHING,
    )

    role: str
    content: Any = None


class Body(_Fields):
    """What both endpoints take. From `top_k` on: fields that OpenAI's API has not."""

    HARMLESS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"})

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: Any = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    recipe: str | None = None
    slots: dict[str, Any] | None = None
    durability: str | None = None
    session_id: str | None = None
    session_turn: int | None = None
    timeout_s: float | None = None


class CompletionBody(Body):
    """`POST /v1/completions`."""

    NEUTRAL = {"suffix": _NOTHING, "best_of": (1,), "prompt_logprobs": ()}

    prompt: Any = None
    logprobs: int | None = None
    echo: bool | None = None


class ChatBody(Body):
    """`POST /v1/chat/completions`."""

    NEUTRAL = {
        "tools": _NOTHING,
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": _NOTHING,
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        "web_search_options": (),
        "moderation": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "prompt_logprobs": (),
    }

    messages: list[Message] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


AnyBody = TypeVar("AnyBody", CompletionBody, ChatBody)


def parse_body(kind: type[AnyBody], raw: bytes) -> AnyBody:
    """Parse a request's body.

    Raises:
        InvalidRequest: it is not JSON, nested too deeply, or a field has another type or is not supported; nothing of
            what it holds is repeated.
    """
    try:
        body = kind.model_validate_json(raw)
    except ValidationError as exc:
        raise _refusal(exc) from None
    body.check_others()
    if body.stream_options is not None:
        body.stream_options.check_others("stream_options.")
    if isinstance(body, ChatBody):
        for i, message in enumerate(body.messages or ()):
            message.check_others(f"messages[{i}].")
    return body


def _refusal(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return InvalidRequest("body", "is not JSON, or nested too deeply", "a JSON object in UTF-8")
    path = ""
    for step in first["loc"]:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else str(step)
    allowed = first["msg"].removeprefix("Input should be ")
    if first["type"] == "missing":
        return InvalidRequest(path[:96], "is missing", "see the API's reference")
    return InvalidRequest(path[:96] or "body", "has another type than it may have", allowed[:160])
