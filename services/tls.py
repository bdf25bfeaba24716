"""TLS of gRPC's servers and channels, from PEM files. A server reads its files anew when they change."""

from __future__ import annotations

import os
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from ..errors import ConfigError


@dataclass(frozen=True)
class TlsFiles:
    """One end of a TLS connection.

    Attributes:
        cert, key: PEM files of its own certificate and key; None = it shows none.
        ca: PEM file of the authorities whose certificates it takes. None = a server takes callers without one; a
            channel trusts the system's.
        name: what the server's certificate has to hold; None = the address that is connected to.
        settings: what errors call `cert`, `key` and `ca`.
    """

    cert: str | None
    key: str | None
    ca: str | None
    name: str | None = None
    settings: Sequence[str] = ("tls_cert_file", "tls_key_file", "tls_client_ca_file")

    def check(self) -> None:
        """Raises `ConfigError`, which names the setting, where gRPC could not use the files: it would not say so."""
        for path, setting in zip((self.cert, self.key, self.ca), self.settings, strict=True):
            if path is not None:
                _read(path, setting)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        cert, key, ca = self.settings
        if self.cert is not None:
            try:
                # a key that wants a password would ask for it on the terminal
                context.load_cert_chain(self.cert, self.key, password=lambda: "")
            except (ssl.SSLError, ValueError) as exc:
                allowed = f"a PEM certificate with its unencrypted key in {key}"
                raise ConfigError(f"{cert}: cannot be used; allowed: {allowed}") from exc
        if self.ca is not None:
            try:
                context.load_verify_locations(self.ca)
            except ssl.SSLError as exc:
                raise ConfigError(f"{ca}: cannot be used; allowed: a PEM file with certificates") from exc


def server_credentials(files: TlsFiles) -> Any:
    """Credentials of a server that asks callers for certificates where `files` names authorities.

    Raises:
        ConfigError: the files cannot be used.
    """
    source = _ServerFiles(files)
    return grpc.dynamic_ssl_server_credentials(source.read(), source.read_if_changed, files.ca is not None)


def channel_credentials(files: TlsFiles) -> tuple[Any, list[tuple[str, str]]]:
    """Credentials of a channel, from the files as they are now, and the options that go with them.

    Raises:
        ConfigError: the files cannot be used.
    """
    files.check()
    cert, key, ca = (
        None if path is None else _read(path, setting)
        for path, setting in zip((files.cert, files.key, files.ca), files.settings, strict=True)
    )
    options = [] if files.name is None else [("grpc.ssl_target_name_override", files.name)]
    return grpc.ssl_channel_credentials(ca, key, cert), options


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """What servers other than gRPC's take. Handshakes look at the files anew, as gRPC's do.

    Raises:
        ConfigError: the files cannot be used.
    """
    files.check()
    first, source, latest = _context(files), _ServerFiles(files), None

    def renew(connection: Any, name: str | None, context: ssl.SSLContext) -> None:
        nonlocal latest
        if source.read_if_changed() is not None:
            latest = _context(files)
        if latest is not None:
            connection.context = latest

    first.sni_callback = renew
    return first


def _context(files: TlsFiles) -> ssl.SSLContext:
    assert files.cert is not None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=files.ca)
    context.load_cert_chain(files.cert, files.key)
    context.verify_mode = ssl.CERT_NONE if files.ca is None else ssl.CERT_REQUIRED
    return context


class _ServerFiles:
    """What gRPC asks before each handshake. It does so on threads of its own."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._state = self._look()

    def read(self) -> Any:
        files = self._files
        files.check()
        assert files.cert is not None
        assert files.key is not None
        pair = (_read(files.key, files.settings[1]), _read(files.cert, files.settings[0]))
        authorities = None if files.ca is None else _read(files.ca, files.settings[2])
        return grpc.ssl_server_certificate_configuration([pair], authorities)

    def read_if_changed(self) -> Any:
        """None = as before; also where the files do not fit each other, as while they are being replaced."""
        state = self._look()
        if state == self._state:
            return None
        try:
            found = self.read()
        except ConfigError:
            return None
        self._state = state
        return found

    def _look(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_version(path) for path in (self._files.cert, self._files.key, self._files.ca))


def _version(path: str | None) -> tuple[int, int, int] | None:
    try:
        found = None if path is None else os.stat(path)
    except OSError:
        return None
    return None if found is None else (found.st_mtime_ns, found.st_size, found.st_ino)


def _read(path: str, setting: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as exc:
        raise ConfigError(f"{setting}: cannot read {path}: {exc.strerror}") from exc
