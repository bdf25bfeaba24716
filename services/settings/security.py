"""Who may connect, and how connections are protected."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, field_validator

from ...errors import ConfigError
from .base import Settings

SECURITY_FILES = (
    "api_keys_file",
    "tls_cert_file",
    "tls_key_file",
    "tls_client_ca_file",
    "fleet_tls_cert_file",
    "fleet_tls_key_file",
    "fleet_tls_ca_file",
    "fleet_token_file",
)


def _file(description: str) -> str | None:
    return Field(None, min_length=1, max_length=4096, description=f"{description}; default: none")


class SecuritySettings(Settings):
    """Keys, certificates and the fleet's token; docs/security.md says how to set them up."""

    api_keys_file: str | None = _file("keys of clients, and what their tenants may use, read anew when it changes")
    allow_anonymous: bool = Field(False, description="serve clients without keys on other addresses than loopback, too")
    tls_cert_file: str | None = _file("PEM of the certificate that clients see")
    tls_key_file: str | None = _file("PEM of its key")
    tls_client_ca_file: str | None = _file("PEM of the authorities that clients need a certificate of")
    fleet_tls_cert_file: str | None = _file("PEM of the certificate that gateway and workers show each other")
    fleet_tls_key_file: str | None = _file("PEM of its key")
    fleet_tls_ca_file: str | None = _file("PEM of the authorities that such certificates have to be of")
    fleet_tls_name: str | None = Field(
        None,
        min_length=1,
        max_length=253,
        pattern=r"^[0-9A-Za-z.:_-]+$",
        description="name that workers' certificates have to hold; default: the address that is connected to",
    )
    fleet_token_file: str | None = _file(
        "tokens that gateway and workers know each other by, one a line, the first of which is shown; without a "
        "file one is made at each start"
    )
    # made or read once, and handed to workers; nothing from outside sets it
    fleet_tokens: tuple[str, ...] = Field((), repr=False, max_length=16, json_schema_extra={"internal": True})

    @field_validator(*SECURITY_FILES)
    @classmethod
    def _absolute_path(cls, value: str | None) -> str | None:
        """Workers run in another folder."""
        return None if value is None else str(Path(value).expanduser().absolute())


def check_settings(settings: SecuritySettings, exposed: Sequence[str]) -> None:
    """Refuse settings that contradict each other.

    Args:
        exposed: settings that put a door for clients on another address than loopback.

    Raises:
        ConfigError: names the setting.
    """
    if (settings.tls_cert_file is None) != (settings.tls_key_file is None):
        missing = "tls_cert_file" if settings.tls_cert_file is None else "tls_key_file"
        raise ConfigError(f"{missing}: missing; allowed: certificate and key together")
    if settings.tls_client_ca_file is not None and settings.tls_cert_file is None:
        raise ConfigError("tls_client_ca_file: connections are plaintext; allowed: with tls_cert_file and tls_key_file")
    fleet = {name: getattr(settings, f"fleet_tls_{name}_file") for name in ("cert", "key", "ca")}
    missing_files = [f"fleet_tls_{name}_file" for name, path in fleet.items() if path is None]
    if 0 < len(missing_files) < len(fleet):
        allowed = "certificate, key and authorities together"
        raise ConfigError(f"{missing_files[0]}: missing; allowed: {allowed}, as gateway and workers check each other")
    if settings.fleet_tls_name is not None and missing_files:
        raise ConfigError("fleet_tls_name: connections are plaintext; allowed: with the three fleet_tls_…_file")
    known = settings.api_keys_file is not None or settings.tls_client_ca_file is not None
    if exposed and not known and not settings.allow_anonymous:
        allowed = "api_keys_file, tls_client_ca_file, or allow_anonymous to serve everybody who reaches it"
        raise ConfigError(
            f"{exposed[0]}: others than this machine could call without a key; allowed: loopback, or {allowed}"
        )
