"""Who may call what: one table for every door, and the guards that hold callers to it.

    gateway    bearer keys of a file (`keys.py`) ──> tenant and role
    workers    the fleet's token, or a certificate of the fleet

Default deny: a method that is not in `METHODS` is refused to everybody, whatever a server has registered.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from ..errors import ConfigError, PermissionDenied, Unauthenticated
from ..kvstore.identity import TenantId
from .settings.addresses import is_loopback
from .tls import TlsFiles

if TYPE_CHECKING:
    from .config import ServeConfig

MIN_TOKEN_CHARS, MAX_TOKEN_CHARS = 32, 512
MAX_TOKENS = 16
_TOKEN = re.compile(rf"[!-~]{{{MIN_TOKEN_CHARS},{MAX_TOKEN_CHARS}}}")
_SCHEME = "bearer "
_GIVEN = "Bearer KEY, which clients take as api_key, --api-key-file or KVSLUICE_API_KEY"


NO_TENANT = TenantId("")
"""Of everything, where there are no keys."""


class Role(StrEnum):
    """What a key, or a token, is for."""

    CLIENT = "client"  # requests and sessions of its tenant
    MONITOR = "monitor"  # metrics, and nothing else
    ADMIN = "admin"  # as a client, and the sessions of every tenant
    FLEET = "fleet"  # the system's own processes among each other


Access = Literal["public", "client", "monitor", "admin", "fleet"]

_ROLES: dict[Access, frozenset[Role]] = {
    "public": frozenset(Role),
    "client": frozenset({Role.CLIENT, Role.ADMIN}),
    "monitor": frozenset({Role.MONITOR, Role.ADMIN}),
    "admin": frozenset({Role.ADMIN}),
    "fleet": frozenset({Role.FLEET}),
}

_GENERATION = "/kvsluice.v1.Generation/"
_PREFILL, _DECODE = "/kvsluice.worker.v1.PrefillWorker/", "/kvsluice.worker.v1.DecodeWorker/"
_HEALTH, _REFLECTION = "/grpc.health.v1.Health/", "/grpc.reflection.v1alpha.ServerReflection/"

GENERATE = _GENERATION + "Generate"
CANCEL = _GENERATION + "Cancel"
GET_MODEL_INFO = _GENERATION + "GetModelInfo"
LIST_SESSIONS = _GENERATION + "ListSessions"
DELETE_SESSION = _GENERATION + "DeleteSession"
METRICS = "/kvsluice.http/Metrics"  # no method of gRPC's: what a scraper reads over HTTP

METHODS: dict[str, Access] = {
    GENERATE: "client",
    CANCEL: "client",
    GET_MODEL_INFO: "client",
    LIST_SESSIONS: "client",
    DELETE_SESSION: "client",
    METRICS: "monitor",
    _HEALTH + "Check": "public",
    _HEALTH + "List": "public",
    _HEALTH + "Watch": "public",
    _REFLECTION + "ServerReflectionInfo": "public",
    _PREFILL + "Prefill": "fleet",
    _PREFILL + "Info": "fleet",
    _DECODE + "Attach": "fleet",
    _DECODE + "PutFrames": "fleet",
    _DECODE + "Info": "fleet",
}
"""Every method of every door, by its full name, and who may call it."""


@dataclass(frozen=True)
class Caller:
    """Who calls.

    Attributes:
        tenant: whose requests, sessions and stored values these are; nothing of one tenant is found by another.
    """

    role: Role
    tenant: TenantId = NO_TENANT


NOBODY = Caller(Role.ADMIN)
"""Whoever calls a service without keys: it has one tenant, and everybody may do all of it."""

current_caller: ContextVar[Caller] = ContextVar("current_caller", default=NOBODY)
"""Set by a door before a handler runs."""


class Guard(Protocol):
    """Decides over the calls of one server."""

    def authorize(self, method: str, authorization: str | None) -> Caller:
        """Who calls.

        Args:
            method: its full name, as in `METHODS`.
            authorization: the metadata entry or header of that name.

        Raises:
            Unauthenticated: it is not known who calls. PermissionDenied: that one may not.
        """
        ...


def access_of(method: str) -> Access:
    """Who may call a method. Raises `PermissionDenied` where it is not in the table."""
    access = METHODS.get(method)
    if access is None:
        raise PermissionDenied("this method is not open to anybody")
    return access


def check_role(caller: Caller, method: str) -> Caller:
    """The caller, who may call the method. Raises `PermissionDenied` otherwise."""
    if caller.role not in _ROLES[access_of(method)]:
        raise PermissionDenied(f"a key with the role {caller.role} may not call {method.rpartition('/')[2]}")
    return caller


def bearer(authorization: str | None) -> str:
    """The key in an `authorization` entry. Raises `Unauthenticated` where there is none."""
    if authorization is None:
        raise Unauthenticated(f"authorization: is missing; allowed: {_GIVEN}")
    if authorization[: len(_SCHEME)].lower() != _SCHEME or not authorization[len(_SCHEME) :].strip():
        raise Unauthenticated("authorization: is no bearer key; allowed: Bearer KEY")
    return authorization[len(_SCHEME) :].strip()


class OpenGuard:
    """Of a gateway without keys: everybody may do what its doors offer."""

    def authorize(self, method: str, authorization: str | None) -> Caller:
        """See `Guard`."""
        return check_role(NOBODY, method)


class FleetGuard:
    """Of a worker: lets in who shows one of the fleet's tokens.

    Args:
        tokens: those that are let in. Without any, whoever has come so far is: `rpc.WorkerSecurity` allows that on
            loopback, and where connections prove themselves by a certificate.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        self._tokens = tuple(token.encode() for token in tokens)

    def authorize(self, method: str, authorization: str | None) -> Caller:
        """See `Guard`."""
        caller = Caller(Role.FLEET)
        if access_of(method) != "public" and self._tokens:
            shown = bearer(authorization).encode()
            # every token is compared: how long that takes says nothing of which one is nearly right
            if not sum(hmac.compare_digest(shown, token) for token in self._tokens):
                raise Unauthenticated("the fleet's token is wrong")
        return check_role(caller, method)


@dataclass(frozen=True)
class FleetSecurity:
    """How the processes of a fleet know each other.

    Attributes:
        tokens: the first one is shown, each of them is let in.
        tls: of both ends of every connection: each shows its certificate. None = plaintext.
    """

    tokens: tuple[str, ...] = field(default=(), repr=False)
    tls: TlsFiles | None = None

    @classmethod
    def of(cls, config: ServeConfig) -> FleetSecurity:
        """As a configuration says."""
        settings = tuple(f"fleet_tls_{name}_file" for name in ("cert", "key", "ca"))
        cert, key, ca = (getattr(config, name) for name in settings)
        tls = None if cert is None else TlsFiles(cert, key, ca, config.fleet_tls_name, settings)
        return cls(config.fleet_tokens, tls)

    @property
    def guard(self) -> FleetGuard:
        """Of a worker's port."""
        return FleetGuard(self.tokens)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries."""
        return (("authorization", f"Bearer {self.tokens[0]}"),) if self.tokens else ()

    def check_host(self, host: str) -> None:
        """Raises `ConfigError` where a worker that listens on `host` would let everybody in."""
        if not self.tokens and self.tls is None and not is_loopback(host):
            allowed = "a fleet token or fleet_tls_cert_file, or loopback"
            raise ConfigError(f"host: a worker on {host} would let everybody in; allowed: {allowed}")


def client_tls(config: ServeConfig) -> TlsFiles | None:
    """TLS of the doors for clients; None = plaintext."""
    if config.tls_cert_file is None:
        return None
    return TlsFiles(config.tls_cert_file, config.tls_key_file, config.tls_client_ca_file)


def read_fleet_tokens(path: str | None) -> tuple[str, ...]:
    """The tokens of a file, or a new one where there is no file.

    Raises:
        ConfigError: the file cannot be read, or holds no sound tokens.
    """
    if path is None:
        return (secrets.token_hex(32),)
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
        raise ConfigError(f"fleet_token_file: cannot read {path}: {why}") from exc
    tokens = tuple(line.strip() for line in lines if line.strip())
    if not 1 <= len(tokens) <= MAX_TOKENS or not all(_TOKEN.fullmatch(token) for token in tokens):
        allowed = f"1 to {MAX_TOKENS} lines of {MIN_TOKEN_CHARS} to {MAX_TOKEN_CHARS} printable ASCII characters"
        raise ConfigError(f"fleet_token_file: {path} holds no such tokens; allowed: {allowed}")
    return tokens


def with_fleet_tokens(config: ServeConfig) -> ServeConfig:
    """The configuration that the processes of a fleet get: with the tokens that they know each other by."""
    if config.fleet_tokens:
        return config
    return config.model_copy(update={"fleet_tokens": read_fleet_tokens(config.fleet_token_file)})


def check_door(config: ServeConfig, host: str, setting: str = "host") -> None:
    """Raises `ConfigError` where a door for clients on `host`, which `setting` says, would serve everybody who reaches
    it."""
    from .settings.security import check_settings

    check_settings(config, [] if is_loopback(host) else [setting])


def check_files(config: ServeConfig) -> None:
    """Read every file that the configuration names, so that a bad one stops the start. Raises `ConfigError`."""
    from .keys import KeysFile

    if config.api_keys_file is not None:
        KeysFile(config.api_keys_file)
    for tls in (client_tls(config), FleetSecurity.of(config).tls):
        if tls is not None:
            tls.check()
    if config.fleet_token_file is not None:
        read_fleet_tokens(config.fleet_token_file)
