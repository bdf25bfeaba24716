"""The one frozen configuration object of a process: YAML file < environment (KVSLUICE_*) < flags."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import ConfigError
from ..kvstore.config import StoreConfig, Topology

ENV_PREFIX = "KVSLUICE_"
MIB = 1024 * 1024

TIB = 1024 * 1024 * MIB

STORE_FILES = (
    "store_password_file",
    "store_sentinel_password_file",
    "store_ca_file",
    "store_cert_file",
    "store_key_file",
)

Positive = Annotated[int, Field(ge=1, le=2**20)]
Seconds = Annotated[float, Field(gt=0, le=7 * 86400, allow_inf_nan=False)]


class ServeConfig(BaseModel):
    """Everything that a process of the service is told. Workers get it serialized, never from their own environment.

    Lengths are in tokens, sizes in bytes, times in seconds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), validate_default=True)

    model: str = Field(
        "smollm2-135m-longctx", min_length=1, max_length=4096, description="built-in name, Hugging Face folder or GGUF"
    )
    served_model_name: str | None = Field(
        None, min_length=1, max_length=256, description="name that clients use; default: that of --model"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="compute dtype; auto = fp32 on a CPU, bf16 on a GPU"
    )
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d{1,3})?)$", description="cpu, cuda or cuda:N")
    random_weights: bool = Field(False, description="random weights of the model's shape")
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="seed of random weights and of requests that bring none; default: drawn anew"
    )
    max_model_len: int | None = Field(
        None, ge=8, le=2**24, description="tokens of prompt and answer together; default: the model's own"
    )
    max_new_tokens: Positive = Field(4096, description="answer length when a request names none, at most")
    max_num_seqs: Positive = Field(32, description="choices that a decode worker runs together")
    kv_cache_bytes: int = Field(1024 * MIB, ge=MIB, le=64 * TIB, description="KV cache of each decode worker")
    kv_offloading_bytes: int = Field(
        0, ge=0, le=64 * TIB, description="host memory of each decode worker, for values and parked requests; 0 = none"
    )
    kv_time_slice_steps: int = Field(
        128,
        ge=0,
        le=2**20,
        description="decode steps after which a request makes room for one that waits, in the host memory that "
        "kv_offloading_bytes gives; 0 = never",
    )
    chunk_tokens: int | None = Field(
        None, ge=16, le=65536, description="rows of one prefill work item; default: 512 on a CPU, 2048 on a GPU"
    )
    default_recipe: str = Field(
        "balanced", min_length=1, max_length=64, description="recipe of requests that name none"
    )
    torch_threads: int | None = Field(
        None, ge=1, le=1024, description="threads of each worker's torch; default: cores / workers"
    )

    host: str = Field(
        "127.0.0.1",
        min_length=1,
        max_length=253,
        pattern=r"^[0-9A-Za-z.:_%-]+$",
        description="address that the gateway listens on",
    )
    port: int = Field(8033, ge=0, le=65535, description="port that the gateway listens on; 0 = any free one")
    role: Literal["split", "both"] = Field("split", description="prefill and decode apart, or both in each worker")
    prefill_workers: int = Field(1, ge=1, le=64, description="processes that run prompts")
    decode_workers: int = Field(1, ge=1, le=64, description="processes that generate")

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
    grace_s: Seconds = Field(30.0, description="how long running requests may take to finish on shutdown")
    start_timeout_s: Seconds = Field(300.0, description="how long the workers may take to come up")
    object_store_bytes: int = Field(
        80 * MIB, ge=76 * MIB, le=TIB, description="Ray's object store; no KV goes through it"
    )

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
    store_ttl_s: Seconds = Field(
        900.0, description="how long what a lost worker has kept lives; renewed while a request runs"
    )
    session_ttl_s: Seconds = Field(86400.0, description="how long a session lives in the store without a turn")
    store_keep_every: int = Field(
        16, ge=1, le=4096, description="generated rows of a choice that are written to the store together"
    )

    dashboard: bool = Field(False, description="Ray's dashboard, on loopback")
    log_level: Literal["debug", "info", "warning", "error"] = Field("warning", description="what is worth a log line")

    @field_validator("*", mode="before")
    @classmethod
    def _finite(cls, value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("must be a finite number")
        return value

    @field_validator("kv_offloading_bytes")
    @classmethod
    def _a_page(cls, value: int) -> int:
        if 0 < value < MIB:
            raise ValueError(f"must be 0, or at least {MIB}, one page")
        return value

    @field_validator(*STORE_FILES)
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        """Workers run in another folder."""
        return None if value is None else str(Path(value).expanduser().absolute())

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

    @property
    def model_name(self) -> str:
        """The name that clients use."""
        return self.served_model_name or self.model

    def to_json(self) -> str:
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> ServeConfig:
        return cls.model_validate_json(text)


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
    for key in values:
        if key not in ServeConfig.model_fields:
            known = ", ".join(sorted(ServeConfig.model_fields))
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
    env.pop("config", None)
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
