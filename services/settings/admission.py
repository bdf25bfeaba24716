"""Who is sent away before there is any work, and what a tenant may use at once."""

from __future__ import annotations

from pydantic import Field

from .base import Seconds, Settings


class AdmissionSettings(Settings):
    """Waits and quotas; what each tenant may use stands in the file of keys."""

    max_ttft_s: Seconds | None = Field(
        None,
        description="requests whose first token is predicted to come later are refused at once; default: those whose "
        "deadline is before it",
    )
    tenant_burst_s: Seconds = Field(
        10.0, description="how many seconds' worth of its tokens a second a tenant may use at once"
    )
