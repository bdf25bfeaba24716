"""Messages of the worker protocol, and what the engine takes and tells."""

from __future__ import annotations

from typing import Any

from ...compression.recipe import Recipe
from ...errors import InternalError, InvalidRequest, KvsluiceError
from ...kvstore.identity import FrameIdent
from ...models.sampling import SamplingParams
from ...protos import frame_pb2 as fpb
from ...protos import worker_pb2 as wpb
from ..tracing import Span, start_span
from ..worker import sampling_fields
from .engine import (
    DecodeRequest,
    EmittedChoice,
    Event,
    FailedEvent,
    FinishedEvent,
    OpenedEvent,
    RowsEvent,
    TokensEvent,
)
from .keeper import Keeper


def decode_request(message: wpb.Open) -> DecodeRequest:
    """What the engine is asked for."""
    return DecodeRequest(
        request_id=message.request_id,
        epoch=message.epoch,
        num_prompt_tokens=message.num_prompt_tokens,
        recipe=Recipe.from_json(message.recipe_json),
        sampling=SamplingParams(**sampling_fields(message.sampling)),
        credits=message.credits,
        keep_every=message.keeping.keep_every or None,
        history_tokens=message.history_tokens,
    )


def decode_span(message: wpb.Open, request: DecodeRequest) -> Span:
    """Of a request's time on the worker, in the trace that the gateway began."""
    return start_span(
        "kvsluice.decode",
        tuple(message.trace.items()),
        "server",
        request_id=message.request_id,
        epoch=message.epoch,
        recipe=request.recipe.name,
        prompt_tokens=message.num_prompt_tokens,
        from_store=message.from_store,
    )


def tell_span(span: Span, event: Event) -> None:
    """Say in a request's span what has happened; single tokens are too many for that."""
    if isinstance(event, OpenedEvent):
        span.event("opened")
    elif isinstance(event, FailedEvent):
        span.end(event.error)
    elif isinstance(event, FinishedEvent):
        span.set(steps=event.steps, bytes_read=event.bytes_read, resident_bytes=event.resident_bytes)
        span.end()


def failed_message(request_id: str, epoch: int, error: KvsluiceError) -> wpb.FromDecode:
    """The end of a request by an error."""
    failed = wpb.Failed(request_id=request_id, epoch=epoch, error_type=error.type_name, message=error.message)
    if isinstance(error, InvalidRequest):
        failed.field, failed.allowed = error.field, error.allowed
    return wpb.FromDecode(failed=failed)


def sent_choices(message: wpb.Open) -> list[EmittedChoice]:
    """What earlier attempts have told; empty where there was none.

    Raises:
        InvalidRequest: there is a choice of which nothing was told, or not one of each choice.
    """
    choices = [EmittedChoice(tuple(one.token_ids), one.finish_reason) for one in message.sent]
    told = len(choices) == message.sampling.n and all(choice.token_ids for choice in choices)
    if not told and (choices or message.from_store):
        raise InvalidRequest("sent", f"{len(choices)} choices", f"{message.sampling.n}, with a token each")
    return choices


def tell_keeper(keeper: Keeper, event: Event) -> None:
    """What a keeper has to know of what happened."""
    if isinstance(event, RowsEvent):
        keeper.rows(event)
    elif isinstance(event, TokensEvent):
        keeper.tokens(event.choice, [token.token_id for token in event.sampled], event.sampled[-1].finish_reason)


def event_message(event: Event, keeper: Keeper | None) -> wpb.FromDecode:
    """What the gateway hears of an event, but for tokens."""
    ident: dict[str, Any] = {"request_id": event.request_id, "epoch": event.epoch}
    if isinstance(event, OpenedEvent):
        return wpb.FromDecode(opened=wpb.Opened(**ident))
    if isinstance(event, FailedEvent):
        return failed_message(event.request_id, event.epoch, event.error)
    if isinstance(event, FinishedEvent):
        finished = wpb.Finished(
            **ident,
            resident_bytes=event.resident_bytes,
            bytes_read=event.bytes_read,
            steps=event.steps,
            rows_recalled=event.rows_recalled,
        )
        if keeper is not None:
            finished.stored_bytes, finished.kept = keeper.stored_bytes, keeper.is_kept
        return wpb.FromDecode(finished=finished)
    raise InternalError(f"unknown event {type(event).__name__}")


def resumed_message(ident: FrameIdent, tokens: int, prompt_tokens: int) -> wpb.FromDecode:
    """How much has to be computed again before a request can go on."""
    return wpb.FromDecode(
        resumed=wpb.Resumed(
            request_id=ident.request_id,
            epoch=ident.epoch,
            recomputed_tokens=tokens,
            recomputed_prompt_tokens=prompt_tokens,
        )
    )


def token_entry(event: TokensEvent) -> wpb.TokenEntry:
    """Tokens of a choice."""
    entry = wpb.TokenEntry(
        request_id=event.request_id, epoch=event.epoch, choice=event.choice, first_index=event.first_index
    )
    for sampled in event.sampled:
        token = entry.tokens.add(token_id=sampled.token_id)
        if sampled.logprob is not None:
            token.logprob = sampled.logprob
            token.top_logprobs.extend(fpb.TokenLogprob(token_id=t, logprob=p) for t, p in sampled.top)
        entry.finish_reason = sampled.finish_reason
    return entry
