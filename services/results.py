"""What a service answers, as Python values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its log-probability and, where asked for, its most likely alternatives."""

    token_id: int
    token: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Chunk:
    """What became final of one choice.

    Attributes:
        index: which of the n choices.
        text: may be empty while tokens could still become part of a stop string or of a character.
        finish_reason: `stop` or `length` on the choice's last chunk, else None.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str | None


@dataclass(frozen=True)
class Usage:
    """Token counts of a finished request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class RecipeReport:
    """What was done to the prompt's KV cache; sizes in bytes."""

    requested: str
    effective: str
    fingerprint: str
    fallback_reason: str
    handoff_bytes: int
    handoff_bf16_bytes: int
    resident_bytes: int
    bytes_read_per_step: int


@dataclass(frozen=True)
class Timing:
    """Where a request's time went, as the gateway saw it; seconds."""

    queue_s: float
    prefill_s: float
    time_to_first_token_s: float
    decode_s: float


@dataclass(frozen=True)
class DurabilityReport:
    """What became of a request's workers, and what was kept of it.

    Attributes:
        level: none, handoff or tokens.
        kept: the store held it until its end.
        stored_bytes: of it in the store, as the last worker left it.
        migrations: how often other workers went on with it.
        recomputed_tokens, recomputed_prompt_tokens: that were run more than once.
        stalled_s: between the last token before a migration and the first one behind it.
    """

    level: str
    kept: bool
    stored_bytes: int
    migrations: int
    recomputed_tokens: int
    recomputed_prompt_tokens: int
    stalled_s: float


@dataclass(frozen=True)
class SessionReport:
    """What a conversation has come to.

    Attributes:
        turn: this one, from 1.
        tokens: of all turns together, with their answers.
    """

    session_id: str
    turn: int
    tokens: int


@dataclass(frozen=True)
class SessionInfo:
    """A conversation that can be continued; times are seconds since 1970.

    Attributes:
        recipe: as it was asked for.
        expires_unix_s: when it is gone unless it is continued before.
        stored_bytes: what its cache takes up in the store.
    """

    session_id: str
    turns: int
    tokens: int
    recipe: str
    begun_unix_s: float
    used_unix_s: float
    expires_unix_s: float
    stored_bytes: int


@dataclass(frozen=True)
class Choice:
    """One finished choice.

    Attributes:
        stop_match: the stop string or the stop token's text that ended it, else empty.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str
    stop_match: str


@dataclass(frozen=True)
class Completion:
    """A finished request."""

    request_id: str
    choices: tuple[Choice, ...]
    usage: Usage
    recipe: RecipeReport
    timing: Timing
    durability: DurabilityReport
    session: SessionReport | None = None

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The token ids of the first choice."""
        return self.choices[0].token_ids


@dataclass(frozen=True)
class ModelInfo:
    """The served model."""

    model: str
    fingerprint: str
    max_model_len: int
    vocab_size: int
    recipes: tuple[str, ...]
    default_recipe: str
    version: str
