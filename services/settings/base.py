"""What all settings have in common."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

MIB = 1024 * 1024
TIB = 1024 * 1024 * MIB

Positive = Annotated[int, Field(ge=1, le=2**20)]
Seconds = Annotated[float, Field(gt=0, le=7 * 86400, allow_inf_nan=False)]


class Settings(BaseModel):
    """Settings of one topic. Frozen; an unknown key is an error; defaults are checked, too."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _finite(cls, value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("must be a finite number")
        return value
