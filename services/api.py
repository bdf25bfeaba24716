"""The public API's messages as Python values: requests are built from options, results are parsed. For clients."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from ..errors import InternalError, InvalidRequest
from ..protos import generation_pb2 as pb
from .results import (
    Choice,
    Chunk,
    Completion,
    DurabilityReport,
    ModelInfo,
    RecipeReport,
    SessionInfo,
    SessionReport,
    Timing,
    TokenLogprob,
    Usage,
)

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or chat messages ({"role": ..., "content": ...})."""


MAX_TIMEOUT_S = 365 * 86400


class Options(TypedDict, total=False):
    """Keyword arguments of `generate` and `stream`; names and meanings as in the OpenAI API.

    `slots` replaces single slots of the recipe. `timeout_s` is the deadline of the whole request. `durability` says
    what is kept in the service's store while the request runs: `none`, `handoff` (the prompt) or `tokens` (the answer
    as well). `session_id` continues the conversation of that id, or begins it; the prompt is then the new turn alone,
    and `session_turn` says which turn that has to be.
    """

    model: str
    request_id: str
    recipe: str
    slots: Mapping[str, Any]
    durability: str
    session_id: str
    session_turn: int
    timeout_s: float | None
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    min_tokens: int
    ignore_eos: bool
    logprobs: int
    n: int


def build_request(prompt: Prompt, options: Options) -> pb.GenerateRequest:
    """The message for a prompt and its options. Raises `InvalidRequest` where a value does not fit its field."""
    given: dict[str, Any] = dict(options)
    _check_timeout(given.pop("timeout_s", None))
    request = pb.GenerateRequest(request_id=_text("request_id", given.pop("request_id", "")) or uuid.uuid4().hex)
    request.model = _text("model", given.pop("model", ""))
    request.recipe.name = _text("recipe.name", given.pop("recipe", ""))
    request.durability = _text("durability", given.pop("durability", ""))
    request.session_id = _text("session_id", given.pop("session_id", ""))
    _set_number(request, "session_turn", given.pop("session_turn", None))
    _set_input(request, prompt)
    slots = given.pop("slots", None)
    if slots:
        try:
            request.recipe.slots_json = json.dumps(slots, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as exc:
            raise InvalidRequest("recipe.slots", "cannot be written as JSON", "a mapping from slots to theirs") from exc
    stop = given.pop("stop", ())
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or isinstance(stops, bytes):
        raise InvalidRequest("sampling.stop", f"got {stop!r}"[:96], "a text or a sequence of texts")
    request.sampling.stop.extend(_text("sampling.stop", item) for item in stops)
    for name, value in given.items():
        _set_sampling(request.sampling, name, value)
    return request


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(field, f"got {value!r}"[:96], "a text")
    try:
        value.encode()
    except UnicodeEncodeError as exc:
        raise InvalidRequest(field, "holds half of a surrogate pair", "text that UTF-8 can hold") from exc
    return value


def _check_timeout(value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_TIMEOUT_S:
        raise InvalidRequest("timeout_s", f"got {value!r}"[:96], f"seconds, at most {MAX_TIMEOUT_S}; None = no limit")


def _set_input(request: pb.GenerateRequest, prompt: Prompt) -> None:
    allowed = "text, a sequence of token ids or of chat messages"
    if isinstance(prompt, str):
        request.prompt = _text("prompt", prompt)
        return
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray | memoryview):
        raise InvalidRequest("prompt", f"is a {type(prompt).__name__}", allowed)
    try:
        ids = [item for item in prompt if isinstance(item, int) and not isinstance(item, bool)]
        if len(ids) == len(prompt):
            request.token_ids.SetInParent()
            request.token_ids.ids.extend(ids)
        else:
            for message in prompt:
                role, content = message["role"], message["content"]  # type: ignore[index]
                request.chat.messages.add(role=_text("prompt", role), content=_text("prompt", content))
    except (TypeError, ValueError, KeyError) as exc:
        raise InvalidRequest("prompt", "does not fit its field", allowed) from exc


def _set_number(message: Any, name: str, value: Any) -> None:
    if value is None:
        return
    try:
        setattr(message, name, value)
    except (TypeError, ValueError) as exc:
        raise InvalidRequest(name, f"got {value!r}"[:96], "a number that fits the field") from exc


def _set_sampling(sampling: pb.SamplingParams, name: str, value: Any) -> None:
    try:
        if name == "logit_bias":
            sampling.logit_bias.update(value)
        elif name == "stop_token_ids":
            sampling.stop_token_ids.extend(value)
        elif name in pb.SamplingParams.DESCRIPTOR.fields_by_name:
            setattr(sampling, name, value)
        else:
            known = ", ".join(sorted(Options.__annotations__))
            raise InvalidRequest(name[:64], "is not an option", known)
    except (TypeError, ValueError, OverflowError) as exc:
        raise InvalidRequest(f"sampling.{name}", f"got {value!r}"[:96], "a number that fits the field") from exc


def _parse_logprobs(items: Iterable[pb.TokenLogprobs]) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(i.token_id, i.token, i.logprob, _parse_logprobs(i.top)) for i in items)


def _parse_chunk(chunk: pb.Chunk) -> Chunk:
    return Chunk(
        chunk.index,
        chunk.text,
        tuple(chunk.token_ids),
        _parse_logprobs(chunk.logprobs),
        chunk.finish_reason or None,
    )


def parse_info(info: pb.GetModelInfoResponse) -> ModelInfo:
    """What a service says of its model."""
    return ModelInfo(
        model=info.model,
        fingerprint=info.fingerprint,
        max_model_len=info.max_model_len,
        vocab_size=info.vocab_size,
        recipes=tuple(info.recipes),
        default_recipe=info.default_recipe,
        version=info.version,
    )


def parse_sessions(response: pb.ListSessionsResponse) -> list[SessionInfo]:
    """The sessions that a service names."""
    return [
        SessionInfo(
            session_id=one.session_id,
            turns=one.turns,
            tokens=one.tokens,
            recipe=one.recipe,
            begun_unix_s=one.begun_unix_s,
            used_unix_s=one.used_unix_s,
            expires_unix_s=one.expires_unix_s,
            stored_bytes=one.stored_bytes,
        )
        for one in response.sessions
    ]


def _parse_session(complete: pb.Complete) -> SessionReport | None:
    if not complete.HasField("session"):
        return None
    return SessionReport(complete.session.session_id, complete.session.turn, complete.session.tokens)


@dataclass
class _Parts:
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Collector:
    """Gathers a stream's chunks, and the completion once it has come. Shared by the sync and the async stream."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._parts: dict[int, _Parts] = {}
        self._completion: Completion | None = None

    def take(self, response: pb.GenerateResponse) -> Chunk | None:
        """The chunk that a message holds; None when it is the last message."""
        if response.HasField("complete"):
            self._completion = self._complete(response.complete)
            return None
        chunk = _parse_chunk(response.chunk)
        parts = self._parts.setdefault(chunk.index, _Parts())
        parts.text.append(chunk.text)
        parts.token_ids.extend(chunk.token_ids)
        parts.logprobs.extend(chunk.logprobs)
        return chunk

    @property
    def completion(self) -> Completion:
        """The finished request. Raises `InternalError` while the stream has not been read to its end."""
        if self._completion is None:
            raise InternalError("the stream has not been read to its end")
        return self._completion

    def _complete(self, complete: pb.Complete) -> Completion:
        usage, recipe, timing, durability = complete.usage, complete.recipe, complete.timing, complete.durability
        choices = []
        for choice in complete.choices:
            parts = self._parts.get(choice.index, _Parts())
            choices.append(
                Choice(
                    choice.index,
                    "".join(parts.text),
                    tuple(parts.token_ids),
                    tuple(parts.logprobs),
                    choice.finish_reason,
                    choice.stop_match,
                )
            )
        return Completion(
            request_id=self.request_id,
            choices=tuple(choices),
            usage=Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens),
            recipe=RecipeReport(
                recipe.requested,
                recipe.effective,
                recipe.fingerprint,
                recipe.fallback_reason,
                recipe.handoff_bytes,
                recipe.handoff_bf16_bytes,
                recipe.resident_bytes,
                recipe.bytes_read_per_step,
            ),
            timing=Timing(timing.queue_s, timing.prefill_s, timing.time_to_first_token_s, timing.decode_s),
            durability=DurabilityReport(
                durability.level,
                durability.kept,
                durability.stored_bytes,
                durability.migrations,
                durability.recomputed_tokens,
                durability.recomputed_prompt_tokens,
                durability.stalled_s,
            ),
            session=_parse_session(complete),
        )
