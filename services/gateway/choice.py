"""One of a request's n choices: checks the order of its tokens and turns them into chunks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from ...errors import InternalError
from ...protos import frame_pb2 as fpb
from ...protos import generation_pb2 as pb
from .text import ChoiceText, IncrementalDecoder


class Detokenizer(Protocol):
    """What the gateway needs of `models.tokenizer.Tokenizer` to write answers."""

    def stream(self) -> IncrementalDecoder: ...
    def token_text(self, token_id: int) -> str: ...


class Choice:
    """State of one choice.

    Args:
        index: which of the n choices.
        stops: stop strings.
        min_tokens: stop strings completed up to this token do not end the choice.

    Attributes:
        token_ids: all that were taken.
        text: that was delivered.
        stopped_by_text: a stop string has ended it, and not a token.
    """

    def __init__(self, index: int, tokenizer: Detokenizer, stops: Sequence[str], min_tokens: int) -> None:
        self.index = index
        self.finish_reason = ""
        self.stop_match = ""
        self.token_ids: list[int] = []
        self.stopped_by_text = False
        self._texts: list[str] = []
        self._tokenizer = tokenizer
        self._text = ChoiceText(tokenizer.stream(), stops, min_tokens)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def extend(self, first_index: int, tokens: Iterable[fpb.SampledToken], finish_reason: str) -> pb.Chunk:
        """Add tokens as a worker reports them; those behind a stop string are dropped.

        Args:
            first_index: index of the first of them among the choice's tokens.
            finish_reason: `stop` says that the last of them is a token that ends the choice and gives no text.

        Raises:
            InternalError: tokens are missing or come twice.
        """
        sampled = list(tokens)
        if first_index != self.num_tokens:
            raise InternalError("tokens of a choice came out of order")
        chunk = pb.Chunk(index=self.index)
        text = []
        for i, token in enumerate(sampled):
            self._append_token(chunk, token)
            if finish_reason == "stop" and i == len(sampled) - 1:
                self._text.skip()
                self.stop_match = self._tokenizer.token_text(token.token_id)
                continue
            step = self._text.push(token.token_id)
            text.append(step.text)
            if step.stop_match is not None:
                self.finish_reason, self.stop_match, self.stopped_by_text = "stop", step.stop_match, True
                break
        if finish_reason and not self.finish_reason:
            last = self._text.finish()
            text.append(last.text)
            self.finish_reason = finish_reason
            if last.stop_match is not None:
                self.finish_reason, self.stop_match, self.stopped_by_text = "stop", last.stop_match, True
        chunk.text = "".join(text)
        self._texts.append(chunk.text)
        chunk.finish_reason = self.finish_reason
        return chunk

    def report(self) -> pb.Choice:
        return pb.Choice(
            index=self.index,
            finish_reason=self.finish_reason,
            stop_match=self.stop_match,
            completion_tokens=self.num_tokens,
        )

    def _append_token(self, chunk: pb.Chunk, token: fpb.SampledToken) -> None:
        self.token_ids.append(token.token_id)
        chunk.token_ids.append(token.token_id)
        if token.HasField("logprob"):
            chunk.logprobs.append(
                pb.TokenLogprobs(
                    token_id=token.token_id,
                    token=self._tokenizer.token_text(token.token_id),
                    logprob=token.logprob,
                    top=[
                        pb.TokenLogprobs(
                            token_id=other.token_id,
                            token=self._tokenizer.token_text(other.token_id),
                            logprob=other.logprob,
                        )
                        for other in token.top_logprobs
                    ],
                )
            )
