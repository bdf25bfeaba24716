"""Keys and certificates at the HTTP API: the same that gRPC's clients show."""

from __future__ import annotations

import ssl
from hashlib import sha256
from pathlib import Path

import httpx
import pytest
from fastapi.routing import APIRoute

from kvsluice.services.gateway.http.app import Routes
from kvsluice.tests.faults.rig.certificates import Authority

KEY, MONITOR = "a-key-of-16-or-more", "another-key-of-16"
PUBLIC = {"/health", "/ready"}
HELLO = {"model": "chars", "prompt": "abc"}


@pytest.fixture
def keys_file(tmp_path: Path) -> str:
    lines = ["keys:"]
    for tenant, key, role in (("a", KEY, "client"), ("b", MONITOR, "monitor")):
        lines.append(f"  - {{tenant: {tenant}, sha256: {sha256(key.encode()).hexdigest()}, role: {role}}}")
    file = tmp_path / "keys.yaml"
    file.write_text("\n".join(lines))
    return str(file)


async def test_every_route_wants_a_key_that_may_call_it(make_fleet, keys_file):
    fleet = await make_fleet(api_keys_file=keys_file)
    routes = [
        (next(iter(route.methods)), route.path.replace("{name:path}", "chars").replace("{session_id}", "s"))
        for route in Routes(fleet.gateway.intake, fleet.config, fleet.gateway.guard).app().routes
        if isinstance(route, APIRoute)
    ]
    assert {path for _, path in routes} > PUBLIC
    async with httpx.AsyncClient(base_url=f"http://{fleet.gateway.http_address}", timeout=20.0) as http:

        async def told(method: str, path: str, *keys: str) -> int:
            shown = [("authorization", key) for key in keys]
            return (await http.request(method, path, headers=shown, json=HELLO)).status_code

        for method, path in routes:
            if path in PUBLIC:
                assert await told(method, path) == 200
                continue
            known, other = (MONITOR, KEY) if path == "/metrics" else (KEY, MONITOR)
            for bad in ([], ["Bearer x"], [known], [f"Basic {known}"], [f"Bearer {known}"] * 2):
                assert await told(method, path, *bad) == 401, (path, bad)
            assert await told(method, path, f"Bearer {other}") == 403
            assert await told(method, path, f"Bearer {known}") not in (401, 403)
        refused = await http.post("/v1/completions", json=HELLO)
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == "invalid_api_key"
    assert len(fleet.script.opens) == 1  # of the completion with a key


async def test_it_speaks_tls_where_grpc_does_and_follows_its_files(make_fleet, tmp_path):
    authority, other = Authority(tmp_path / "ours"), Authority(tmp_path / "other", "other")
    server, client = authority.issue("server"), authority.issue("client")
    fleet = await make_fleet(
        tls_cert_file=str(server.certificate),
        tls_key_file=str(server.key),
        tls_client_ca_file=str(authority.certificate),
    )

    async def told(trusted: Authority, shows: bool = True) -> int:
        context = ssl.create_default_context(cafile=str(trusted.certificate))
        if shows:
            context.load_cert_chain(client.certificate, client.key)
        url = f"https://{fleet.gateway.http_address}"
        async with httpx.AsyncClient(base_url=url, verify=context, timeout=20.0) as http:
            return (await http.post("/v1/completions", json=HELLO)).status_code

    assert await told(authority) == 200
    with pytest.raises(httpx.TransportError):
        await told(authority, shows=False)
    async with httpx.AsyncClient(base_url=f"http://{fleet.gateway.http_address}") as http:
        with pytest.raises(httpx.TransportError):
            await http.get("/health")
    renewed = other.issue("server")
    server.certificate.write_bytes(renewed.certificate.read_bytes())
    server.key.write_bytes(renewed.key.read_bytes())
    assert await told(other) == 200
    with pytest.raises(httpx.ConnectError):
        await told(authority)
