"""Bounds of requests, and what becomes of them when something fails."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .base import MIB, Positive, Seconds, Settings


class RequestSettings(Settings):
    """Queues, messages, deadlines, retries."""

    max_queue: int = Field(64, ge=0, le=2**20, description="requests that may wait for room")
    max_message_bytes: int = Field(16 * MIB, ge=64 * 1024, le=512 * MIB, description="largest message of a client")
    max_frame_bytes: int = Field(16 * MIB, ge=9 * MIB, le=512 * MIB, description="largest message between workers")
    default_deadline_s: Seconds = Field(600.0, description="deadline of requests that bring none")
    worker_wait_s: Seconds = Field(30.0, description="how long a request waits for a worker to (re)appear")
    worker_lease_s: Seconds = Field(10.0, description="a worker that gives no sign of life for so long is lost")
    max_migrations: int = Field(
        3, ge=0, le=64, description="how often other workers may go on with a request whose workers are lost"
    )
    retries_per_minute: Positive = Field(1000, description="requests that other workers may go on with, in a minute")
    durability: Literal["none", "handoff", "tokens"] = Field(
        "none", description="what of a request that does not say so is kept in the store while it runs"
    )
    stream_credits: int = Field(64, ge=2, le=2**16, description="tokens a choice may run ahead of its client")
    handoff_window: int = Field(8, ge=1, le=1024, description="frames under way from prefill to decode, per request")
