"""The built-in models on real text equal transformers, which reads, permutes and merges the same files by itself.

Tolerance: both sides compute in float32 from the same dequantized weights and differ in the order of sums. Rounding of
2^-24 a term, over products of 576 to 1536 terms and 60 additions to a residual stream whose largest channels are
hundreds of times the median, comes to about 1e-5 of the largest logit. The likeliest token must then agree wherever the
first and second logit are further apart than twice that.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pydoc_data import topics
from typing import Any

import pytest
import torch

from kvsluice.evals import reference_model
from kvsluice.models.checkpoint import locate
from kvsluice.models.forward import Rows, forward_rows, forward_tokens
from kvsluice.models.loader import load_model
from kvsluice.models.model import Model
from kvsluice.models.tokenizer import load_tokenizer

TOLERANCE = 2e-5
MULTILINGUAL = "Der Fluß fließt. Le garçon a mangé. 日本語の文章です。 Привет, мир! שלום 🙂👩‍👩‍👧 नमस्ते\n"
MODELS = ("smollm2-135m", "smollm2-135m-longctx")


@dataclass
class Reference:
    """Logits of transformers for each text, and some of its weights."""

    logits: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def texts() -> dict[str, torch.Tensor]:
    tokenizer = load_tokenizer("smollm2-135m")
    pages = "\n".join(topics.topics[key] for key in ("assert", "if", "while", "with", "yield"))
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}])
    documents = {
        "documentation": tokenizer.encode(pages)[:400],
        "code": tokenizer.encode(inspect.getsource(inspect.getmodule(pytest.fixture) or pytest))[:160],
        "multilingual": tokenizer.encode(MULTILINGUAL),
        "chat": chat,
    }
    return {name: torch.tensor(ids) for name, ids in documents.items()}


@pytest.fixture(scope="module")
def references(texts: dict[str, torch.Tensor]) -> dict[str, Reference]:
    hf = reference_model.load_base()
    found = {"smollm2-135m": _run(hf, texts)}
    # in place: one copy of the model at a time
    reference_model.extend_context(hf)
    adapter = locate("smollm2-135m-longctx").adapter
    assert adapter is not None
    reference_model.merge_adapter(hf, adapter)
    found["smollm2-135m-longctx"] = _run(hf, texts)
    return found


def _run(hf: Any, texts: dict[str, torch.Tensor]) -> Reference:
    with torch.no_grad():
        logits = {name: hf(ids[None]).logits[0] for name, ids in texts.items()}
    attention = hf.model.layers[17].self_attn
    weights = {"q": attention.q_proj.weight, "k": attention.k_proj.weight, "v": attention.v_proj.weight}
    weights |= {"embed": hf.model.embed_tokens.weight, "down": hf.model.layers[29].mlp.down_proj.weight}
    return Reference(logits, {name: weight.detach().clone() for name, weight in weights.items()})


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> tuple[str, Model]:
    return request.param, load_model(request.param)


def test_weights_equal(model: tuple[str, Model], references: dict[str, Reference]) -> None:
    name, ours = model
    theirs = references[name].weights
    layer = ours.weights.layers[17]
    found = dict(zip(("q", "k", "v"), layer.qkv.split([576, 192, 192]), strict=True))
    found |= {"embed": ours.weights.embed, "down": ours.weights.layers[29].down}

    assert ours.weights.head is ours.weights.embed
    for part, weight in found.items():
        # without an adapter the bytes say it all; merging rounds once, in another order
        limit = 0.0 if name == "smollm2-135m" else 1e-6
        assert float((weight - theirs[part]).abs().max()) <= limit, part


def test_logits_equal_on_real_text(
    model: tuple[str, Model], references: dict[str, Reference], texts: dict[str, torch.Tensor]
) -> None:
    name, ours = model
    for text, ids in texts.items():
        theirs = references[name].logits[text]
        logits = forward_tokens(ours, ids)
        bound = TOLERANCE * float(theirs.abs().max())
        assert float((logits - theirs).abs().max()) <= bound, text

        top = theirs.topk(2).values
        clear = top[:, 0] - top[:, 1] > 2 * bound
        assert torch.equal(logits.argmax(-1)[clear], theirs.argmax(-1)[clear]), text
        assert int(clear.sum()) > 0.99 * len(ids)


def test_rows_over_a_cache_equal_the_dense_pass(
    model: tuple[str, Model], texts: dict[str, torch.Tensor], dense_cache: Callable[[Model], Any]
) -> None:
    _, ours = model
    ids = texts["documentation"][:240]
    dense = forward_tokens(ours, ids)
    cache, start, parts = dense_cache(ours), 0, []
    for size in (100, 75, 1, 1, 50, 13):
        positions = torch.arange(start, start + size)
        parts.append(ours.logits(forward_rows(ours, [Rows(ids[positions], positions, cache, len(ids))])))
        start += size

    assert start == len(ids)
    assert float((torch.cat(parts) - dense).abs().max()) <= TOLERANCE * float(dense.abs().max())
