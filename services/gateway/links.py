"""Connections from a gateway to the workers. A link reconnects for as long as its member is in the membership."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from asyncio import CancelledError, Queue, Task
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from ...compression.recipe import ModelShape
from ...errors import ConfigError, KvsluiceError, Unauthenticated, WorkerLost
from ...protos import worker_pb2 as wpb
from ...protos.worker_pb2_grpc import DecodeWorkerStub, PrefillWorkerStub
from ..rpc import is_cancelled, make_channel, read_all
from ..security import FleetSecurity
from ..status import build_error, error_from_rpc
from ..tracing import current_span
from ..worker import PROTOCOL
from .affinity import Found, PromptPrefixes, RunPrefixes
from .inbox import Event, Inbox
from .membership import Member
from .routing import DecodeLoad, PrefillLoad
from .waits import Speed, Throughput, Waits, saved, work

log = logging.getLogger("kvsluice.gateway")

INFO_PERIOD_S = 1.0
GREETING_TIMEOUT_S = 5.0
RECONNECT_S = 0.2
MAX_UNSENT = 4096  # messages to a worker that does not read them


@dataclass(frozen=True)
class WorkerModel:
    """The model that a worker serves."""

    name: str
    fingerprint: str
    vocab_size: int
    shape: ModelShape
    profile: dict[str, Any]

    @classmethod
    def from_info(cls, info: wpb.WorkerInfo) -> WorkerModel:
        return cls(
            name=info.model,
            fingerprint=info.model_fingerprint,
            vocab_size=info.vocab_size,
            shape=ModelShape.from_json(info.model_shape_json),
            profile=json.loads(info.profile_json),
        )


async def run_until_first(*jobs: Coroutine[Any, Any, None]) -> None:
    """Run jobs together until one of them ends; end the others; raise what the first one raised.

    A job that was cancelled from inside, as gRPC does when a connection breaks, counts as a lost worker.
    """
    tasks: list[Task[None]] = [asyncio.create_task(job) for job in jobs]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if task.cancelled():
                raise WorkerLost("the connection broke")
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True)
class LinkSettings:
    """How links connect.

    Attributes:
        lease_s: a worker that gives no account of itself for so long is lost, though its connection may live.
        security: what workers are shown.
    """

    max_message_bytes: int
    lease_s: float
    security: FleetSecurity


class Link:
    """What both kinds of links share: the loop that connects, and the worker's own account of itself."""

    def __init__(self, member: Member, settings: LinkSettings, on_change: Callable[[], None]) -> None:
        self.member = member
        self.model: WorkerModel | None = None
        self.info = wpb.WorkerInfo()
        self.up = False
        self.draining = False
        self.users: set[tuple[str, int]] = set()  # attempts that may still want something of the worker
        self._said = ""
        self._settings, self._lease_s = settings, settings.lease_s
        self._on_change = on_change
        self.on_prefilled: Callable[[], None] = lambda: None  # called when fewer prompts may wait than before
        self._task: Task[None] | None = None
        self._is_left_out = False

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"link-{self.member.worker_id}")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            try:
                settings = self._settings
                async with make_channel(self.member.address, settings.max_message_bytes, settings.security) as channel:
                    await self._session(channel)
            except (grpc.RpcError, KvsluiceError, asyncio.InvalidStateError) as exc:
                log.debug("link to %s ended: %s", self.member.worker_id, type(exc).__name__)
                self._say_why(exc)
            except CancelledError:
                if is_cancelled():
                    raise
            finally:
                self._set_up(False)
            await asyncio.sleep(RECONNECT_S)

    def _say_why(self, exc: Exception) -> None:
        """What only whoever configures the fleet can mend is said, once."""
        if isinstance(exc, grpc.RpcError) and isinstance(error := error_from_rpc(exc), Unauthenticated):
            said = f"{self.member.worker_id} does not let this gateway in: {error.message}"
        elif isinstance(exc, ConfigError):
            said = exc.message
        else:
            return
        if said != self._said:
            self._said = said
            log.error("%s", said)

    def _set_up(self, up: bool) -> None:
        if up == self.up:
            return
        self.up = up
        log.info("%s worker %s is %s", self.member.role, self.member.worker_id, "up" if up else "lost")
        if not up:
            self._lost()
        self._on_change()

    @property
    def called(self) -> str:
        """What errors call the worker."""
        return "worker" if self.info.role == "both" else f"{self.member.role} worker"

    async def _greet(self, stub: PrefillWorkerStub | DecodeWorkerStub) -> None:
        self.info = await stub.Info(wpb.InfoRequest(), timeout=GREETING_TIMEOUT_S, wait_for_ready=True)
        if self.info.worker_id != self.member.worker_id:
            # ports are used again: whoever listens there now is not who was registered
            raise WorkerLost("another worker listens at this address")
        if self.info.protocol != PROTOCOL:
            self._leave_out()
        self.model = WorkerModel.from_info(self.info)

    def _leave_out(self) -> None:
        """The worker is of a release that this one cannot work with: it may be replaced by one that is not."""
        if not self._is_left_out:
            self._is_left_out = True
            log.error(
                "%s worker %s is left out: it speaks version %d of the workers' protocol, this gateway %d",
                self.member.role, self.member.worker_id, self.info.protocol, PROTOCOL,
            )  # fmt: skip
        raise WorkerLost("the worker is of another release")

    async def _refresh(self, stub: PrefillWorkerStub | DecodeWorkerStub) -> None:
        while True:
            await asyncio.sleep(min(INFO_PERIOD_S, self._lease_s / 4))
            self.info = await stub.Info(wpb.InfoRequest(), timeout=self._lease_s)
            self.on_prefilled()  # those of other gateways, too

    async def _session(self, channel: grpc.aio.Channel) -> None:
        raise NotImplementedError

    def _lost(self) -> None:
        """Tell everyone who depends on the connection."""


@dataclass(frozen=True)
class _Given:
    """A prompt that a worker was given.

    Attributes:
        cost: in tokens that run whole.
        prefixes: the prompt's, and further names of it.
        share: see `Found`.
        expected: tokens that the worker was taken to have, by each of the names.
    """

    cost: float
    prefixes: Sequence[PromptPrefixes]
    share: float
    expected: Sequence[int]


class PrefillLink(Link):
    """Watches the connection to a prefill worker and starts prompts on it."""

    def __init__(self, member: Member, settings: LinkSettings, on_change: Callable[[], None]) -> None:
        super().__init__(member, settings, on_change)
        self._stub: PrefillWorkerStub | None = None
        self._ours: dict[tuple[str, int], _Given] = {}
        self._throughput = Throughput()
        self._has_run = RunPrefixes()

    def load(self, prefixes: PromptPrefixes | None = None) -> PrefillLoad:
        """For a prompt that begins so, if one is meant."""
        saved_tokens = 0.0 if prefixes is None else self.found(prefixes).saved_tokens
        return PrefillLoad(self.member.worker_id, sum(map(work, self.prompts())), saved_tokens)

    def found(self, prefixes: PromptPrefixes) -> Found:
        """What the worker should not have to run of a prompt."""
        return self._has_run.found(prefixes, self.info.prefix_chunk_tokens)

    @property
    def wait_s(self) -> float:
        """How long a prompt that comes now would wait until it is its turn, as far as that is known."""
        return sum(map(self.speed.seconds, self.prompts()))

    def prompts(self) -> list[float]:
        """Tokens that each prompt costs that has not run; those of other gateways are taken for one prompt."""
        ours = [one.cost for one in self._ours.values()]
        others = self.info.pending_tokens - sum(ours)
        return [*ours, *([others] if others > 0 else [])]

    @property
    def speed(self) -> Speed:
        """Of the worker, as far as that is known."""
        return self._throughput.speed

    def prefill(
        self, request: wpb.PrefillRequest, timeout_s: float, prefixes: Sequence[PromptPrefixes], share: float
    ) -> Any:
        """Start a prompt. Returns the call, a stream of `PrefillEvent`s; the caller reports its end by `done`.

        Args:
            prefixes: the prompt's, and further names of it.
            share: see `Found`.
        """
        if self._stub is None or not self.up:
            raise WorkerLost(f"the {self.called} was lost")
        self._throughput.begin(idle=not self._ours)
        expected = [self.found(one).tokens for one in prefixes]
        cost = prefixes[0].num_tokens - saved(expected[0] * share)
        self._ours[request.request_id, request.epoch] = _Given(cost, prefixes, share, expected)
        return self._stub.Prefill(request, timeout=timeout_s, metadata=current_span.get().carrier)

    def first(self, request_id: str, epoch: int, cached_tokens: int) -> None:
        """The prompt has run, but for its first `cached_tokens`."""
        given = self._ours.get((request_id, epoch))
        if given is None:
            self._throughput.end(None)
            return
        num_tokens = given.prefixes[0].num_tokens
        self._throughput.end(num_tokens - saved(cached_tokens * given.share))
        for one, expected in zip(given.prefixes, given.expected, strict=True):
            part = cached_tokens * one.num_tokens // num_tokens
            self._has_run.remember(one, self.info.prefix_chunk_tokens, given.share, part, expected)
        self.done(request_id, epoch)

    def done(self, request_id: str, epoch: int) -> None:
        """The prompt no longer counts as pending."""
        if self._ours.pop((request_id, epoch), None) is not None:
            self.on_prefilled()

    async def _session(self, channel: grpc.aio.Channel) -> None:
        self._stub = PrefillWorkerStub(channel)
        await self._greet(self._stub)
        self._set_up(True)
        await run_until_first(self._watch(channel), self._refresh(self._stub))

    async def _watch(self, channel: grpc.aio.Channel) -> None:
        ready = grpc.ChannelConnectivity.READY
        while (state := channel.get_state(try_to_connect=True)) is ready:
            await channel.wait_for_state_change(state)

    def _lost(self) -> None:
        self._stub = None
        self._ours.clear()
        self._has_run.clear()


class DecodeLink(Link):
    """The multiplexed stream to a decode worker. It is always drained: every entry goes to its request's inbox."""

    def __init__(self, member: Member, settings: LinkSettings, on_change: Callable[[], None]) -> None:
        super().__init__(member, settings, on_change)
        self._outbox: Queue[wpb.ToDecode] = Queue()
        self._inboxes: dict[tuple[str, int], Inbox] = {}
        self._waits = Waits()

    def load(self) -> DecodeLoad:
        info = self.info
        return DecodeLoad(
            self.member.worker_id,
            info.free_bytes,
            info.capacity_bytes,
            info.running,
            info.waiting,
            len(self._inboxes),
            info.host_free_bytes,
            info.host_capacity_bytes,
        )

    @property
    def wait_s(self) -> float:
        """How long requests wait for room there now."""
        return self._waits.seconds()

    def open(self, message: wpb.Open, inbox: Inbox) -> None:
        """Ask for room for a request; answers and tokens go to `inbox` until `close`."""
        if not self.up:
            raise WorkerLost(f"the {self.called} was lost")
        if self._outbox.qsize() >= MAX_UNSENT:
            # requests that their clients gave up have left their messages; the lease says when it is lost altogether
            raise WorkerLost(f"the {self.called} takes no messages")
        self._inboxes[message.request_id, message.epoch] = inbox
        self._waits.begin((message.request_id, message.epoch))
        self._outbox.put_nowait(wpb.ToDecode(open=message))

    def credit(self, request_id: str, epoch: int, tokens: int) -> None:
        self._send(wpb.ToDecode(credit=wpb.Credit(request_id=request_id, epoch=epoch, tokens=tokens)))

    def cancel_choice(self, request_id: str, epoch: int, choice: int) -> None:
        self._send(wpb.ToDecode(cancel=wpb.Cancel(request_id=request_id, epoch=epoch, choice=choice)))

    def close(self, request_id: str, epoch: int, finished: bool, keep: bool = False) -> None:
        """Forget a request; unless the worker has finished it, tell the worker to do so too.

        Args:
            keep: leave what the store holds of it.
        """
        self._waits.drop((request_id, epoch))
        if self._inboxes.pop((request_id, epoch), None) is not None and not finished:
            self._send(wpb.ToDecode(cancel=wpb.Cancel(request_id=request_id, epoch=epoch, keep=keep)))

    def _send(self, message: wpb.ToDecode) -> None:
        if self.up:
            self._outbox.put_nowait(message)

    async def _session(self, channel: grpc.aio.Channel) -> None:
        stub = DecodeWorkerStub(channel)
        await self._greet(stub)
        self._outbox = Queue()
        call = stub.Attach()
        await call.initial_metadata()
        self._set_up(True)
        await run_until_first(self._read(call), self._write(call), self._refresh(stub))

    async def _write(self, call: Any) -> None:
        while True:
            await call.write(await self._outbox.get())

    async def _read(self, call: Any) -> None:
        await read_all(call, self._take)

    def _take(self, message: wpb.FromDecode) -> None:
        kind = message.WhichOneof("message")
        if kind == "tokens":
            for entry in message.tokens.entries:
                self._deliver(entry.request_id, entry.epoch, entry)
        elif kind == "failed":
            failed = message.failed
            inbox = self._inboxes.pop((failed.request_id, failed.epoch), None)
            if inbox is not None:
                inbox.fail(build_error(failed.error_type, failed.message, failed.field, failed.allowed))
        elif kind is not None:
            event = getattr(message, kind)
            if kind == "opened":
                self._waits.end((event.request_id, event.epoch))
            self._deliver(event.request_id, event.epoch, event)

    def _deliver(self, request_id: str, epoch: int, event: Event) -> None:
        # entries of requests and epochs that are over have no inbox and are dropped here
        inbox = self._inboxes.get((request_id, epoch))
        if inbox is not None:
            inbox.post(event)

    def _lost(self) -> None:
        inboxes, self._inboxes = self._inboxes, {}
        self._waits.clear()
        for inbox in inboxes.values():
            inbox.fail(WorkerLost(f"the {self.called} was lost while it worked on the request"))
