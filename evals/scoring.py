"""Judges answers through the engines that serve: one prefill, frames, one pass of all answer rows over the cache.

    prompt ──PrefillEngine──> layers ──frames──> cache ──forward_rows(all answer rows)──> predicted tokens

The first sample of each recipe goes through real frames. Frames lose nothing, so later ones are handed over as they
are, and the bytes of their frames are counted by the layout; on the first sample both must agree.

An answer is right iff every one of its tokens is the likeliest, given those before it; that is so iff greedy generation
says exactly the answer. So no token has to be generated: prefill's own first token is held against the answer's first,
and the rows of the answer run through decode's forward pass together, over the cache that decode would hold. Rows are
cut where decode would seal generated rows, as a recipe seals at fixed positions. The samples and recipes of a call
share the pass, as sequences share a decode batch.

Later turns go on over the cache that the turns before have left, as a session's do: what is new is history that decode
runs behind the prompt, up to the question's last row in blocks, and the answer's rows from there. Between the turns
stand the right answers, whatever the recipe would have said, so that all recipes are asked the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..compression import bound_nbytes, make_cache
from ..compression.interfaces import EncodedLayer, SequenceCache
from ..compression.recipe import ModelShape, Recipe, Resolved, resolve
from ..errors import InternalError, KvsluiceError
from ..kvstore.identity import FrameIdent, ModelFingerprint, RecipeFingerprint, RequestId, TenantId
from ..models.forward import Rows, forward_rows
from ..models.model import Model
from ..models.sampling import Sampled, SamplingParams
from ..services.framing import FrameMeter, FramePacker, LayerAssembler
from ..services.model_shape import model_shape
from ..services.prefill.engine import PrefillEngine, PrefillJob
from ..services.prefill.flops import FlopCount
from ..services.prefill.prefix_memory import make_prefix_memory
from ..services.staging import make_host_copies
from .outcomes import Outcome, turn_scores
from .suites import Case

EPOCH = 1
MAX_PASS_ROWS = 128  # answer rows of one sequence in a pass: sparse attention gathers chunks for each of them
LOGIT_ROWS = 1024  # rows whose logits exist at once
CHUNK_TOKENS = 512  # as a service has it
CUDA_CHUNK_TOKENS = 8192  # fewer, larger launches than a service takes, which has others waiting
NOT_FINITE = -1  # stands for a token where logits are not numbers; told when all is done, as telling waits for a GPU
CHUNKS_A_PACK = 4  # the prompts of a call share packs


class _Wire:
    """Layers into frames and out of them, onto the device that they came from.

    Attributes:
        num_bytes: of the frames.
    """

    def __init__(self, packer: FramePacker, assembler: LayerAssembler, device: torch.device) -> None:
        self._packer, self._assembler, self._device = packer, assembler, device
        self.num_bytes = 0

    def add(self, encoded: EncodedLayer) -> list[EncodedLayer]:
        """The layers that are whole once this one has gone in."""
        return self._received(self._packer.add(encoded))

    def flush(self) -> list[EncodedLayer]:
        """The rest."""
        return self._received(self._packer.flush())

    def _received(self, frames: list[bytes]) -> list[EncodedLayer]:
        layers = []
        for frame in frames:
            self.num_bytes += len(frame)
            layers += self._assembler.add(frame)
        return [
            EncodedLayer(one.layer, {part: self._moved(group) for part, group in one.tensors.items()}) for one in layers
        ]

    def _moved(self, group: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self._device) for name, tensor in group.items()}


@dataclass
class _Sequence:
    """One sample under one recipe on its way; the sink of its prefill.

    Attributes:
        meter: counts the frames' bytes.
        wire: what layers really go through, or None.
        following: int64 [a], what follows the prompt, on the model's device.
        spans: see `_spans`.
        layers: that have arrived.
        num_done: tokens of `following` that were put in.
        judged: one tensor a pass that was judged: predicted ids int64 [q], or under `nll` nats float32 [q].
    """

    case: Case
    resolved: Resolved
    cache: SequenceCache
    meter: FrameMeter
    wire: _Wire | None
    following: Tensor
    spans: Sequence[tuple[int, bool]]
    payload_bytes: int = 0
    resident_bytes: int = 0
    count: FlopCount = field(default_factory=FlopCount)
    layers: set[int] = field(default_factory=set)
    first_token: int | None = None
    error: KvsluiceError | None = None
    num_done: int = 0
    cached_tokens: int = 0
    judged: list[Tensor] = field(default_factory=list)
    _rows_left: int | None = None  # until sealing is due; None before the first row

    def ready(self) -> bool:
        return True

    def on_layer_start(self, layer: int) -> None:
        """Nothing to do: layers are handed over by call."""

    def on_layer(self, encoded: EncodedLayer) -> None:
        self.payload_bytes += self.meter.measure(encoded)
        self._arrive([encoded] if self.wire is None else self.wire.add(encoded))

    def on_first_tokens(self, sampled: list[Sampled]) -> None:
        self.first_token = sampled[0].token_id

    def on_found(self, num_tokens: int) -> None:
        self.cached_tokens = num_tokens

    def on_done(self) -> None:
        self.payload_bytes += self.meter.measure_rest()
        if self.wire is not None:
            self._arrive(self.wire.flush())
        self.resident_bytes = self.cache.nbytes()

    def on_error(self, error: KvsluiceError) -> None:
        self.error = error

    def _arrive(self, layers: Sequence[EncodedLayer]) -> None:
        for encoded in layers:
            self.layers.add(encoded.layer)
            self.cache.add_layer(encoded)

    @property
    def num_left(self) -> int:
        """Tokens still to be put in; the last one predicts nothing that is judged."""
        return self.spans[-1][0] - self.num_done

    @property
    def span(self) -> tuple[int, bool]:
        """That of the next row."""
        return next(span for span in self.spans if span[0] > self.num_done)

    @property
    def targets(self) -> Tensor:
        """int64, what the next rows predict."""
        return self.following[self.num_done + 1 :]

    def next_rows(self, positions: Tensor) -> Rows:
        """The rows of the next pass, after sealing what is due before it.

        Args:
            positions: int64, 0, 1, 2, … as far as any sequence goes.
        """
        num_prompt_tokens = len(self.case.prompt_ids)
        at = num_prompt_tokens + self.num_done
        if self._rows_left == 0:
            self.cache.seal(at)
        if not self._rows_left:
            self._rows_left = self.cache.rows_until_seal(at)
        count = min(self.span[0] - self.num_done, self._rows_left, MAX_PASS_ROWS)
        self._rows_left -= count
        ids = self.following[self.num_done : self.num_done + count]
        return Rows(ids, positions[at : at + count], self.cache, num_prompt_tokens)


class Scorer:
    """Judges samples under recipes; of calls before it knows which recipes have gone through frames, and no more.

    Args:
        profile: calibrated settings of the model, as recipes are resolved with.
        recipes: by label, with open numbers or resolved.
        chunk_tokens: prompt rows of a work item of prefill; None = by the device.
        prefix_bytes: memory for what prompts that begin alike share; 0 = they share nothing.
    """

    def __init__(
        self,
        model: Model,
        profile: Mapping[str, Any],
        recipes: Mapping[str, Recipe],
        chunk_tokens: int | None = None,
        prefix_bytes: int = 0,
    ) -> None:
        if chunk_tokens is None:
            chunk_tokens = CHUNK_TOKENS if model.device.type == "cpu" else CUDA_CHUNK_TOKENS
        self.model = model
        self.shape: ModelShape = model_shape(model.config)
        self._profile = dict(profile)
        self._recipes = dict(recipes)
        self._sent: set[str] = set()
        self._counter = count()
        self._copies = make_host_copies(model.device)
        memory = make_prefix_memory(prefix_bytes, model.device) if prefix_bytes else None
        self._prefill = PrefillEngine(model, chunk_tokens, CHUNKS_A_PACK * chunk_tokens, prefix_memory=memory)

    @torch.no_grad()
    def score(self, cases: Sequence[Case], tenant: str = "local") -> list[dict[str, Outcome]]:
        """Every case under every recipe: case by case, label -> outcome.

        Args:
            tenant: prompts of one share their beginnings, those of each recipe apart.

        Raises:
            KvsluiceError: whatever the engines refuse or fail with, or what they would: logits that are not finite.
        """
        sequences = [{label: self._open(case, label, tenant) for label in self._recipes} for case in cases]
        everything = [sequence for row in sequences for sequence in row.values()]
        self._run_prefill(everything)
        self._run_answers(everything)
        return [{label: _outcome(label, sequence) for label, sequence in row.items()} for row in sequences]

    def _open(self, case: Case, label: str, tenant: str) -> _Sequence:
        recipe = self._recipes[label]
        # ids of one length, as every frame's header holds it
        request_id = f"eval-{next(self._counter):09d}"
        model, num_tokens, num_new = self.model, len(case.prompt_ids), len(case.following_ids) + 1
        resolved = resolve(recipe, self.shape, num_tokens, self._profile)
        ident = FrameIdent(
            request_id=RequestId(request_id),
            epoch=EPOCH,
            tenant=TenantId("local"),
            model_fingerprint=ModelFingerprint(model.fingerprint),
            recipe_fingerprint=RecipeFingerprint(resolved.recipe.fingerprint),
        )
        max_bytes = bound_nbytes(resolved.recipe, self.shape, num_tokens, num_new, 1, model.dtype.itemsize)
        wire = None
        if resolved.recipe.fingerprint not in self._sent:
            self._sent.add(resolved.recipe.fingerprint)
            packer = FramePacker(ident, num_tokens, copies=self._copies)
            wire = _Wire(packer, LayerAssembler(ident, self.shape.num_layers, max_bytes), model.device)
        sequence = _Sequence(
            case,
            resolved,
            make_cache(resolved.recipe, self.shape, num_tokens, lambda x, at: model.rotate(x, at, num_tokens)),
            FrameMeter(ident, num_tokens),
            wire,
            torch.tensor(case.following_ids, dtype=torch.int64, device=model.device),
            _spans(case),
        )
        # the first token must not end the request, or its last layer would not be encoded
        sampling = SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True)
        job = PrefillJob(request_id, EPOCH, case.prompt_ids, resolved.recipe, sampling, tenant=f"{tenant} {label}")
        self._prefill.submit(job, sequence, sequence.on_found, sequence.count)
        return sequence

    def _run_prefill(self, sequences: Sequence[_Sequence]) -> None:
        while self._prefill.step():
            pass
        for sequence in sequences:
            if sequence.error is not None:
                raise sequence.error
            missing = sorted(set(range(self.shape.num_layers)) - sequence.layers)
            if missing or sequence.first_token is None:
                raise InternalError(f"layers {missing[:8]} never arrived")
            sent = sequence.payload_bytes if sequence.wire is None else sequence.wire.num_bytes
            if sent != sequence.payload_bytes:
                raise InternalError(f"frames of {sent} bytes were counted as {sequence.payload_bytes}")

    def _run_answers(self, sequences: Sequence[_Sequence]) -> None:
        longest = max((len(one.case.prompt_ids) + len(one.following) for one in sequences), default=0)
        positions = torch.arange(longest, device=self.model.device)
        while running := [sequence for sequence in sequences if sequence.num_left > 0]:
            batch = [sequence.next_rows(positions) for sequence in running]
            hidden = torch.split(forward_rows(self.model, batch), [len(rows.ids) for rows in batch])
            self._judge_rows([pair for pair in zip(running, hidden, strict=True) if pair[0].span[1]])
            for sequence, rows in zip(running, batch, strict=True):
                sequence.num_done += len(rows.ids)

    def _judge_rows(self, shown: Sequence[tuple[_Sequence, Tensor]]) -> None:
        """Hold what the rows [q, D] of sequences predict against what follows them."""
        if not shown:
            return
        sizes = [len(rows) for _, rows in shown]
        hidden = torch.cat([rows for _, rows in shown])
        targets = torch.cat([sequence.targets[:size] for (sequence, _), size in zip(shown, sizes, strict=True)])
        nll = shown[0][0].case.rule == "nll"
        pieces = zip(torch.split(hidden, LOGIT_ROWS), torch.split(targets, LOGIT_ROWS), strict=True)
        judged = torch.cat([self._judge(rows, wanted, nll) for rows, wanted in pieces])
        for (sequence, _), part in zip(shown, torch.split(judged, sizes), strict=True):
            sequence.judged.append(part)

    def _judge(self, hidden: Tensor, targets: Tensor, nll: bool) -> Tensor:
        """Rows [n, D] that predict the targets [n]: predicted ids or `NOT_FINITE`, or under `nll` nats."""
        logits = self.model.logits(hidden)
        if nll:
            return torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        return logits.argmax(dim=-1).masked_fill(~logits.isfinite().all(dim=-1), NOT_FINITE)


def _spans(case: Case) -> list[tuple[int, bool]]:
    """Rows of `Case.following_ids` that run apart from those before and behind them: where they end, and whether what
    they predict is judged. A row predicts the token behind it: the first answer's first token is prefill's, every other
    answer's is predicted by its question's last row, and the last answer's last token predicts nothing."""
    spans, done = [], 0
    for begin, end in case.answers:
        for stop, is_judged in ((begin - 1, False), (end - 1, True)):
            if stop > done:
                spans.append((stop, is_judged))
                done = stop
    return spans or [(0, True)]


def _outcome(label: str, sequence: _Sequence) -> Outcome:
    case = sequence.case
    judged = torch.cat(sequence.judged).tolist() if sequence.judged else []
    if NOT_FINITE in judged or not all(map(math.isfinite, judged)):
        raise InternalError(f"{label}: decoding gave logits that are not finite")
    if case.rule == "nll":
        predicted: tuple[int, ...] = ()
        turns: tuple[float, ...] = (sum(judged) / len(judged),)
    else:
        assert sequence.first_token is not None, "prefill ended without an error"
        predicted = (sequence.first_token, *judged)
        turns = turn_scores(case, predicted)
    return Outcome(
        fmean(turns),
        turns,
        sequence.payload_bytes,
        sequence.resident_bytes,
        sequence.count.flops.total,
        sequence.cached_tokens,
        sequence.resolved.fallback_reason,
        predicted,
    )
