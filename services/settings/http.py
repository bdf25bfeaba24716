"""The door for clients of the OpenAI API."""

from __future__ import annotations

from pydantic import Field

from .base import MIB, Positive, Seconds, Settings


class HttpSettings(Settings):
    """Where HTTP is spoken, and what its connections may cost."""

    http: bool = Field(True, description="the OpenAI API over HTTP, beside gRPC")
    http_host: str | None = Field(
        None,
        min_length=1,
        max_length=253,
        pattern=r"^[0-9A-Za-z.:_%-]+$",
        description="address that it listens on; default: that of --host",
    )
    http_port: int = Field(8000, ge=0, le=65535, description="port that it listens on; 0 = any free one")
    http_max_connections: Positive = Field(4096, description="open HTTP connections; those above are refused")
    http_max_header_bytes: int = Field(64 * 1024, ge=1024, le=MIB, description="request line and headers together")
    http_read_timeout_s: Seconds = Field(
        30.0, description="how long a client may take to send a request's headers, and then its body"
    )
    http_keep_alive_s: Seconds = Field(60.0, description="how long an HTTP connection may stay open without a request")
