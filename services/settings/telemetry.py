"""What the processes tell of themselves: logs, metrics, traces, samples of quality."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .base import Settings


class TelemetrySettings(Settings):
    """Logs, metrics, traces, samples of quality."""

    log_level: Literal["debug", "info", "warning", "error"] = Field("warning", description="what is worth a log line")
    log_format: Literal["text", "json"] = Field("text", description="log lines for people, or one JSON object each")
    otlp_endpoint: str | None = Field(
        None,
        max_length=2048,
        pattern=r"^https?://[^\s/@]+:\d{1,5}/?$",
        description="collector that traces go to by OTLP over gRPC, such as http://127.0.0.1:4317; default: none",
    )
    trace_sample_rate: float = Field(
        1.0, ge=0, le=1, description="share of requests that are traced, of those whose client does not decide it"
    )
    quality_sample_rate: float = Field(
        0.0, ge=0, le=1, description="share of decode steps of which a row is redone with full attention, to compare"
    )
    worker_metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="port on which each worker answers /metrics, at its own address; 0 = any free one; default: none",
    )
