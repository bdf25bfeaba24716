"""What the processes tell of themselves: logs, metrics, traces, samples of quality."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .base import Settings


class TelemetrySettings(Settings):
    """Logs, metrics, traces, samples of quality."""

    log_level: Literal["debug", "info", "warning", "error"] = Field("warning", description="what is worth a log line")
    log_format: Literal["text", "json"] = Field("text", description="log lines for people, or one JSON object each")
    worker_metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="port on which each worker answers /metrics, at its own address; 0 = any free one; default: none",
    )
