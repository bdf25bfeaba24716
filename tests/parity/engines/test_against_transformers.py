"""Greedy tokens of both engines together, against transformers' own generate.

Both compute in fp32, but add in another order: a logit may differ by `NOISE` times the largest logit, as between the
dense passes (tests/parity/models). A difference between tokens therefore counts as equal only where the reference's two
best logits lie within twice that; such cases are counted and printed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

from kvsluice.evals.pipeline import LocalPipeline
from kvsluice.evals.reference_model import load_base
from kvsluice.models.loader import load_model
from kvsluice.models.sampling import SamplingParams
from kvsluice.models.tokenizer import load_tokenizer

NOISE = 2e-5
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


@dataclass
class Reference:
    """Greedy tokens and the logits that they were chosen from, [steps, V]."""

    tokens: list[int]
    logits: torch.Tensor


def reference(model, ids: Sequence[int], max_tokens: int = MAX_TOKENS) -> Reference:
    out = model.generate(
        torch.tensor([list(ids)]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=max_tokens,
        min_new_tokens=max_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return Reference(out.sequences[0, len(ids) :].tolist(), torch.cat(out.logits).float())


def near_ties(got: Sequence[int], wanted: Reference) -> int:
    """0 when the tokens are equal, 1 when they part at a near tie; anything else fails."""
    for step, (a, b) in enumerate(zip(got, wanted.tokens, strict=True)):
        if a != b:
            logits = wanted.logits[step]
            best = logits.topk(2)
            gap, noise = float(best.values[0] - best.values[1]), NOISE * float(logits.abs().max())
            assert a in best.indices.tolist() and gap < 2 * noise, (
                f"step {step}: got {a}, wanted {b}, the best two are {best}"
            )
            return 1
    return 0


def greedy() -> SamplingParams:
    return SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)


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
    ties = sum(near_ties(a.token_ids[0], w) for a, w in zip(answers, wanted, strict=True))
    ties += sum(
        near_ties(pipeline.generate(ids, "exact", greedy()).token_ids[0], w)
        for ids, w in zip(prompts, wanted, strict=True)
    )
    report("random Llama", ties, 2 * len(prompts))
    pipeline.check_integrity()


def test_smollm2_singly_and_eight_at_once(smollm2, report) -> None:
    hf, model, tokenizer = smollm2
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in PROMPTS.values()]
    wanted = [reference(hf, ids) for ids in prompts]
    pipeline = LocalPipeline(model, chunk_tokens=64, max_pack_tokens=256)
    together = pipeline.generate_many([(ids, "exact", greedy()) for ids in prompts])
    ties = sum(near_ties(a.token_ids[0], w) for a, w in zip(together, wanted, strict=True))
    report("SmolLM2-135M, eight at once", ties, len(prompts))
    some = (0, 3, 7)  # the running service's tests take all of them singly
    singly = [pipeline.generate(prompts[i], "exact", greedy()) for i in some]
    ties = sum(near_ties(a.token_ids[0], wanted[i]) for a, i in zip(singly, some, strict=True))
    report("SmolLM2-135M, singly", ties, len(some))
    pipeline.check_integrity()
