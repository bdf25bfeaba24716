"""What a client is told: tokens in order, each once, whatever becomes of the workers that make them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import chain

from ...errors import InternalError
from ...protos import frame_pb2 as fpb
from ...protos import generation_pb2 as pb
from ...protos import worker_pb2 as wpb
from ..metrics.gateway import GatewayMetrics
from ..tracing import current_span
from .choice import Choice, Detokenizer
from .job import Job

MAX_CHUNK_TOKENS = 32  # with 20 logprobs each some 32 KiB, which every client takes


class Answer:
    """The choices of a request. It outlives attempts: what has been taken is told, and never taken again.

    Attributes:
        has_begun: every choice has its first token.
        queue_s: until a prefill worker took the request, and until it began.
        prefill_s: of the first attempt that gave a token.
        stalled_s: what attempts that failed took between two tokens.
        opened_s: until a decode worker had room for the request.
    """

    def __init__(self, job: Job, tokenizer: Detokenizer, metrics: GatewayMetrics) -> None:
        self.has_begun = False
        self.queue_s = self.prefill_s = self.stalled_s = self.opened_s = 0.0
        self._job, self._metrics = job, metrics
        self._choices = [Choice(i, tokenizer, job.checked.stop, job.sampling.min_tokens) for i in range(job.sampling.n)]
        self._chunks: dict[int, list[pb.Chunk]] = {}
        self._first_s = self._last_s = 0.0
        self._failed = False

    @property
    def ended(self) -> bool:
        return all(choice.finish_reason for choice in self._choices)

    @property
    def num_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self._choices)

    @property
    def longest_choice(self) -> int:
        """Tokens of the choice that has most."""
        return max(choice.num_tokens for choice in self._choices)

    @property
    def finish_reason(self) -> str:
        """Of the first choice."""
        return self._choices[0].finish_reason

    def sent(self) -> list[fpb.ContinuedChoice]:
        """What every choice has come to, what goes before the answer included; empty before the first tokens."""
        history = self._job.history_ids
        if not (self.has_begun or history):
            return []
        return [
            fpb.ContinuedChoice(token_ids=(*history, *c.token_ids), finish_reason=c.finish_reason)
            for c in self._choices
        ]

    def begin(self, first: wpb.FirstTokens, queue_s: float) -> None:
        """Take every choice's first token from prefill."""
        self._begin(queue_s + first.queue_s, first.prefill_s)
        for state in first.choices:
            self._extend(state.index, 0, state.emitted, state.finish_reason)
        if not all(choice.num_tokens for choice in self._choices):
            raise InternalError("a prefill worker left out a choice")

    def take(self, entry: wpb.TokenEntry) -> bool:
        """Take tokens that decode made. Returns whether they ended the choice and decode does not know it."""
        if not self.has_begun:  # where there is history, all tokens are decode's
            self._begin(self.opened_s, time.monotonic() - self._job.accepted_s - self.opened_s)
        now = time.monotonic()
        if entry.tokens:
            self._metrics.next_tokens(now - self._last_s, len(entry.tokens))
            if self._failed:
                self._failed = False
                self.stalled_s += now - self._last_s
                self._metrics.resumed(now - self._last_s)
        self._last_s = now
        return self._extend(entry.choice, entry.first_index, entry.tokens, entry.finish_reason)

    def _begin(self, queue_s: float, prefill_s: float) -> None:
        self.has_begun = True
        self.queue_s, self.prefill_s = queue_s, prefill_s
        self._first_s = self._last_s = time.monotonic()
        current_span.get().event("first_token", queue_s=queue_s, prefill_s=prefill_s)
        self._metrics.started(queue_s)
        self._metrics.first_token(self._first_s - self._job.accepted_s)

    def interrupted(self) -> None:
        """Those who made the tokens are gone, others will go on."""
        self._failed = self.has_begun

    def drain(self) -> list[pb.Chunk]:
        """Chunks that have not been handed out."""
        chunks, self._chunks = self._chunks, {}
        return list(chain.from_iterable(chunks.values()))

    @property
    def first_choice(self) -> Choice:
        return self._choices[0]

    def choices(self) -> list[pb.Choice]:
        return [choice.report() for choice in self._choices]

    def timing(self) -> pb.Timing:
        return pb.Timing(
            queue_s=self.queue_s,
            prefill_s=self.prefill_s,
            time_to_first_token_s=self._first_s - self._job.accepted_s,
            decode_s=self._last_s - self._first_s,
        )

    def _extend(self, index: int, first: int, tokens: Iterable[fpb.SampledToken], reason: str) -> bool:
        if index >= len(self._choices):
            raise InternalError("a worker reported a choice that was not asked for")
        choice = self._choices[index]
        if choice.finish_reason:
            # what the worker made before it learned that a stop string had ended the choice
            return False
        chunk = choice.extend(first, tokens, reason)
        ready = self._chunks.setdefault(index, [])
        if not ready or len(ready[-1].token_ids) + len(chunk.token_ids) > MAX_CHUNK_TOKENS:
            ready.append(chunk)
        else:
            merged = ready[-1]
            merged.text += chunk.text
            merged.token_ids.extend(chunk.token_ids)
            merged.logprobs.extend(chunk.logprobs)
            merged.finish_reason = chunk.finish_reason
        return bool(choice.finish_reason) and not reason
