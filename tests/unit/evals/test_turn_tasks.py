"""Five questions over one document: different ones, whose answers stand in it, in an order that says nothing."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest

from kvsluice.evals.suites import ROOM, Case, Questions, Unit
from kvsluice.evals.tasks import BEFORE_ANSWER, END_OF_TURN, TaskMaker
from kvsluice.evals.turn_tasks import BEFORE_NEXT_USER, NUM_TURNS, TURN_SUITE, TurnMaker
from kvsluice.models.checkpoint import DEFAULT_MODEL
from kvsluice.models.tokenizer import load_tokenizer

CONTEXT = 1500


@pytest.fixture(scope="module")
def suite(encode, topics) -> Questions:
    return Questions(encode, topics, 0)


@pytest.fixture(scope="module")
def decode():
    tokenizer = load_tokenizer(DEFAULT_MODEL)
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False)


def answers(case: Case) -> list[tuple[int, ...]]:
    return [case.answer_ids, *(turn.answer_ids for turn in case.later)]


@pytest.mark.parametrize("task", TURN_SUITE)
@pytest.mark.parametrize("sample", range(3))
def test_five_different_questions_are_answered_by_one_document(suite, decode, task, sample):
    case = suite.case(Unit(CONTEXT, sample, task))
    assert len(case.later) + 1 == NUM_TURNS
    questions = [decode(turn.prompt_ids) for turn in case.later]
    opening = decode(case.prompt_ids).rpartition(BEFORE_ANSWER)[2]
    openings = [opening, *(question.rpartition(BEFORE_ANSWER)[2] for question in questions)]
    assert len(set(openings)) == NUM_TURNS, "each answer is opened by what it is about"
    document = decode(case.prompt_ids)
    for answer in answers(case):
        assert decode(answer).removesuffix(END_OF_TURN).strip() in document
    assert len(case.prompt_ids) + len(case.following_ids) <= CONTEXT


@pytest.mark.parametrize("task", TURN_SUITE)
def test_turns_join_as_the_chat_template_joins_them(suite, decode, task):
    case = suite.case(Unit(CONTEXT, 0, task))
    text = decode(case.following_ids)
    assert text.count(END_OF_TURN + BEFORE_NEXT_USER) == NUM_TURNS - 1
    assert text.count(BEFORE_ANSWER) == NUM_TURNS - 1
    assert decode(case.prompt_ids).count("<|im_start|>user") == 1


@pytest.mark.parametrize("task", ["numbers_in_text", "many_numbers"])
def test_values_are_asked_for_by_their_keys(suite, decode, task):
    case = suite.case(Unit(CONTEXT, 1, task))
    document = decode(case.prompt_ids)
    for question, answer in zip([document, *(decode(t.prompt_ids) for t in case.later)], answers(case), strict=True):
        key = question.rpartition("What is the special magic number for ")[2].partition(" ")[0]
        value = decode(answer).removesuffix(END_OF_TURN).strip()
        assert document.count(f"One of the special magic numbers for {key} is: {value}.") == 1


def test_people_are_where_they_went_last(suite, decode):
    case = suite.case(Unit(CONTEXT, 2, "state"))
    document = decode(case.prompt_ids)
    whos = set()
    for question, answer in zip([document, *(decode(t.prompt_ids) for t in case.later)], answers(case), strict=True):
        who = question.rpartition("Where is ")[2].partition(" ")[0]
        place = document.rpartition(f" {who} went to the ")[2].partition(".")[0]
        assert decode(answer).removesuffix(END_OF_TURN).strip() == place
        whos.add(who)
    assert len(whos) == NUM_TURNS


def test_passages_do_not_overlap(encode):
    text = list(range(3000))
    for seed in range(20):
        sample = TURN_SUITE["quote"](TurnMaker(TaskMaker(encode, [text])), Random(seed), 1100)
        starts = sorted(turn.answer_ids[0] for turn in (sample.first, *sample.later))
        assert all(b - a >= 48 for a, b in pairwise(starts))
        for turn in (sample.first, *sample.later):
            assert turn.prompt_ids[-1] + 1 == turn.answer_ids[0]
            assert turn.answer_ids == list(range(turn.answer_ids[0], turn.answer_ids[0] + 24))


def test_no_turn_asks_for_what_lies_in_one_place(suite):
    """Over many samples each turn's fact lies anywhere: the order of questions is drawn apart from that of facts."""
    places = []
    for sample in range(40):
        case = suite.case(Unit(700, sample, "numbers_in_noise"))
        found = [find(answer[:-1], case.prompt_ids) for answer in answers(case)]
        places.append([sorted(found).index(place) for place in found])
    for turn in range(NUM_TURNS):
        assert {order[turn] for order in places} == set(range(NUM_TURNS))


def find(part: tuple[int, ...], whole: tuple[int, ...]) -> int:
    (place,) = [i for i in range(len(whole)) if whole[i : i + len(part)] == part]
    return place


def test_samples_are_fixed_by_their_unit_and_seed(encode, topics, suite):
    unit = Unit(700, 1, "uuids_in_text")
    assert Questions(encode, topics, 0).case(unit) == suite.case(unit)
    others = [Questions(encode, topics, 1).case(unit), suite.case(Unit(700, 2, "uuids_in_text"))]
    assert len({case.following_ids for case in (suite.case(unit), *others)}) == 3


@pytest.mark.parametrize("task", TURN_SUITE)
def test_a_document_without_room_for_five_questions_is_refused_or_told_by_its_length(suite, task):
    try:
        case = suite.case(Unit(256, 0, task))
    except ValueError as exc:
        assert str(256 - ROOM) in str(exc)
    else:
        assert len(case.prompt_ids) + len(case.following_ids) > 256


def test_where_answers_lie_in_what_follows(suite):
    case = suite.case(Unit(CONTEXT, 0, "state"))
    assert [case.following_ids[begin:end] for begin, end in case.answers] == answers(case)


@pytest.mark.parametrize("task", TURN_SUITE)
def test_questions_apart_are_those_of_the_turns_behind_the_same_document(encode, topics, suite, task):
    unit = Unit(CONTEXT, 0, task)
    turns, apart = suite.case(unit), Questions(encode, topics, 0, apart=True).case(unit)
    prompts = [apart.prompt_ids, *(one.prompt_ids for one in apart.apart)]
    assert apart.later == () and len(prompts) == NUM_TURNS and prompts[0] == turns.prompt_ids
    assert len(set(prompts)) == NUM_TURNS, "each asks something else"
    same = next(i for i, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)
    assert min(map(len, prompts)) - same < 100, "they differ in the question alone"
    assert [apart.answer_ids, *(one.answer_ids for one in apart.apart)] == answers(turns)
    assert {one.rule for one in (apart, *apart.apart)} == {turns.rule}
