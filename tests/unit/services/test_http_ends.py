"""What an HTTP request may hold beside the engines: its body until it is a request, its connection until it ends."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from kvsluice.errors import Overloaded
from kvsluice.protos import generation_pb2 as pb
from kvsluice.services.gateway.http import answers, bodies
from kvsluice.services.gateway.http.translate import Ask


class Incoming:
    """A request whose body is one part."""

    def __init__(self, num_bytes: int) -> None:
        self.headers = {"content-length": str(num_bytes)}
        self._part = b"x" * num_bytes

    async def stream(self):
        yield self._part


async def test_a_body_counts_until_it_is_a_request(monkeypatch):
    """Parsing waits for threads: those that wait there are in memory, too."""
    monkeypatch.setattr(bodies, "MANY", 2)
    reader = bodies.BodyReader(100, 5.0)
    async with reader.read(Incoming(100)), reader.read(Incoming(100)) as body:
        assert len(body) == 100
        with pytest.raises(Overloaded):
            async with reader.read(Incoming(1)):
                pass
    async with reader.read(Incoming(100)):
        pass


class Intake:
    """Answers at once."""

    pool = SimpleNamespace(model=None)
    tokenizer = SimpleNamespace(token_bytes=None)

    async def generate(self, request, write, allowed_s, counted):
        await write(pb.GenerateResponse(chunk=pb.Chunk(text="a", token_ids=[1], finish_reason="stop")))
        await write(pb.GenerateResponse(complete=pb.Complete(choices=[pb.Choice(finish_reason="stop")])))


async def test_a_client_that_does_not_take_the_end_is_cut_off(monkeypatch):
    monkeypatch.setattr(answers, "END_S", 0.05)
    cut, sent = asyncio.Event(), []

    async def send(message):
        sent.append(message)
        if b"[DONE]" in message.get("body", b""):
            await asyncio.Event().wait()  # its buffers are full

    async def nothing():
        await asyncio.Event().wait()

    ask = Ask("cmpl-1", "m", False, (pb.GenerateRequest(request_id="1"),), stream=True)
    scope = {"state": {"connection": SimpleNamespace(abort=cut.set)}}
    answer = answers.Answer(ask, Intake(), {})
    await asyncio.wait_for(answer(scope, nothing, send), 10)
    assert cut.is_set()
    assert sent[0]["status"] == 200
