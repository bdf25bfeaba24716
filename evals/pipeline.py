"""Prefill and decode engines in one process: prompts in, tokens and measurements out, no network between.

    prompt ──PrefillEngine──> encoded layers ──frames──> DecodeEngine ──> tokens

What the services do over gRPC happens here by function calls, through the same engines and the same bytes. Tests and
evaluations use it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..compression.interfaces import EncodedLayer
from ..compression.layout import layer_layout
from ..compression.recipe import ModelShape, Recipe, Resolved, get_recipe, resolve
from ..errors import InternalError, InvalidRequest, KvsluiceError
from ..kvstore.identity import FrameIdent, ModelFingerprint, RecipeFingerprint, RequestId, TenantId
from ..models.model import Model
from ..models.sampling import Sampled, SamplingParams
from ..services.decode.engine import (
    DecodeEngine,
    DecodeRequest,
    EmittedChoice,
    Event,
    FailedEvent,
    FinishedEvent,
    OpenedEvent,
    TokensEvent,
)
from ..services.decode.host_pages import HostPages
from ..services.framing import FramePacker, LayerAssembler
from ..services.prefill.engine import PrefillEngine, PrefillJob
from ..services.staging import make_host_copies

EPOCH = 1


@dataclass(frozen=True)
class PipelineStats:
    """What a request cost.

    Attributes:
        payload_bytes: bytes of the frames that went from prefill to decode.
        bf16_bytes: what the whole KV cache of the prompt takes in bf16, for comparison.
        kept_rows: rows of the prompt that each layer keeps per KV head, exact and packed ones.
        resident_bytes, bytes_read, steps: see `FinishedEvent`; 0 when the first tokens ended the request.
    """

    payload_bytes: int
    bf16_bytes: int
    kept_rows: tuple[int, ...]
    resident_bytes: int
    bytes_read: int
    steps: int


@dataclass(frozen=True)
class Generation:
    """The answer to one prompt.

    Attributes:
        sampled: every token of every choice.
        finish_reasons: "stop" or "length", of every choice.
        resolved: the recipe that was asked for, the one that ran, and why it is another one if it is.
    """

    sampled: tuple[tuple[Sampled, ...], ...]
    finish_reasons: tuple[str, ...]
    resolved: Resolved
    stats: PipelineStats

    @property
    def token_ids(self) -> list[list[int]]:
        """Token ids of every choice, the stop token included."""
        return [[token.token_id for token in choice] for choice in self.sampled]


@dataclass
class _Call:
    """One prompt on its way; the sink of its prefill."""

    decode: DecodeEngine
    job: PrefillJob
    resolved: Resolved
    packer: FramePacker
    assembler: LayerAssembler
    is_open: bool = False
    payload_bytes: int = 0
    sampled: list[list[Sampled]] = field(default_factory=list)
    finished: FinishedEvent | None = None
    error: KvsluiceError | None = None
    done: bool = False

    def ready(self) -> bool:
        return self.is_open

    def on_layer_start(self, layer: int) -> None:
        """Nothing to do: layers are handed over by call."""

    def on_layer(self, encoded: EncodedLayer) -> None:
        self._send(self.packer.add(encoded))

    def _send(self, frames: list[bytes]) -> None:
        for frame in frames:
            self.payload_bytes += len(frame)
            for encoded in self.assembler.add(frame):
                self.decode.add_layer(self.job.request_id, encoded)

    def on_first_tokens(self, sampled: list[Sampled]) -> None:
        self.sampled = [[token] for token in sampled]

    def on_done(self) -> None:
        if all(choice[0].finish_reason for choice in self.sampled):
            self.decode.cancel(self.job.request_id)
            self.done = True
            return
        self._send(self.packer.flush())
        emitted = [EmittedChoice((c[0].token_id,), c[0].finish_reason) for c in self.sampled]
        self.decode.commit(self.job.request_id, self.job.prompt_ids, emitted)

    def on_error(self, error: KvsluiceError) -> None:
        self.decode.cancel(self.job.request_id)
        self.error = self.error or error
        self.done = True

    def on_event(self, event: Event) -> None:
        if isinstance(event, OpenedEvent):
            self.is_open = True
        elif isinstance(event, TokensEvent):
            self.sampled[event.choice].extend(event.sampled)
        elif isinstance(event, FinishedEvent):
            self.finished, self.done = event, True
        elif isinstance(event, FailedEvent) and not self.done:
            self.error, self.done = event.error, True


class LocalPipeline:
    """Both engines over one model.

    Args:
        profile: calibrated settings of the model, as recipes are resolved with.
        chunk_tokens, max_pack_tokens: of the prefill engine.
        capacity_bytes, max_num_seqs, max_waiting, host, lookahead: of the decode engine.
    """

    def __init__(
        self,
        model: Model,
        profile: Mapping[str, Any] | None = None,
        *,
        chunk_tokens: int = 512,
        max_pack_tokens: int = 2048,
        capacity_bytes: int = 8 << 30,
        max_num_seqs: int = 64,
        max_waiting: int = 1024,
        host: HostPages | None = None,
        lookahead: bool | None = None,
    ) -> None:
        self.model = model
        self.profile = dict(profile or {})
        self.prefill = PrefillEngine(model, chunk_tokens, max_pack_tokens)
        self.decode = DecodeEngine(model, capacity_bytes, max_num_seqs, max_waiting, host, lookahead)
        self._calls = 0
        self._copies = make_host_copies(model.device)

    @property
    def shape(self) -> ModelShape:
        return self.decode.shape

    def generate(self, prompt_ids: Sequence[int], recipe: Recipe | str, sampling: SamplingParams) -> Generation:
        """Answer one prompt.

        Args:
            recipe: by name, or with open numbers, or resolved.

        Raises:
            KvsluiceError: whatever the engines refuse or fail with.
        """
        return self.generate_many([(prompt_ids, recipe, sampling)])[0]

    def generate_many(self, requests: Sequence[tuple[Sequence[int], Recipe | str, SamplingParams]]) -> list[Generation]:
        """Answer several prompts at once, interleaved as the engines see fit. Raises the first error when all ended."""
        calls: list[_Call] = []
        try:
            for request in requests:
                calls.append(self._open(*request))
            self._run(calls)
        finally:
            for call in calls:
                self.prefill.cancel(call.job.request_id)
                self.decode.cancel(call.job.request_id)
            self.decode.step()  # nobody is left to tell
        for call in calls:
            if call.error is not None:
                raise call.error
        return [self._result(call) for call in calls]

    def _run(self, calls: Sequence[_Call]) -> None:
        by_id = {call.job.request_id: call for call in calls}
        while not all(call.done for call in calls):
            progressed = self.prefill.step()
            events = self.decode.step()
            for event in events:
                by_id[event.request_id].on_event(event)
            if not (progressed or events or self.decode.has_work):
                raise InternalError("the engines stand still")

    def check_integrity(self) -> None:
        """Assert that nothing is left of past calls."""
        self.decode.check_integrity()
        assert self.prefill.num_requests == 0
        assert self.decode.free_bytes == self.decode.capacity_bytes

    def _open(self, prompt_ids: Sequence[int], recipe: Recipe | str, sampling: SamplingParams) -> _Call:
        if not prompt_ids:
            raise InvalidRequest("prompt", "is empty", "at least one token")
        if isinstance(recipe, str):
            recipe = get_recipe(recipe)
        resolved = resolve(recipe, self.shape, len(prompt_ids), self.profile)
        self._calls += 1
        job = PrefillJob(f"local-{self._calls}", EPOCH, tuple(prompt_ids), resolved.recipe, sampling)
        request = DecodeRequest(job.request_id, EPOCH, len(prompt_ids), resolved.recipe, sampling)
        ident = FrameIdent(
            request_id=RequestId(job.request_id),
            epoch=EPOCH,
            tenant=TenantId("local"),
            model_fingerprint=ModelFingerprint(self.model.fingerprint),
            recipe_fingerprint=RecipeFingerprint(resolved.recipe.fingerprint),
        )
        packer = FramePacker(ident, len(prompt_ids), copies=self._copies)
        max_bytes = self.decode.demand(request).most_bytes
        call = _Call(self.decode, job, resolved, packer, LayerAssembler(ident, self.shape.num_layers, max_bytes))
        self.decode.open(request)
        try:
            self.prefill.submit(job, call)
        except KvsluiceError:
            self.decode.cancel(job.request_id)
            raise
        return call

    def _result(self, call: _Call) -> Generation:
        num_tokens = len(call.job.prompt_ids)
        layouts = [layer_layout(call.job.recipe, num_tokens, layer) for layer in range(self.shape.num_layers)]
        finished = call.finished
        stats = PipelineStats(
            payload_bytes=call.payload_bytes,
            bf16_bytes=self.shape.bf16_kv_bytes(num_tokens),
            kept_rows=tuple(at.num_sinks + at.num_sealed + at.num_tail for at in layouts),
            resident_bytes=0 if finished is None else finished.resident_bytes,
            bytes_read=0 if finished is None else finished.bytes_read,
            steps=0 if finished is None else finished.steps,
        )
        return Generation(
            sampled=tuple(map(tuple, call.sampled)),
            finish_reasons=tuple(choice[-1].finish_reason for choice in call.sampled),
            resolved=call.resolved,
            stats=stats,
        )
