"""Greedy tokens of both engines together, against transformers' own generate, by the rule of `evals.parity`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from kvsluice.evals import parity
from kvsluice.evals.pipeline import Generation, LocalPipeline
from kvsluice.evals.reference_model import load_base
from kvsluice.models.loader import load_model
from kvsluice.models.sampling import SamplingParams
from kvsluice.models.tokenizer import load_tokenizer

MAX_TOKENS = 16

PROMPTS = {
    "chat": "What is gravity, in one sentence?",
    "code": "Write a Python function that returns the n-th Fibonacci number.",
    "french": "Traduis en anglais : le chat dort sur le canapé rouge.",
    "chinese": "请用一句话介绍长城。",
    "list": "Name five rivers of Europe.",
    "story": "Continue the story: the lamp went out and the captain heard a knock",
    "sum": "Add 17 and 25, then double the result. Show each step.",
    "document": "Summarise this text. " + "The harbour was built in stages, and each stage changed the town. " * 25,
}


def reference(model: Any, ids: Sequence[int]) -> parity.Reference:
    return parity.generate_reference(model, ids, MAX_TOKENS, ignore_eos=True)


def near_ties(model: Any, ids: Sequence[int], answer: Generation, wanted: parity.Reference) -> int:
    """0 when the tokens are equal, 1 when they part at a near tie; anything else fails."""
    (tokens,), (sampled,) = answer.token_ids, answer.sampled
    verdict = parity.judge(model, ids, tokens, wanted)
    assert len(tokens) == MAX_TOKENS
    assert verdict.first_difference is None, f"got {tokens}, wanted {wanted.tokens}"
    for token, logprob in zip(sampled, verdict.logprobs, strict=True):
        assert abs(token.logprob - logprob) < parity.NOISE
    return int(tokens != wanted.tokens)


def greedy() -> SamplingParams:
    return SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True, logprobs=0)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """A random Llama of transformers, and the same one in our engines."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=503,
        max_position_embeddings=1024,
        initializer_range=0.2,  # wide, so that logits differ and answers do not loop
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    return model, load_model(str(folder))


@pytest.fixture(scope="module")
def smollm2():
    return load_base(), load_model("smollm2-135m"), load_tokenizer("smollm2-135m")


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Callable[[str, int, int], None]:
    def show(what: str, ties: int, total: int) -> None:
        with capsys.disabled():
            print(f"\n{what}: {total - ties} of {total} answers equal, {ties} part at a near tie")

    return show


@pytest.mark.parametrize("chunk", [16, 512])
def test_a_random_model(tiny, report, chunk: int) -> None:
    hf, model = tiny
    generator = torch.Generator().manual_seed(1)
    lengths = (1, 2, 15, 16, 17, 100, 300)
    prompts = [torch.randint(3, 503, (length,), generator=generator).tolist() for length in lengths]
    pipeline = LocalPipeline(model, chunk_tokens=chunk, max_pack_tokens=max(chunk, 64))
    wanted = [reference(hf, ids) for ids in prompts]
    assert len({token for answer in wanted for token in answer.tokens}) > 50, "the answers say something"
    answers = pipeline.generate_many([(ids, "exact", greedy()) for ids in prompts])
    answers += [pipeline.generate(ids, "exact", greedy()) for ids in prompts]
    ties = sum(near_ties(hf, *each) for each in zip(prompts * 2, answers, wanted * 2, strict=True))
    report("random Llama", ties, 2 * len(prompts))
    pipeline.check_integrity()


def test_smollm2_singly_and_eight_at_once(smollm2, report) -> None:
    hf, model, tokenizer = smollm2
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in PROMPTS.values()]
    wanted = [reference(hf, ids) for ids in prompts]
    pipeline = LocalPipeline(model, chunk_tokens=64, max_pack_tokens=256)
    together = pipeline.generate_many([(ids, "exact", greedy()) for ids in prompts])
    ties = sum(near_ties(hf, *each) for each in zip(prompts, together, wanted, strict=True))
    report("SmolLM2-135M, eight at once", ties, len(prompts))
    some = (0, 3, 7)  # the running service's tests take all of them singly
    singly = [pipeline.generate(prompts[i], "exact", greedy()) for i in some]
    ties = sum(near_ties(hf, prompts[i], answer, wanted[i]) for i, answer in zip(some, singly, strict=True))
    report("SmolLM2-135M, singly", ties, len(some))
    pipeline.check_integrity()
