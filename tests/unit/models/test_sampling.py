"""Sampling against transformers' processors, its distribution, and what it may depend on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsluice.errors import InternalError, InvalidRequest
from kvsluice.models import drawing
from kvsluice.models.drawing import draw_rows, gumbel_noise
from kvsluice.models.sampling import PromptIds, Sampled, SamplerState, SamplingParams, draw_key, sample_rows

VOCAB = 50
EOS = 3
PROMPT = [7, 7, 11, 30]
FEW_KEYS = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 2, 1 << 40))
# the first token's noise of each
NOISE = [0.037813, 0.685626, -0.547451, -0.026356, 0.55808]


def logits_of(seed: int, scale: float = 3.0, vocab: int = VOCAB) -> torch.Tensor:
    return scale * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


def state(choice: int = 0, prompt: list[int] | None = None, **params: Any) -> SamplerState:
    defaults: dict[str, Any] = {"max_tokens": 1000, "ignore_eos": True}
    return SamplerState(
        SamplingParams(**(defaults | params)), choice, PROMPT if prompt is None else prompt, VOCAB, (EOS,)
    )


def support(logits: torch.Tensor, draws: int = 4000, **params: Any) -> set[int]:
    """Ids that sampling can give, by drawing with many seeds."""
    return {state(seed=seed, **params).sample(logits).token_id for seed in range(draws)}


# --- greedy -------------------------------------------------------------------------------------------------


def test_temperature_zero_takes_the_largest_logit_whatever_the_filters() -> None:
    for seed in range(20):
        logits = logits_of(seed)
        sampled = state(temperature=0, top_p=0.1, top_k=3, min_p=0.5, seed=seed).sample(logits)
        assert sampled.token_id == int(logits.argmax())


def test_tiny_temperatures_are_greedy_and_do_not_overflow() -> None:
    logits = logits_of(1, scale=1e4)
    for temperature in (1e-300, 1e-6, 1e-5):
        assert state(temperature=temperature).sample(logits).token_id == int(logits.argmax())


def test_logits_are_left_alone() -> None:
    logits = logits_of(2)
    before = logits.clone()
    sampler = state(
        repetition_penalty=1.5, presence_penalty=1.0, logit_bias={4: 5.0}, min_tokens=5, top_k=3, top_p=0.5, logprobs=2
    )
    for _ in range(3):
        sampler.sample(logits)
    assert torch.equal(logits, before)


# --- processors against transformers ------------------------------------------------------------------------


def processed(logits: torch.Tensor, emitted: list[int], **params: Any) -> torch.Tensor:
    sampler = state(**params)
    for token in emitted:
        sampler.force(token)
    return sampler.changed(logits)


def test_repetition_penalty_is_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, emitted = logits_of(3), [12, 12, 40]
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([PROMPT + emitted]), logits[None].clone())[0]

    assert torch.equal(processed(logits, emitted, repetition_penalty=1.7), theirs)
    assert torch.equal(
        processed(logits, emitted, repetition_penalty=0.5)[12:13], logits[12:13] * 2 ** logits[12].sign()
    )


def test_min_tokens_masks_what_ends_a_choice_as_transformers_does() -> None:
    from transformers import MinNewTokensLengthLogitsProcessor

    logits = logits_of(4)
    for emitted in ([], [8], [8, 9], [8, 9, 10]):
        ids = torch.tensor([PROMPT + emitted])
        processor = MinNewTokensLengthLogitsProcessor(len(PROMPT), 3, [EOS, 21], device="cpu")
        theirs = processor(ids, logits[None].clone())[0]
        ours = processed(logits, emitted, min_tokens=3, stop_token_ids=(21,), ignore_eos=False)
        assert torch.equal(ours, theirs)


def test_logit_bias_is_transformers() -> None:
    from transformers import SequenceBiasLogitsProcessor

    logits, bias = logits_of(5), {0: 4.5, 49: -100.0, 7: 0.25}
    processor = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    theirs = processor(torch.tensor([PROMPT]), logits[None].clone())[0]

    assert torch.equal(processed(logits, [], logit_bias=bias), theirs)


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    logits = logits_of(6)
    scores = processed(logits, [12, 40, 12], presence_penalty=0.5, frequency_penalty=0.25)

    expected = logits.clone()
    expected[12] -= 0.5 + 2 * 0.25
    expected[40] -= 0.5 + 0.25
    assert torch.equal(scores, expected)


def test_choices_share_what_is_made_of_their_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(list[int]):
        reads = 0

        def __iter__(self) -> Any:
            Counted.reads += 1
            return super().__iter__()

        def __getitem__(self, index: Any) -> Any:
            Counted.reads += 1
            return super().__getitem__(index)

    params = SamplingParams(max_tokens=9, temperature=0.8, repetition_penalty=1.4, frequency_penalty=0.5, n=5, seed=3)
    prompt = PromptIds(Counted(PROMPT))
    shared = [SamplerState(params, choice, prompt, VOCAB, ()) for choice in range(5)]
    alone = [SamplerState(params, choice, PROMPT, VOCAB, ()) for choice in range(5)]
    made = []
    tensor = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda data, **more: made.append(len(data)) or tensor(data, **more))
    for step in range(6):
        logits = logits_of(step)
        assert [s.sample(logits) for s in shared] == [s.sample(logits) for s in alone]
        if step == 0:
            read = Counted.reads
            # the prompt once for the request, and once for each choice that has its own
            assert [size for size in made if size == len(PROMPT)] == [len(PROMPT)] * 6
            made.clear()
    # a token costs its own id, whatever the lengths of prompt and output
    assert set(made) == {1} and Counted.reads == read


def test_penalties_leave_the_prompts_part_as_it_is() -> None:
    prompt, device = PromptIds(PROMPT), torch.device("cpu")
    params = SamplingParams(repetition_penalty=2.0, temperature=0)
    for choice in range(3):
        sampler = SamplerState(params, choice, prompt, VOCAB, ())
        sampler.force(40 + choice)
        sampler.sample(logits_of(choice))

    assert prompt.seen(VOCAB, device).nonzero().flatten().tolist() == sorted(set(PROMPT))


def test_order_is_mask_then_bias_then_penalties() -> None:
    logits = torch.full((VOCAB,), -1.0)
    # the biased logit is positive, so the penalty divides it; before the bias it would have multiplied
    scores = processed(logits, [5], logit_bias={5: 3.0, EOS: 100.0}, repetition_penalty=2.0, min_tokens=4)

    assert float(scores[5]) == 1.0
    assert float(scores[EOS]) == -math.inf


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.8])
@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        ({"top_k": 5}, [("TopKLogitsWarper", {"top_k": 5})]),
        ({"top_p": 0.6}, [("TopPLogitsWarper", {"top_p": 0.6})]),
        ({"min_p": 0.2}, [("MinPLogitsWarper", {"min_p": 0.2})]),
        (
            {"min_p": 0.02, "top_k": 9, "top_p": 0.8},
            [
                ("MinPLogitsWarper", {"min_p": 0.02}),
                ("TopKLogitsWarper", {"top_k": 9}),
                ("TopPLogitsWarper", {"top_p": 0.8}),
            ],
        ),
    ],
)
def test_filters_leave_what_transformers_warpers_leave(
    params: dict[str, Any], warpers: list[tuple[str, dict[str, Any]]], temperature: float
) -> None:
    import transformers

    logits = logits_of(7, scale=1.5)
    theirs = logits[None] / temperature
    for name, arguments in warpers:
        theirs = getattr(transformers, name)(**arguments)(torch.tensor([PROMPT]), theirs)
    probabilities = theirs[0].softmax(-1)
    # what 4000 draws cannot miss but with a probability of e^-12 an id
    likely = {i for i in range(VOCAB) if probabilities[i] > 12 / 4000}

    found = support(logits, temperature=temperature, **params)

    assert likely <= found <= {i for i in range(VOCAB) if probabilities[i] > 0}


def test_filters_always_leave_a_token() -> None:
    logits = logits_of(8)
    for params in ({"top_p": 1e-9}, {"top_k": 1}, {"min_p": 1.0}):
        assert support(logits, draws=50, **params) == {int(logits.argmax())}
    # more than the vocabulary is no filter
    assert state(top_k=10_000, seed=5).sample(logits) == state(seed=5).sample(logits)


# --- random numbers -----------------------------------------------------------------------------------------


def test_draws_follow_the_distribution() -> None:
    logits = logits_of(9, scale=1.0, vocab=12)
    draws = 6000
    counts = torch.zeros(12)
    for position in range(draws // 2):
        for choice in (0, 1):
            sampler = SamplerState(SamplingParams(temperature=1.3, seed=99), choice, [0] * position, 12, ())
            counts[sampler.sample(logits).token_id] += 1

    expected = draws * (logits / 1.3).softmax(-1)
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    # 11 degrees of freedom: mean 11, and 45 is exceeded once in 200,000 seeds
    assert chi_square < 45


def test_noise_is_gumbels_and_uncorrelated() -> None:
    keys = torch.tensor([draw_key(seed, choice, 5) for choice in range(20) for seed in range(100)])
    noise = gumbel_noise(keys, 50)
    assert noise.isfinite().all()

    # 19 degrees of freedom, over all and over one token's
    for values in (noise.flatten(), noise[:, 7]):
        uniform = (-(-values.double()).exp()).exp()
        expected = len(uniform) / 20
        assert float(((torch.histc(uniform, bins=20, min=0, max=1) - expected) ** 2 / expected).sum()) < 60
    for rows in (noise.T, noise.view(20, -1)):  # of tokens, of choices
        assert float(torch.corrcoef(rows).fill_diagonal_(0).abs().max()) < 0.25


def test_noise_is_alike_everywhere() -> None:
    # fixed values: another machine or version must draw the same
    noise = gumbel_noise(torch.tensor([draw_key(*key) for key in FEW_KEYS]), 1)
    assert noise[:, 0].tolist() == pytest.approx(NOISE, abs=1e-5)


@pytest.mark.parametrize("bits", [0, -1])
def test_noise_of_the_least_and_the_largest_bits_is_finite(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    shifted = drawing._shifted
    monkeypatch.setattr(drawing, "_shifted", lambda mixed, by: shifted(torch.full_like(mixed, bits), by))
    monkeypatch.setattr(drawing, "_MIX", (0, 0))
    noise = gumbel_noise(torch.tensor([3]), 2)
    assert noise.isfinite().all() and noise.unique().numel() == 1


def test_other_roundings_of_the_logits_hardly_ever_change_a_draw() -> None:
    # a flat distribution, where every token's part is as small as rounding
    logits = logits_of(11, scale=0.3, vocab=50_000)
    states = [SamplerState(SamplingParams(seed=seed), 0, [], 50_000, ()) for seed in range(100)]
    generator, changed = torch.Generator().manual_seed(12), 0
    for state in states:
        rounded = logits + 1e-3 * torch.randn(50_000, generator=generator)
        ids = [draw_rows([state], one[None]).read()[0].token_id for one in (logits, rounded)]
        changed += ids[0] != ids[1]
    # an inverse of the cumulative distribution changes about fifteen of them
    assert changed <= 1


def test_a_draw_depends_on_seed_choice_and_position_only() -> None:
    logits = logits_of(10, scale=0.5)
    base = [state(seed=4, choice=1).sample(logits) for _ in range(3)]
    assert base[0] == base[1] == base[2]

    # where the prompt ends does not matter, only the position of the token
    moved = state(seed=4, choice=1, prompt=PROMPT[:2])
    moved.force(11)
    moved.force(30)
    assert moved.sample(logits) == base[0]

    ids = {state(seed=seed, choice=choice).sample(logits).token_id for seed in range(5) for choice in range(5)}
    assert len(ids) > 8


def test_replay_continues_as_if_never_interrupted() -> None:
    params = {"temperature": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "seed": 8, "min_tokens": 4}
    first, second = state(**params), state(**params)
    tokens = [first.sample(logits_of(i)) for i in range(10)]
    for sampled in tokens[:6]:
        second.force(sampled.token_id)

    assert second.num_sampled == 6
    assert [second.sample(logits_of(i)) for i in range(6, 10)] == tokens[6:]


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-60, 60, width=32), min_size=2, max_size=30),
    temperature=st.floats(0.01, 5),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    seed=st.integers(-(1 << 63), (1 << 63) - 1),
)
def test_only_tokens_with_a_probability_are_drawn(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    values = torch.tensor(logits)
    masked = values.clone()
    masked[0] = -math.inf

    token = SamplerState(params, 0, [], len(logits), ()).sample(masked).token_id

    assert 1 <= token < len(logits)
    if top_k:
        assert int((masked > masked[token]).sum()) < top_k


# --- log-probabilities and ends -----------------------------------------------------------------------------


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = logits_of(11)
    expected = logits.log_softmax(-1)
    params = {"temperature": 0.1, "top_k": 2, "logit_bias": {9: 100.0}, "repetition_penalty": 1.9}

    sampled = state(logprobs=3, **params).sample(logits)

    assert sampled.token_id == 9
    assert sampled.logprob == pytest.approx(float(expected[9]))
    assert [token for token, _ in sampled.top] == expected.topk(3).indices.tolist()
    assert [value for _, value in sampled.top] == pytest.approx(expected.topk(3).values.tolist())
    only = state(logprobs=0, **params).sample(logits)
    assert only.logprob == sampled.logprob and only.top == []
    assert state(**params).sample(logits) == Sampled(9)


def one_hot(token: int) -> torch.Tensor:
    logits = torch.zeros(VOCAB)
    logits[token] = 50.0
    return logits


def test_ends() -> None:
    def run(tokens: list[int], **params: Any) -> list[tuple[str, int | None]]:
        sampler = state(temperature=0, **params)
        return [(s.finish_reason, s.stop_token) for s in (sampler.sample(one_hot(t)) for t in tokens)]

    assert run([5, EOS], ignore_eos=False) == [("", None), ("stop", EOS)]
    assert run([5, EOS, 6], ignore_eos=True, max_tokens=3) == [("", None), ("", None), ("length", None)]
    assert run([5, 21], stop_token_ids=(21,)) == [("", None), ("stop", 21)]
    # the end of the text goes before the limit
    assert run([EOS], ignore_eos=False, max_tokens=1) == [("stop", EOS)]
    assert run([EOS], ignore_eos=False, stop_token_ids=(EOS,)) == [("stop", EOS)]
    # masked until there are enough tokens
    assert [reason for reason, _ in run([EOS, EOS, EOS], ignore_eos=False, min_tokens=2)] == ["", "", "stop"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(temperature: float, value: float) -> None:
    logits = logits_of(12)
    logits[17] = value
    with pytest.raises(InternalError):
        state(temperature=temperature).sample(logits)
    with pytest.raises(InternalError):
        state(temperature=temperature).sample(torch.full((VOCAB,), -math.inf))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-38),
        ("repetition_penalty", 10.5),
        ("max_tokens", 2.5),
        ("max_tokens", True),
        ("max_tokens", 10**400),
        ("temperature", 10**400),
        ("top_k", 1.0),
        ("seed", 0.5),
        ("presence_penalty", 2.5),
        ("frequency_penalty", math.nan),
        ("min_tokens", 17),
        ("n", 0),
        ("seed", 1 << 64),
        ("logprobs", 21),
        ("logit_bias", {3: 101.0}),
    ],
)
def test_values_out_of_range_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == f"sampling.{field}"
    assert caught.value.allowed


def test_asking_that_every_token_be_masked_is_the_requests_fault() -> None:
    with pytest.raises(InvalidRequest, match=r"sampling\.min_tokens"):
        state(min_tokens=1, stop_token_ids=tuple(i for i in range(VOCAB) if i != EOS))
    assert (
        state(min_tokens=1, stop_token_ids=tuple(i for i in range(VOCAB) if i != 9)).sample(logits_of(1)).token_id == 9
    )
    # nothing is masked without a minimum
    state(stop_token_ids=tuple(range(VOCAB))).sample(logits_of(1))


@pytest.mark.parametrize("params", [{"logit_bias": {VOCAB: 1.0}}, {"logit_bias": {-1: 1.0}}, {"stop_token_ids": (99,)}])
def test_ids_outside_the_vocabulary_name_the_field(params: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=f"sampling.{next(iter(params))}"):
        state(**params)


def test_rows_drawn_together_are_those_drawn_alone() -> None:
    rows = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.7, "logprobs": 2},
        {"min_p": 0.1, "logit_bias": {3: 4.0}, "logprobs": 5},
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"top_k": 10_000, "frequency_penalty": 0.5, "min_tokens": 3, "stop_token_ids": (7,)},
        {"temperature": 0.0, "logprobs": 0},
    ]
    together = [state(seed=i, **params) for i, params in enumerate(rows)]
    alone = [state(seed=i, **params) for i, params in enumerate(rows)]
    for step in range(12):
        logits = torch.stack([logits_of(100 * step + i) for i in range(len(rows))])
        before = logits.clone()
        assert sample_rows(together, logits) == [one.sample(row) for one, row in zip(alone, logits, strict=True)]
        assert torch.equal(logits, before)


def test_a_row_without_finite_numbers_leaves_the_others_alone() -> None:
    states = [state(temperature=temperature) for temperature in (0.0, 0.0, 1.0, 1.0)]
    logits = torch.stack([logits_of(i) for i in range(4)])
    logits[1] = logits[2] = float("nan")
    drawn = sample_rows(states, logits)
    assert [isinstance(one, InternalError) for one in drawn] == [False, True, True, False]
    assert [one.num_sampled for one in states] == [1, 0, 0, 1]


def test_tokens_that_only_the_device_knows_count_as_those_that_are_told() -> None:
    params = {"repetition_penalty": 1.5, "frequency_penalty": 0.7, "min_tokens": 4, "stop_token_ids": (7,)}
    told, ahead = state(seed=3, **params), state(seed=3, **params)
    for sampler in (told, ahead):
        sampler.force(11)
    expected, drawn = [], []
    for step in range(10):
        logits = logits_of(step)[None]
        expected.append(sample_rows([told], logits)[0].token_id)
        drawn.append(draw_rows([ahead], logits))
        ahead.force_drawn(drawn[-1].ids, 0)
    assert [one.read()[0].token_id for one in drawn] == expected
    assert ahead.num_sampled == told.num_sampled == 11


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_drawn_from_no_numbers_is_still_a_token(temperature: float) -> None:
    logits = torch.full((3, VOCAB), float("nan"))
    logits[1] = float("-inf")
    drawn = draw_rows([state(temperature=temperature, logprobs=2) for _ in range(3)], logits)
    assert 0 <= int(drawn.ids.min()) <= int(drawn.ids.max()) < VOCAB, "the next step looks it up"
    assert [(one.is_valid, one.is_finite) for one in drawn.read()] == [(False, False)] * 3
