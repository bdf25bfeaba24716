"""How a client reaches a service: its key, TLS, and the variables of the environment that stand in for both."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import grpc
import grpc.aio

from ..errors import ConfigError, InvalidRequest
from .rpc import with_metadata
from .tls import TlsFiles, channel_credentials

DEFAULT_ADDRESS = "127.0.0.1:8033"
VARIABLES = {name: f"KVSLUICE_{name.upper()}" for name in ("api_key", "tls", "tls_ca", "tls_cert", "tls_key")}
MAX_MESSAGE_BYTES = 64 * 1024 * 1024

_ADDRESS = re.compile(r"unix:.+|.*[^:]:(\d{1,5})", re.DOTALL)
_KEY = re.compile(r"[!-~]{1,512}")
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # the server says how much it takes
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
]


class Connecting(TypedDict, total=False):
    """Keyword arguments of `Client` and `AsyncClient`. What is not given is looked up in the environment.

    `api_key` is shown with every call (`KVSLUICE_API_KEY`). `tls` has the connection encrypted (`KVSLUICE_TLS=1`); so
    do `tls_ca`, a PEM file of the authorities that are trusted instead of the system's (`KVSLUICE_TLS_CA`), and
    `tls_cert` with `tls_key`, PEM files of the client's own certificate (`KVSLUICE_TLS_CERT`, `KVSLUICE_TLS_KEY`).
    """

    api_key: str | None
    tls: bool | None
    tls_ca: str | None
    tls_cert: str | None
    tls_key: str | None


def checked_address(address: str) -> str:
    """The address. Raises `InvalidRequest` where it has no port."""
    found = _ADDRESS.fullmatch(address)
    if found is None or not 0 < int(found.group(1) or 1) < 2**16:
        raise InvalidRequest("address", f"{address[:128]!r} has no port", f"host:port, such as {DEFAULT_ADDRESS}")
    return address


def open_channel(address: str, given: Connecting, is_async: bool) -> Any:
    """A channel of gRPC to a service.

    Raises:
        InvalidRequest: the address has no port, or the key is none.
        ConfigError: a file of TLS cannot be used.
    """
    filled = with_environment(given, os.environ)
    key, files = _checked_key(filled), _tls_files(filled)
    library = grpc.aio if is_async else grpc
    if files is None:
        channel = library.insecure_channel(checked_address(address), options=_OPTIONS)
    else:
        credentials, options = channel_credentials(files)
        channel = library.secure_channel(checked_address(address), credentials, options=[*_OPTIONS, *options])
    return with_metadata(channel, () if key is None else (("authorization", f"Bearer {key}"),))


def read_key(path: Path) -> str:
    """The key in a file, which holds nothing else. Raises `ConfigError`."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
        raise ConfigError(f"--api-key-file: cannot read {path}: {why}") from exc
    if not _KEY.fullmatch(text):
        raise ConfigError(f"--api-key-file: {path} does not hold one key; allowed: a file with nothing else in it")
    return text


def with_environment(given: Connecting, environ: Mapping[str, str]) -> dict[str, Any]:
    """What is given, and for what is not, what the environment says. Raises `ConfigError`."""
    filled: dict[str, Any] = dict(given)
    for name, variable in VARIABLES.items():
        if filled.get(name) is None:
            filled[name] = environ.get(variable) or None
    if isinstance(filled["tls"], str):
        text = filled["tls"].lower()
        if text not in _TRUE + _FALSE:
            raise ConfigError(f"{VARIABLES['tls']}: got {text[:16]!r}; allowed: 1, 0")
        filled["tls"] = text in _TRUE
    return filled


def _checked_key(filled: Mapping[str, Any]) -> str | None:
    key = filled["api_key"]
    if key is not None and (not isinstance(key, str) or not _KEY.fullmatch(key)):
        raise InvalidRequest("api_key", "is no key", "printable ASCII characters without spaces")
    return key


def _tls_files(filled: Mapping[str, Any]) -> TlsFiles | None:
    cert, key, ca = (
        filled[name] and str(Path(filled[name]).expanduser()) for name in ("tls_cert", "tls_key", "tls_ca")
    )
    if (cert is None) != (key is None):
        missing = "tls_cert" if cert is None else "tls_key"
        raise InvalidRequest(missing, "is missing", "certificate and key together")
    if cert is None and ca is None and not filled["tls"]:
        return None
    return TlsFiles(cert, key, ca, settings=("tls_cert", "tls_key", "tls_ca"))
