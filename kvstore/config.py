"""Which store a process uses and how it reaches it: `StoreConfig`, and the URL that says most of it.

    memory://?capacity=BYTES
    redis://[USER@]HOST[:PORT][/DB]              one server
    redis+cluster://[USER@]HOST:PORT[,HOST:PORT…]
    redis+sentinel://[USER@]HOST:PORT[,HOST:PORT…]/SERVICE[?db=DB]

`rediss` in place of `redis` speaks TLS. No password stands in the URL or in any other field: fields name the file or
the environment variable that holds it, so a configuration may be printed, logged and sent to workers.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from urllib.parse import parse_qsl, unquote

from ..errors import ConfigError

MIB = 1024 * 1024
DEFAULT_CAPACITY_BYTES = 1024 * MIB
MAX_HOSTS = 64
MAX_SECRET_BYTES = 4096
URL_FORMS = (
    "memory://?capacity=BYTES, redis://[USER@]HOST[:PORT][/DB], redis+cluster://[USER@]HOST:PORT,…, "
    "redis+sentinel://[USER@]HOST:PORT,…/SERVICE[?db=DB]; rediss… for TLS; no password"
)

_URL = re.compile(r"([a-z+]+)://([^/?#\s]*)(?:/([^?#\s]*))?(?:\?([^#\s]*))?", re.ASCII)
_HOST = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[0-9A-Za-z._-]{1,253})(?::([0-9]{1,5}))?", re.ASCII)
_SERVICE = re.compile(r"[0-9A-Za-z._-]{1,128}", re.ASCII)


class Topology(Enum):
    """How the servers behind a URL belong together."""

    MEMORY = "memory"
    SINGLE = "redis"
    CLUSTER = "redis+cluster"
    SENTINEL = "redis+sentinel"


@dataclass(frozen=True, kw_only=True)
class StoreAddress:
    """What a store's URL says.

    Attributes:
        topology: of the servers.
        tls: whether every connection is encrypted.
        hosts: host and port of the server, or of those that know the others; empty for memory.
        username: ACL user; None = the default user.
        db: number of the database.
        service: what the sentinels call the master; empty where there are none.
        capacity_bytes: of a memory store.
    """

    topology: Topology
    tls: bool = False
    hosts: tuple[tuple[str, int], ...] = ()
    username: str | None = None
    db: int = 0
    service: str = ""
    capacity_bytes: int = DEFAULT_CAPACITY_BYTES


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """Everything that `open_store` is told. Errors name a field as `kvsluice serve` does, with `store_` before it.

    Attributes:
        url: see the module's docstring.
        password_file: holds the password; read anew for every connection, so a new password needs no restart.
        password_env: environment variable that holds it instead.
        sentinel_password_file: holds the password of the sentinels, where they want one.
        ca_file: PEM with the authorities that are trusted, and no others; None = the system's.
        cert_file, key_file: PEM of the client's own certificate, where the server wants one.
        connect_timeout_s: connecting and logging in.
        operation_timeout_s: one attempt of an operation after that; must cover the longest value on the slowest link.
        total_timeout_s: a whole operation, with waiting for its turn and all attempts.
        max_attempts: of an operation.
        max_operations: in flight; also the most connections to one server.
        max_bytes_in_flight: of the values that those operations move.
        max_value_bytes: longest value.
        breaker_failures: attempts in a row without an answer until operations fail at once.
        breaker_pause_s: until one operation tries again then.
    """

    url: str
    password_file: str | None = None
    password_env: str | None = None
    sentinel_password_file: str | None = None
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    connect_timeout_s: float = 2.0
    operation_timeout_s: float = 2.0
    total_timeout_s: float = 6.0
    max_attempts: int = 4
    max_operations: int = 16
    max_bytes_in_flight: int = 64 * MIB
    max_value_bytes: int = 5 * MIB
    breaker_failures: int = 5
    breaker_pause_s: float = 1.0

    def __post_init__(self) -> None:
        address = parse_url(self.url)
        self._check_tls(address)
        if self.password_file and self.password_env:
            raise ConfigError("store_password_env: a password file is given as well; allowed: one of the two")
        wants_password = self.password_file or self.password_env
        if address.topology is Topology.MEMORY and wants_password:
            raise ConfigError("store_password_file: a memory store has none; allowed: only with a redis URL")
        if address.username and not wants_password:
            raise ConfigError("store_password_file: missing; allowed: a file, where store_url names a user")
        if self.sentinel_password_file and address.topology is not Topology.SENTINEL:
            raise ConfigError("store_sentinel_password_file: no sentinels; allowed: only with redis+sentinel://")
        for name in ("connect_timeout_s", "operation_timeout_s", "total_timeout_s", "breaker_pause_s"):
            if not 0 < getattr(self, name) <= 3600:
                raise ConfigError(f"store_{name}: not above 0 and at most 3600; allowed: seconds in that range")
        for name in ("max_attempts", "max_operations", "max_value_bytes", "breaker_failures"):
            if getattr(self, name) < 1:
                raise ConfigError(f"store_{name}: below 1; allowed: 1 or more")
        if self.total_timeout_s < self.operation_timeout_s:
            raise ConfigError("store_total_timeout_s: shorter than one attempt; allowed: store_operation_timeout_s on")
        if self.max_bytes_in_flight < self.max_value_bytes:
            raise ConfigError("store_max_bytes_in_flight: no room for one value; allowed: store_max_value_bytes on")

    @property
    def address(self) -> StoreAddress:
        """What the URL says."""
        return parse_url(self.url)

    def _check_tls(self, address: StoreAddress) -> None:
        """Refuse settings of TLS that a plaintext connection would silently ignore."""
        for name in ("ca_file", "cert_file", "key_file"):
            if getattr(self, name) and not address.tls:
                raise ConfigError(f"store_{name}: the connection is plaintext; allowed: only with rediss… in store_url")
        if bool(self.cert_file) != bool(self.key_file):
            missing = "key" if self.cert_file else "cert"
            raise ConfigError(f"store_{missing}_file: missing; allowed: certificate and key together")


def parse_url(url: str) -> StoreAddress:
    """What a store's URL says.

    Raises:
        ConfigError: for `store_url`; repeats nothing of a URL, which may hold a password that does not belong there.
    """
    match = _URL.fullmatch(url)
    scheme = match[1] if match else ""
    tls = scheme.startswith("rediss")
    plain = scheme.replace("rediss", "redis", 1) if tls else scheme
    kinds = {kind.value: kind for kind in Topology}
    if match is None or plain not in kinds:
        raise _wrong_url("not a store's URL")
    kind, place, path = kinds[plain], match[2], match[3] or ""
    query = dict(parse_qsl(match[4] or "", keep_blank_values=True))
    known = {Topology.MEMORY: {"capacity"}, Topology.SENTINEL: {"db"}}.get(kind, set())
    if set(query) - known:
        raise _wrong_url("a parameter that is not known")
    if kind is Topology.MEMORY:
        if place or path:
            raise _wrong_url("a memory store has no host and no path")
        capacity = _number(query.get("capacity", str(DEFAULT_CAPACITY_BYTES)), 1, 1 << 50, "capacity")
        return StoreAddress(topology=kind, capacity_bytes=capacity)
    username, hosts = _place(place, kind)
    service, db = "", 0
    if kind is Topology.SENTINEL:
        if not _SERVICE.fullmatch(path):
            raise _wrong_url("the sentinels' name of the master is missing or odd")
        service, db = path, _number(query.get("db", "0"), 0, 2**16, "database")
    elif kind is Topology.SINGLE:
        db = _number(path or "0", 0, 2**16, "database")
    elif path:
        raise _wrong_url("a cluster has no databases")
    return StoreAddress(topology=kind, tls=tls, hosts=hosts, username=username, db=db, service=service)


def _place(place: str, kind: Topology) -> tuple[str | None, tuple[tuple[str, int], ...]]:
    """User, hosts and ports of what stands between `//` and the path."""
    user, at, rest = place.rpartition("@")
    if ":" in user or "@" in user:
        raise _wrong_url("a password stands in it, which belongs into a file")
    if at and not user:
        raise _wrong_url("an empty user")
    default_port = 26379 if kind is Topology.SENTINEL else 6379
    hosts = []
    for part in rest.split(","):
        match = _HOST.fullmatch(part)
        if match is None:
            raise _wrong_url("a host or port that is none")
        hosts.append((match[1].strip("[]"), _number(match[2] or str(default_port), 1, 65535, "port")))
    if len(hosts) > (1 if kind is Topology.SINGLE else MAX_HOSTS):
        raise _wrong_url("too many hosts")
    return unquote(user) or None, tuple(hosts)


def _number(text: str, low: int, high: int, name: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text, re.ASCII) or not low <= int(text) <= high:
        raise _wrong_url(f"a {name} that is not a number from {low} to {high}")
    return int(text)


def _wrong_url(problem: str) -> ConfigError:
    return ConfigError(f"store_url: {problem}; allowed: {URL_FORMS}")


def read_secret(field: str, path: str | None, variable: str | None = None) -> str | None:
    """The secret in a file or environment variable, without the line's end; None where neither is named.

    Raises:
        ConfigError: it cannot be read, is empty or too long. The message does not hold it.
    """
    if path is not None:
        try:
            with Path(path).open("rb") as file:
                raw = file.read(MAX_SECRET_BYTES + 1)
        except OSError as exc:
            raise ConfigError(f"{field}: cannot be read ({exc.strerror}); allowed: a readable file") from exc
        if len(raw) > MAX_SECRET_BYTES:
            raise ConfigError(f"{field}: too long; allowed: a file of at most {MAX_SECRET_BYTES} bytes")
        try:
            secret = raw.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            # without its cause, which shows the bytes
            raise ConfigError(f"{field}: no text; allowed: a file in UTF-8") from None
    elif variable is not None:
        secret = os.environ.get(variable, "")
    else:
        return None
    if not secret:
        raise ConfigError(f"{field}: holds nothing; allowed: one that holds the password")
    return secret
