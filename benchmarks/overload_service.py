"""A gateway over two workers that speak the real protocol and compute nothing: prompts take their time one after the
other, and every sequence that runs gets a token a step. Run as a process, it prints where it listens."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from asyncio import Task
from typing import Any

from ..compression.recipe import ModelShape
from ..protos import frame_pb2 as fpb
from ..protos import worker_pb2 as wpb
from ..protos import worker_pb2_grpc
from ..services.config import ServeConfig, load_config
from ..services.gateway.membership import Member, MembershipTable
from ..services.gateway.server import Gateway
from ..services.lifecycle import WorkerHost
from ..services.worker import WorkerIdentity

VOCAB_SIZE = 256
MAX_POSITIONS = 4096
_SHAPE = ModelShape(4, 4, 2, 16, MAX_POSITIONS, (None,) * 4)
_BYTES = 1 << 40


class _Tokenizer:
    """One token a character."""

    has_chat_template = False

    class _Decoder:
        def push(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

        def finish(self) -> str:
            return ""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [min(ord(c), VOCAB_SIZE - 1) for c in text]

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> list[int]:
        raise AssertionError("there is no chat")

    def continue_chat(self, messages: list[dict[str, str]]) -> list[int]:
        raise AssertionError("there is no chat")

    def stream(self) -> _Decoder:
        return self._Decoder()

    def token_text(self, token_id: int) -> str:
        return chr(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()


class _Worker:
    def __init__(self, worker_id: str, role: str) -> None:
        self._identity = WorkerIdentity(worker_id, role, "made-up", "f" * 32, VOCAB_SIZE, _SHAPE, {})

    def add_to(self, server: Any) -> None:
        raise NotImplementedError

    async def start(self) -> None: ...
    async def stop(self) -> None: ...

    async def Info(self, request: wpb.InfoRequest, context: Any) -> wpb.WorkerInfo:
        return self._identity.info(capacity_bytes=_BYTES, free_bytes=_BYTES)


def _token() -> fpb.SampledToken:
    return fpb.SampledToken(token_id=97, logprob=-0.5)


class _Prefill(_Worker, worker_pb2_grpc.PrefillWorkerServicer):
    def __init__(self, tokens_per_s: float, begun: dict[tuple[str, int], asyncio.Event]) -> None:
        super().__init__("prefill-0", "prefill")
        self._tokens_per_s, self._begun, self._turn = tokens_per_s, begun, asyncio.Lock()

    def add_to(self, server: Any) -> None:
        worker_pb2_grpc.add_PrefillWorkerServicer_to_server(self, server)

    async def Prefill(self, request: wpb.PrefillRequest, context: Any) -> None:
        await context.send_initial_metadata(())
        async with self._turn:
            await asyncio.sleep(len(request.prompt_ids) / self._tokens_per_s)
        reason = "length" if request.sampling.max_tokens == 1 else ""
        choice = fpb.ChoiceState(index=0, emitted=[_token()], finish_reason=reason)
        await context.write(wpb.PrefillEvent(first_tokens=wpb.FirstTokens(choices=[choice])))
        self._begun.setdefault((request.request_id, request.epoch), asyncio.Event()).set()
        await context.write(wpb.PrefillEvent(shipped=wpb.Shipped(payload_bytes=1, frames=1)))


class _Decode(_Worker, worker_pb2_grpc.DecodeWorkerServicer):
    def __init__(self, step_s: float, begun: dict[tuple[str, int], asyncio.Event]) -> None:
        super().__init__("decode-0", "decode")
        self._step_s, self._begun = step_s, begun

    def add_to(self, server: Any) -> None:
        worker_pb2_grpc.add_DecodeWorkerServicer_to_server(self, server)

    async def Attach(self, requests: Any, context: Any) -> None:
        await context.send_initial_metadata(())
        runs: dict[tuple[str, int], Task[None]] = {}
        writing = asyncio.Lock()

        async def write(**message: Any) -> None:
            async with writing:
                await context.write(wpb.FromDecode(**message))

        try:
            async for message in requests:
                body = getattr(message, message.WhichOneof("message"))
                key = (body.request_id, body.epoch)
                if message.HasField("open"):
                    await write(opened=wpb.Opened(request_id=key[0], epoch=key[1]))
                    runs[key] = asyncio.create_task(self._run(body, write))
                    runs[key].add_done_callback(lambda _, key=key: runs.pop(key, None))  # type: ignore[misc]
                elif message.HasField("cancel") and key in runs:
                    runs[key].cancel()
        finally:
            for task in list(runs.values()):
                task.cancel()

    async def _run(self, body: wpb.Open, write: Any) -> None:
        key, ident = (body.request_id, body.epoch), dict[str, Any](request_id=body.request_id, epoch=body.epoch)
        try:
            await self._begun.setdefault(key, asyncio.Event()).wait()
        finally:
            self._begun.pop(key, None)
        for index in range(1, body.sampling.max_tokens):
            await asyncio.sleep(self._step_s)
            reason = "length" if index + 1 == body.sampling.max_tokens else ""
            entry = wpb.TokenEntry(**ident, choice=0, first_index=index, tokens=[_token()], finish_reason=reason)
            await write(tokens=wpb.TokenBatch(entries=[entry]))
        await write(finished=wpb.Finished(**ident, resident_bytes=1, bytes_read=1, steps=1))


async def serve(config: ServeConfig, prompt_tokens_per_s: float, step_s: float) -> None:
    """Serve until the task is cancelled; says where it listens."""
    members, begun = MembershipTable(), dict[tuple[str, int], asyncio.Event]()
    async with contextlib.AsyncExitStack() as stack:
        for role, worker in (("prefill", _Prefill(prompt_tokens_per_s, begun)), ("decode", _Decode(step_s, begun))):
            host = WorkerHost([worker], config.max_frame_bytes)
            address = await host.start("127.0.0.1")
            stack.push_async_callback(host.stop)
            member = Member(f"{role}-0", role, address, "only", max_num_seqs=config.max_num_seqs)  # type: ignore[arg-type]
            await members.register(member)
        gateway = Gateway(config, _Tokenizer(), members)
        stack.push_async_callback(gateway.stop)
        address = await gateway.start()
        while not gateway.ready:
            await gateway.pool.changed.wait()
        print(address, flush=True)
        await asyncio.Event().wait()


def main() -> None:
    """The process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompt-tokens-per-s", type=float, required=True)
    parser.add_argument("--step-s", type=float, required=True)
    parser.add_argument("--max-num-seqs", type=int, required=True)
    parser.add_argument("--max-ttft-s", type=float, required=True)
    given = parser.parse_args()
    config = load_config(
        {
            "model": "made-up",
            "port": 0,
            "http": False,
            "default_recipe": "exact",
            "max_queue": 1024,
            "max_num_seqs": given.max_num_seqs,
            "max_ttft_s": given.max_ttft_s,
        }
    )
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(config, given.prompt_tokens_per_s, given.step_s))


if __name__ == "__main__":
    main()
