"""The one frozen configuration object of a process: YAML file < environment (KVSLUICE_*) < flags."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError, model_validator

from ..errors import ConfigError
from ..kvstore.config import Topology
from .settings.addresses import is_loopback
from .settings.admission import AdmissionSettings
from .settings.base import MIB
from .settings.engine import EngineSettings
from .settings.fleet import FleetSettings
from .settings.http import HttpSettings
from .settings.requests import RequestSettings
from .settings.security import SecuritySettings, check_settings
from .settings.store import STORE_FILES, StoreSettings
from .settings.telemetry import TelemetrySettings

ENV_PREFIX = "KVSLUICE_"
# behind the prefix; what clients read from the environment, and a service does not
CLIENT_VARIABLES = ("api_key", "tls", "tls_ca", "tls_cert", "tls_key")


class ServeConfig(
    SecuritySettings,
    FleetSettings,
    HttpSettings,
    TelemetrySettings,
    StoreSettings,
    AdmissionSettings,
    RequestSettings,
    EngineSettings,
):
    """Everything that a process of the service is told. Workers get it serialized, never from their own environment.

    Lengths are in tokens, sizes in bytes, times in seconds. `--help` lists the topics from the last base to the first.
    """

    @model_validator(mode="after")
    def _roles_have_own_ranks(self) -> ServeConfig:
        if self.role == "both" and max(self.ranks_of("prefill"), self.ranks_of("decode")) > 1:
            raise ConfigError(
                "tensor_parallel_size: workers of both roles hold a model alone; allowed: 1, or role split"
            )
        return self

    @model_validator(mode="after")
    def _prefixes_have_all_heads(self) -> ServeConfig:
        ranks = self.ranks_of("prefill")
        if self.prefix_cache_bytes and ranks > 1:
            raise ConfigError(
                f"prefix_cache_bytes: got {self.prefix_cache_bytes}, and {ranks} processes hold the model of a prefill "
                "worker together; allowed: 0, or prefill_tensor_parallel_size 1"
            )
        return self

    def processes_of(self, role: str) -> int:
        """Processes on a machine that compute for workers of a role, as far as this configuration knows."""
        workers = self.prefill_workers if role == "prefill" else self.decode_workers
        return workers * self.ranks_of(role)

    @model_validator(mode="after")
    def _store_fits(self) -> ServeConfig:
        store = self.store
        if store is not None and store.address.topology is Topology.MEMORY:
            raise ConfigError("store_url: a memory store ends with its worker; allowed: redis…, rediss…")
        if store is None and self.durability != "none":
            raise ConfigError(f"durability: {self.durability} needs a store; allowed: none, or give store_url as well")
        for name in (*STORE_FILES, "store_password_env"):
            if store is None and getattr(self, name) is not None:
                raise ConfigError(f"{name}: there is no store; allowed: only with store_url")
        return self

    @model_validator(mode="after")
    def _security_fits(self) -> ServeConfig:
        hosts = {"host": self.host, "http_host": self.http_host if self.http else None}
        check_settings(self, [name for name, host in hosts.items() if host is not None and not is_loopback(host)])
        return self

    @property
    def model_name(self) -> str:
        """The name that clients use."""
        return self.served_model_name or self.model

    def to_json(self) -> str:
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> ServeConfig:
        return cls.model_validate_json(text)


def config_keys() -> list[str]:
    """The keys that a file, the environment or flags may give, in the order of `--help`."""
    internal = {"internal": True}
    return [name for name, field in ServeConfig.model_fields.items() if field.json_schema_extra != internal]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"config: cannot read {path}: {exc.strerror}") from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise ConfigError(f"config: {path} is not a YAML file") from exc
    if raw is None:
        return {}
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise ConfigError(f"config: {path} is not a YAML mapping from keys to values, such as `port: 8033`")
    return {key.replace("-", "_"): value for key, value in raw.items()}


def _check_keys(source: str, values: Mapping[str, Any], spelled: Mapping[str, str]) -> None:
    known_keys = config_keys()
    for key in values:
        if key not in known_keys:
            known = ", ".join(sorted(known_keys))
            raise ConfigError(f"{spelled.get(key, key)}: unknown key in {source}; known: {known}")


def metavar(key: str) -> str | None:
    """What `--help` calls a key's value; None where it is a switch."""
    annotation: Any = ServeConfig.model_fields[key].annotation
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)] or [annotation]
    if annotation is bool:
        return None
    if get_origin(annotation) is Literal:
        return "|".join(kinds)
    if key.endswith("_bytes"):
        return "BYTES"
    if key.endswith("_s"):
        return "SECONDS"
    return "TEXT" if str in kinds else "INTEGER"


def shown_default(key: str) -> str:
    """How a key's description in `--help` goes on; keys without a value by default say in words what holds then."""
    default = ServeConfig.model_fields[key].default
    if default is None:
        return ""
    if isinstance(default, bool):
        return f"; default: {'on' if default else 'off'}"
    if key.endswith("_bytes"):
        return f"; default: {default} = {default // MIB} MiB"
    return f"; default: {default:g}" if isinstance(default, float) else f"; default: {default}"


def load_config(
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    file: str | Path | None = None,
) -> ServeConfig:
    """Build a process's configuration.

    Args:
        flags: keys given on the command line; `None` values count as not given.
        environ: the environment; every `KVSLUICE_` variable must name a key. `KVSLUICE_CONFIG` names the YAML file.
        file: the YAML file; wins over `KVSLUICE_CONFIG`.

    Raises:
        ConfigError: names the key that is unknown or whose value is not allowed.
    """
    env = {k.removeprefix(ENV_PREFIX).lower(): v for k, v in (environ or {}).items() if k.startswith(ENV_PREFIX)}
    path = file or env.pop("config", None)
    for name in ("config", *CLIENT_VARIABLES):
        env.pop(name, None)
    from_file = _read_yaml(Path(path)) if path else {}
    given = {k: v for k, v in (flags or {}).items() if v is not None}
    _check_keys("the YAML file", from_file, {})
    _check_keys("the environment", env, {key: ENV_PREFIX + key.upper() for key in env})
    _check_keys("the flags", given, {})
    try:
        return ServeConfig.model_validate(from_file | env | given)
    except ValidationError as exc:
        first = exc.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else "config"
        source = "flag" if key in given else f"environment {ENV_PREFIX}{key.upper()}" if key in env else "YAML file"
        raise ConfigError(f"{key}: {first['msg']} (from the {source}, got {str(first['input'])[:64]!r})") from exc
