"""The keys of clients: a file that is read anew when it changes.

Either lines, each a key that is a tenant by itself, or, where the file's name ends in .yaml or .yml:

    keys:
      - {tenant: alice, sha256: 9f86d0…}               # SHA-256 of the key, as `kvsluice keys new` prints it
      - {tenant: prometheus, sha256: 60303a…, role: monitor}
    tenants:
      alice: {priority: high, weight: 2, tokens_per_s: 500, max_num_seqs: 8, stored_bytes: 2000000000}

In memory there are hashes only. What is compared is their HMAC under a secret of the process, so that the time which a
look-up takes says nothing of the keys.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, Thread
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import ConfigError, KvsluiceError, Unauthenticated
from ..kvstore.identity import TenantId
from .security import Caller, Role, access_of, bearer, check_role
from .telemetry import where

log = logging.getLogger("kvsluice.keys")

MIN_KEY_CHARS = 16
MAX_KEY_CHARS = 512
MAX_KEYS = 65536
MAX_FILE_BYTES = 16 * 1024 * 1024
LOOK_PERIOD_S = 1.0

_KEY = re.compile(rf"[!-~]{{{MIN_KEY_CHARS},{MAX_KEY_CHARS}}}")
TENANT = r"^[0-9A-Za-z._-]{1,64}$"

Tenant = Annotated[str, Field(pattern=TENANT)]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class TenantLimits(_Entry):
    """What a tenant may use. Absent numbers are not limited.

    Attributes:
        priority: requests of a higher class go first.
        weight: share of a tenant beside others of its class, when there is not enough for all.
        tokens_per_s: of prompts and answers, over time.
        max_num_seqs: choices that may run or wait together.
        stored_bytes: that its sessions may take up in the store.
    """

    priority: Literal["high", "normal", "low"] = "normal"
    weight: float = Field(default=1.0, gt=0, le=1000, allow_inf_nan=False)
    tokens_per_s: float | None = Field(default=None, gt=0, le=1e9, allow_inf_nan=False)
    max_num_seqs: int | None = Field(default=None, ge=1, le=2**20)
    stored_bytes: int | None = Field(default=None, ge=1, le=2**60)


UNLIMITED = TenantLimits()


def no_limits(tenant: TenantId) -> TenantLimits:
    """What a tenant may use where there are no keys."""
    return UNLIMITED


class _Key(_Entry):
    tenant: Tenant
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    role: Literal["client", "monitor", "admin"] = "client"


class _File(_Entry):
    keys: list[_Key] = Field(min_length=1, max_length=MAX_KEYS)
    tenants: dict[Tenant, TenantLimits] = Field(default_factory=dict)


@dataclass(frozen=True)
class Keys:
    """What a keys file says.

    Attributes:
        callers: by the SHA-256 of the key, 32 bytes.
        limits: by tenant; a tenant that is not named has none.
    """

    callers: Mapping[bytes, Caller]
    limits: Mapping[TenantId, TenantLimits] = field(default_factory=dict)


def digest(key: str) -> bytes:
    """SHA-256 of a key."""
    return hashlib.sha256(key.encode()).digest()


def new_key() -> str:
    """A key that nobody guesses: 256 random bits."""
    return "ks-" + secrets.token_urlsafe(32)


def parse_keys(text: str, is_yaml: bool, name: str) -> Keys:
    """The keys that a file's text gives.

    Args:
        name: of the file, for errors; they never hold what the file says.

    Raises:
        ConfigError: it is no such file.
    """
    return _parse_yaml(text, name) if is_yaml else _parse_lines(text, name)


def _parse_lines(text: str, name: str) -> Keys:
    callers = {}
    for number, line in enumerate(text.splitlines(), 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if not _KEY.fullmatch(key):
            allowed = (
                f"{MIN_KEY_CHARS} to {MAX_KEY_CHARS} printable ASCII characters without spaces; # begins a comment"
            )
            raise ConfigError(f"api_keys_file: {name}, line {number} is no key; allowed: {allowed}")
        hashed = digest(key)
        callers[hashed] = Caller(Role.CLIENT, TenantId(f"key-{hashed.hex()[:16]}"))
    if not 1 <= len(callers) <= MAX_KEYS:
        raise ConfigError(f"api_keys_file: {name} holds {len(callers)} keys; allowed: 1 to {MAX_KEYS}, one a line")
    return Keys(callers)


def _parse_yaml(text: str, name: str) -> Keys:
    try:
        parsed = _File.model_validate(yaml.safe_load(text))
    except Exception as exc:  # the library lets KeyError, AttributeError and others out, too
        if not isinstance(exc, ValidationError):
            raise ConfigError(f"api_keys_file: {name} is no YAML file") from None
        first = exc.errors(include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"] if not isinstance(part, str) or len(part) <= 64)
        raise ConfigError(f"api_keys_file: {name}: {place or 'keys'}: {first['msg']}") from None
    callers: dict[bytes, Caller] = {}
    for number, one in enumerate(parsed.keys):
        hashed = bytes.fromhex(one.sha256)
        if hashed in callers:
            raise ConfigError(f"api_keys_file: {name}: keys.{number}.sha256: stands there twice; allowed: once")
        callers[hashed] = Caller(Role(one.role), TenantId(one.tenant))
    known = {one.tenant for one in parsed.keys}
    for tenant in parsed.tenants:
        if tenant not in known:
            raise ConfigError(f"api_keys_file: {name}: tenants.{tenant}: has no key; allowed: tenants that keys name")
    return Keys(callers, {TenantId(tenant): limits for tenant, limits in parsed.tenants.items()})


def on_a_thread(job: Callable[[], None]) -> None:
    """Run a job beside what else the process does."""
    Thread(target=job, name="keys", daemon=True).start()


class KeysFile:
    """Lets in who shows a key of a file, which is looked at again when it has changed. A file that has become unusable
    changes nothing, and is said so once. For any thread.

    Args:
        path: of the file; its name says of which kind it is.
        clock: monotonic seconds.
        aside: runs what reads a changed file: with many keys that takes seconds, which an event loop has not.

    Raises:
        ConfigError: the file cannot be read, or is none.
    """

    def __init__(
        self,
        path: str,
        clock: Callable[[], float] = time.monotonic,
        aside: Callable[[Callable[[], None]], None] = on_a_thread,
    ) -> None:
        self._path, self._clock, self._aside = Path(path), clock, aside
        self._reading = Lock()
        self._secret = secrets.token_bytes(32)
        self._state = self._look()
        self._next_look_s = clock() + LOOK_PERIOD_S
        self._use(self._read())

    def authorize(self, method: str, authorization: str | None) -> Caller:
        """See `security.Guard`."""
        if access_of(method) == "public":
            return Caller(Role.CLIENT)
        self._reload()
        caller = self._callers.get(self._index(digest(bearer(authorization))))
        if caller is None:
            raise Unauthenticated("the key is not known")
        return check_role(caller, method)

    def limits(self, tenant: TenantId) -> TenantLimits:
        """What a tenant may use."""
        return self._limits.get(tenant, UNLIMITED)

    def _index(self, hashed: bytes) -> bytes:
        return hmac.digest(self._secret, hashed, "sha256")

    def _use(self, keys: Keys) -> None:
        self._callers = {self._index(hashed): caller for hashed, caller in keys.callers.items()}
        self._limits = keys.limits

    def _reload(self) -> None:
        now_s = self._clock()
        if now_s < self._next_look_s:
            return
        self._next_look_s = now_s + LOOK_PERIOD_S
        state = self._look()
        if state != self._state and self._reading.acquire(blocking=False):
            self._state = state
            self._aside(self._take_over)

    def _take_over(self) -> None:
        try:
            self._use(self._read())
            log.info("%s has changed: %d keys", self._path.name, len(self._callers))
        except KvsluiceError as exc:
            log.error("the keys stay as they were: %s", exc.message)
        except Exception as exc:
            log.error("the keys stay as they were: %s", where(exc))
        finally:
            self._reading.release()

    def _look(self) -> tuple[int, ...]:
        """What changes when the file does."""
        try:
            found = os.stat(self._path)
        except OSError:
            return ()
        return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev

    def _read(self) -> Keys:
        try:
            with self._path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
            text = data.decode()
        except OSError as exc:
            raise ConfigError(f"api_keys_file: cannot read {self._path}: {exc.strerror}") from exc
        except UnicodeDecodeError:
            raise ConfigError(f"api_keys_file: {self._path.name} is not UTF-8") from None
        if len(data) > MAX_FILE_BYTES:
            raise ConfigError(f"api_keys_file: {self._path.name} is too large; allowed: {MAX_FILE_BYTES} bytes")
        return parse_keys(text, self._path.suffix in (".yaml", ".yml"), self._path.name)
