"""The task generator: samples never change, and are what they claim to be."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from pathlib import Path
from random import Random

import pytest

from kvsluice.evals.reference_model import BASE_MODEL
from kvsluice.evals.tasks import BEFORE_ANSWER, END_OF_TURN, SUITE, Sample, TaskMaker, training_sample
from kvsluice.models.tokenizer import load_tokenizer

# hashes of the samples that the adapter's training generator made with the tokenizer and texts below
HASHES = json.loads((Path(__file__).parent / "task_hashes.json").read_text())
PIECES = re.compile(r"<\|\w+\|>|\d|\w+|\s|[^\w\s]")


def encode(text: str) -> list[int]:
    return [zlib.crc32(piece.encode()) % 50_000 for piece in PIECES.findall(text)]


@pytest.fixture(scope="module")
def maker() -> TaskMaker:
    random = Random(7)
    return TaskMaker(encode, [[random.randrange(50_000) for _ in range(9000)] for _ in range(3)])


def make(maker: TaskMaker, name: str) -> Sample:
    task, size, seed = name.split("/")
    if task == "training":
        return training_sample(maker, Random(f"train{size}{seed}"), int(size))
    return SUITE[task](maker, Random(f"{task}{size}{seed}"), int(size))


@pytest.mark.parametrize("task", [*SUITE, "training"])
def test_samples_of_a_seed_never_change(maker, task):
    names = [name for name in HASHES if name.startswith(task + "/")]
    assert names
    for name in names:
        sample = make(maker, name)
        packed = json.dumps([sample.prompt_ids, sample.answer_ids]).encode()
        assert hashlib.sha256(packed).hexdigest()[:16] == HASHES[name], name


@pytest.mark.parametrize(
    "task", [name for name in SUITE if name not in ("niah_multikey_2", "niah_multikey_3", "quote")]
)
def test_samples_have_the_length_asked_for(maker, task):
    sample = SUITE[task](maker, Random(3), 3000)
    assert len(sample.prompt_ids) + len(sample.answer_ids) == 3000


@pytest.fixture(scope="module")
def real_maker() -> TaskMaker:
    tokenizer = load_tokenizer(BASE_MODEL)
    text = "It is 7388057 o'clock; nothing\n\tmoves in the garden -- 42 birds, über alles, wait. " * 200
    return TaskMaker(tokenizer.encode, [tokenizer.encode(text)])


@pytest.mark.parametrize("task", SUITE)
def test_the_models_tokenizer_makes_the_samples_that_the_adapter_saw(real_maker, task):
    sample = SUITE[task](real_maker, Random(task), 1500)
    packed = json.dumps([sample.prompt_ids, sample.answer_ids]).encode()
    assert hashlib.sha256(packed).hexdigest()[:16] == HASHES[f"smollm2/{task}"]


def find(needle: list[int], hay: list[int]) -> int:
    return next((i for i in range(len(hay)) if hay[i : i + len(needle)] == needle), -1)


def test_a_fact_stands_before_its_question(maker):
    sample = SUITE["niah_single_2"](maker, Random(5), 2000)
    value = sample.answer_ids[1 : -len(encode(END_OF_TURN))]
    where = find(value, sample.prompt_ids)
    assert 0 < where < find(encode(BEFORE_ANSWER), sample.prompt_ids)


def test_short_prompts_still_hold_all_facts(maker):
    sample = SUITE["niah_multivalue"](maker, Random(1), 10)
    assert len(sample.prompt_ids) > 100
