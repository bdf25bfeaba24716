"""What a connection of the HTTP API may cost: bytes, time, and others' tokens."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from kvsluice.errors import DeadlineExceeded

HELLO = {"model": "chars", "prompt": "abc"}
LIMIT = 65536


@pytest.fixture
async def fleet(make_fleet):
    return await make_fleet(max_message_bytes=LIMIT, http_max_header_bytes=4096, http_max_connections=4)


@pytest.fixture
async def hasty(make_fleet):
    return await make_fleet(http_read_timeout_s=0.2)


async def dial(fleet) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = fleet.gateway.http_address.rpartition(":")
    end = socket.socket()
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    end.setblocking(False)
    await asyncio.get_running_loop().sock_connect(end, (host, int(port)))
    return await asyncio.open_connection(sock=end, limit=1 << 16)


def head(*lines: str, path: str = "/v1/completions") -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", *lines, "", ""]).encode()


async def told(fleet, *parts: bytes) -> bytes:
    """All that comes back on a connection of its own until the server closes it."""
    reader, writer = await dial(fleet)
    try:
        for part in parts:
            writer.write(part)
        return await asyncio.wait_for(reader.read(), 20)
    finally:
        writer.close()


async def test_bodies_are_bounded_however_they_come(fleet):
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b"x" * 4096

    async with httpx.AsyncClient(base_url=f"http://{fleet.gateway.http_address}", timeout=20.0) as http:
        whole = json.dumps(HELLO | {"prompt": "x" * LIMIT}).encode()
        for content in (whole, b"x" * (20 * LIMIT), pieces()):
            reply = await http.post("/v1/completions", content=content)
            assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")
        for nested in (b"[" * 60_000, b'{"a":' * 12_000):
            assert (await http.post("/v1/chat/completions", content=nested)).status_code == 400
        assert (await http.post("/v1/completions", json=HELLO)).status_code == 200


async def test_a_body_that_does_not_come_ends_with_408(hasty):
    reply = await told(hasty, head("Content-Length: 100"), b"{")
    assert reply.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in reply


async def test_a_body_that_is_only_announced_is_refused_before_it_is_sent(fleet):
    reply = await told(fleet, head(f"Content-Length: {LIMIT + 1}", "Expect: 100-continue"))
    assert reply.startswith(b"HTTP/1.1 413 ")


async def test_heads_that_do_not_come_are_waited_for_no_longer(hasty):
    assert await told(hasty, b"POST /v1/comple") == b""  # closed without a word: there was no request
    assert await told(hasty) == b""


async def test_a_body_that_goes_on_behind_its_answer_is_waited_for_no_longer(hasty):
    reader, writer = await dial(hasty)
    try:
        writer.write(head("Content-Length: 1000", path="/v1/nothing"))
        async with asyncio.timeout(20):
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 404 ")
            writer.write(b"{")
            await reader.read()  # to the end: the server closes
    finally:
        writer.close()


async def test_headers_are_bounded(fleet):
    many = head("X: " + "x" * 8192, "Content-Length: 0", "Connection: close")
    assert (await told(fleet, many)).startswith(b"HTTP/1.1 431 ")
    assert (await told(fleet, many[:-4])).startswith(b"HTTP/1.1 400 ")  # as soon as they are too large


async def test_connections_above_the_bound_are_refused(fleet):
    held = [await dial(fleet) for _ in range(4)]
    refused = await told(fleet, head("Content-Length: 0"))
    assert refused.startswith(b"HTTP/1.1 503 ")
    assert json.loads(refused.partition(b"\r\n\r\n")[2])["error"]["code"] == "overloaded"
    for _, writer in held:
        writer.close()


async def test_a_process_may_open_as_many_files_as_its_connections_take(make_fleet):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        await make_fleet(http_max_connections=2000)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 2000
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_client_that_does_not_read_holds_up_its_own_choices_alone(make_fleet, until):
    fleet = await make_fleet()
    script = fleet.script
    script.eos, script.num_top = False, 20
    body = json.dumps(HELLO | {"stream": True, "n": 8, "max_tokens": 500, "logprobs": 20}).encode()
    reader, writer = await dial(fleet)
    writer.write(head(f"Content-Length: {len(body)}") + body)
    sent = await until_quiet(script)
    assert sent < 8 * 499, "decode ran to the end though nobody read"
    other = await fleet.client.generate("abc", max_tokens=100)
    assert other.usage.completion_tokens == 100
    answer = await told_to_the_end(reader)
    writer.close()
    tokens = [t for event in answer for c in event["choices"] for t in c["logprobs"]["tokens"]]
    assert len(tokens) == 8 * 500


async def until_quiet(script) -> int:
    """Wait until decode has sent nothing more for a while. Returns how many tokens it has sent."""
    sent, quiet = -1, 0
    async with asyncio.timeout(60):
        while quiet < 10:
            await asyncio.sleep(0.05)
            quiet = quiet + 1 if script.sent_tokens == sent > 0 else 0
            sent = script.sent_tokens
    return sent


async def told_to_the_end(reader: asyncio.StreamReader) -> list[dict[str, Any]]:
    """The events of a stream."""
    events = []
    async with asyncio.timeout(60):
        while (line := (await reader.readuntil(b"\n")).strip()) != b"data: [DONE]":
            if line.startswith(b"data: "):
                events.append(json.loads(line[6:]))
    return events


async def test_a_client_that_never_reads_is_cut_off_with_its_request(make_fleet, until, monkeypatch):
    from kvsluice.services.gateway.http import answers

    monkeypatch.setattr(answers, "LAST_WORD_S", 0.1)
    fleet = await make_fleet()
    fleet.script.eos, fleet.script.num_top = False, 20
    more = {"stream": True, "n": 8, "max_tokens": 500, "logprobs": 20}
    body = json.dumps(HELLO | more).encode()
    _, writer = await dial(fleet)
    writer.write(head(f"Content-Length: {len(body)}") + body)
    server = fleet.gateway._http._server
    await until_quiet(fleet.script)
    fleet.gateway.intake.interrupt_all(DeadlineExceeded("late"))
    await until(lambda: not server.server_state.connections and not server.server_state.tasks)
    writer.close()
