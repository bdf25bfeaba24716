"""Where requests and sessions are kept."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from ...kvstore.config import StoreConfig
from .base import MIB, TIB, Positive, Seconds, Settings

STORE_FILES = (
    "store_password_file",
    "store_sentinel_password_file",
    "store_ca_file",
    "store_cert_file",
    "store_key_file",
)


class StoreSettings(Settings):
    """The store, its secrets and its limits."""

    store_url: str | None = Field(
        None,
        max_length=8192,
        description="where requests are kept, as docs/store.md says, such as redis://HOST:6379; default: none",
    )
    store_password_file: str | None = Field(
        None, max_length=4096, description="file with the store's password; default: none"
    )
    store_password_env: str | None = Field(
        None, max_length=256, description="environment variable that holds it instead; default: none"
    )
    store_sentinel_password_file: str | None = Field(
        None, max_length=4096, description="file with the sentinels' password; default: none"
    )
    store_ca_file: str | None = Field(
        None, max_length=4096, description="PEM of the authorities that are trusted; default: the system's"
    )
    store_cert_file: str | None = Field(
        None, max_length=4096, description="PEM of the client's own certificate; default: none"
    )
    store_key_file: str | None = Field(None, max_length=4096, description="PEM of its key; default: none")
    store_operation_timeout_s: Seconds = Field(2.0, description="one attempt of an operation of the store")
    store_total_timeout_s: Seconds = Field(6.0, description="an operation of the store with all attempts")
    store_max_operations: Positive = Field(16, description="operations of a worker's store at once")
    store_max_bytes_in_flight: int = Field(
        64 * MIB, ge=8 * MIB, le=TIB, description="bytes that those operations move together"
    )
    store_cache_bytes: int = Field(
        256 * MIB,
        ge=0,
        le=64 * TIB,
        description="host memory of each decode worker for what it last wrote to the store or read there; 0 = none",
    )
    store_offloading_bytes: int = Field(
        4096 * MIB,
        ge=0,
        le=64 * TIB,
        description="what parked requests of each decode worker may take of the store, once kv_offloading_bytes is "
        "nearly full; 0 = nothing",
    )
    session_cache_bytes: int = Field(
        1024 * MIB,
        ge=0,
        le=64 * TIB,
        description="what caches of sessions may take on their decode worker between two turns, of memory that nobody "
        "else needs; 0 = nothing",
    )
    store_ttl_s: Seconds = Field(
        900.0, description="how long what a lost worker has kept lives; renewed while a request runs"
    )
    session_ttl_s: Seconds = Field(86400.0, description="how long a session lives in the store without a turn")
    store_keep_every: int = Field(
        16, ge=1, le=4096, description="generated rows of a choice that are written to the store together"
    )

    @field_validator(*STORE_FILES)
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        """Workers run in another folder."""
        return None if value is None else str(Path(value).expanduser().absolute())

    @property
    def store(self) -> StoreConfig | None:
        """How the store is reached. Raises `ConfigError`."""
        if self.store_url is None:
            return None
        return StoreConfig(
            url=self.store_url,
            password_file=self.store_password_file,
            password_env=self.store_password_env,
            sentinel_password_file=self.store_sentinel_password_file,
            ca_file=self.store_ca_file,
            cert_file=self.store_cert_file,
            key_file=self.store_key_file,
            operation_timeout_s=self.store_operation_timeout_s,
            total_timeout_s=self.store_total_timeout_s,
            max_operations=self.store_max_operations,
            max_bytes_in_flight=self.store_max_bytes_in_flight,
        )
