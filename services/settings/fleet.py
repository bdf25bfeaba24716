"""Which processes there are, and where the service listens."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .base import MIB, TIB, Seconds, Settings


class FleetSettings(Settings):
    """Addresses, workers and their life."""

    host: str = Field(
        "127.0.0.1",
        min_length=1,
        max_length=253,
        pattern=r"^[0-9A-Za-z.:_%-]+$",
        description="address that the gateway listens on",
    )
    port: int = Field(8033, ge=0, le=65535, description="port that the gateway listens on; 0 = any free one")
    worker_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="port that each worker listens on, where it has an address alone; 0 = any free one",
    )
    role: Literal["split", "both"] = Field("split", description="prefill and decode apart, or both in each worker")
    prefill_workers: int = Field(1, ge=1, le=64, description="processes that run prompts")
    decode_workers: int = Field(1, ge=1, le=64, description="processes that generate")

    grace_s: Seconds = Field(30.0, description="how long running requests may take to finish on shutdown")
    start_timeout_s: Seconds = Field(300.0, description="how long the workers may take to come up")
    object_store_bytes: int = Field(
        80 * MIB, ge=76 * MIB, le=TIB, description="Ray's object store; no KV goes through it"
    )
    dashboard: bool = Field(False, description="Ray's dashboard, on loopback")
