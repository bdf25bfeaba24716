"""Captured steps: filled and replayed as often as they are run, and made anew when their shape is."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kvsluice.kernels.step_attention import Block, Layout, RecallBlock, RecallKey, Tables, step_tables
from kvsluice.kernels.step_attention.recalled import JOB_FIELDS
from kvsluice.kernels.step_attention.tables import CHOICE_FIELDS, ITEM_FIELDS, TAIL_FIELDS, AttendKey, ChoiceKey
from kvsluice.services.decode.captured import CapturedSteps

DENSE = Layout("dense", dtype=torch.float32)
CPU = torch.device("cpu")
NUM_LAYERS = 2


class Replays:
    """Does recorded work again, into the place of its first result."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def capture(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.captures += 1
        result = torch.full_like(work(), -1)

        def replay() -> None:
            self.replays += 1
            result.copy_(work())

        return replay, result


def block(number: int, items: int = 2, chunks: int = 0) -> Block:
    """A block whose numbers all say whose it is."""
    made = Block(num_items=items, most_chunks=chunks, most_chosen=min(chunks, 4))
    made.items[AttendKey(DENSE, DENSE, 1, False, False)] = torch.full((NUM_LAYERS, items, ITEM_FIELDS), number)
    made.tails[torch.float32] = torch.full((NUM_LAYERS, 1, TAIL_FIELDS), number)
    if chunks:
        made.choices[ChoiceKey(torch.int8, True, 4, False)] = torch.full((NUM_LAYERS, 1, CHOICE_FIELDS), number)
    return made


def recalling(number: int, most: int = 2, hidden: int = 9) -> Block:
    """The same of a sequence that recalls."""
    made, choice = block(number, chunks=8), ChoiceKey(torch.int8, True, 4, False)
    job = torch.full((JOB_FIELDS,), number)
    made.recall = RecallBlock(RecallKey(0, 4, most, 64, 8, 64, choice), job, block(number, items=3), hidden)
    return made


def compute(inputs: Tensor, tables: Tables) -> Tensor:
    """[rows, 3]: a row's id, its position, and the number in its tail's table."""
    tails = torch.stack(list(tables.tails.values()))[0]
    out = torch.stack((inputs[0], inputs[1], tails[1, :, 0]), dim=1).float()
    for recalled in tables.recalls.values():
        # what comes back is told of the row that the job is of, by the job and by its own tail
        rows = recalled.jobs[:, 0]
        own = torch.stack(list(recalled.tables.tails.values()))[0][1, :, 0]
        assert torch.equal(torch.where(rows >= 0, recalled.jobs[:, 1], 0), torch.where(rows >= 0, own, 0))
        out = out.index_add(
            0, rows.clamp_min(0), torch.stack((0 * own, 0 * own, torch.where(rows >= 0, own, 0)), 1).float()
        )
    return out


@pytest.fixture
def bench() -> SimpleNamespace:
    replays = Replays()
    steps = CapturedSteps(compute, CPU, replays, max_graphs=3)

    def run(ids: list[int], blocks: list[Block]) -> list[list[float]]:
        inputs = torch.tensor([ids, [10 * i for i in ids], [0] * len(ids)])
        return steps.run(inputs, blocks).tolist()

    return SimpleNamespace(replays=replays, run=run)


def wanted(ids: list[int], numbers: list[int]) -> list[list[float]]:
    return [[i, 10 * i, number] for i, number in zip(ids, numbers, strict=True)]


def test_a_shape_is_captured_when_it_comes_back_and_then_replayed(bench):
    a, b = block(7), block(8)
    for step in range(5):
        assert bench.run([step, step + 1], [a, b]) == wanted([step, step + 1], [7, 8])
        assert (bench.replays.captures, bench.replays.replays) == (min(step, 1), step)


def test_tables_follow_rows_that_move_and_sequences_that_come_and_go(bench):
    a, b, c = block(7), block(8), block(9)
    for blocks in ([a, b, c], [a, b, c], [a, c, b], [block(70), c, b], [a, b, c, block(5)], [c, b, a]):
        numbers = [int(one.tails[torch.float32][0, 0, 0]) for one in blocks]
        ids = list(range(3, 3 + len(blocks)))
        assert bench.run(ids, blocks) == wanted(ids, numbers)
    assert bench.replays.captures == 1, "three and four rows are one shape"


def test_tables_that_are_written_over_are_those_made_anew():
    """Blocks of two recipes, replaced by others of the same shape or of another one, in any order."""
    steps, made = CapturedSteps(compute, CPU, None), []
    number = 1
    blocks = [block(1), block(2, chunks=8), block(3), block(4, chunks=8)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        row, kind = (int(torch.randint(4, (), generator=generator)) for _ in range(2))
        number += 1
        items, chunks = (2, 0) if row % 2 == 0 else (2, 8)
        blocks[row] = block(number, items=3 if kind == 0 else items, chunks=2000 if kind == 1 and chunks else chunks)
        tables = steps._tables(tuple(blocks))
        wanted_tables = step_tables(blocks).padded(4)
        for kind_of_table in ("items", "choices", "tails"):
            found, want = getattr(tables, kind_of_table), getattr(wanted_tables, kind_of_table)
            assert found.keys() == want.keys()
            assert all(torch.equal(found[key], want[key]) for key in want)
        assert torch.equal(tables.ranges, wanted_tables.ranges)
        assert tables.most_chunks >= wanted_tables.most_chunks
        made.append(tables)
    assert 1 < len({id(tables) for tables in made}) < 50, "most are written over"


def test_what_may_come_back_follows_the_sequences_that_it_may_come_back_to(bench):
    """Their numbers count twice; one of another key, or with more chunks than there is room for, is another step."""
    a, b, c = recalling(7), recalling(8), block(9)
    steps = ([a, c, b], [a, c, b], [b, c, a], [recalling(70), c, a], [c, a, b], [a, b, recalling(5)], [a, c, c])
    for blocks in (*steps, *steps, [a, c, recalling(6, most=4)], [a, c, recalling(4, hidden=2000)]):
        numbers = [int(one.tails[torch.float32][0, 0, 0]) * (1 + (one.recall is not None)) for one in blocks]
        assert bench.run([3, 4, 5], blocks) == wanted([3, 4, 5], numbers)
    assert bench.replays.captures == 3, "of two, of three, and of one sequence that recalls"


def test_tables_of_several_rows_of_each_sequence_are_those_of_each_row():
    blocks = [block(1), block(2, items=3), block(3)]
    tables = step_tables(blocks).padded(4)
    many = tables.repeated(3)
    assert (many.num_rows, many.num_items) == (12, 3 * tables.num_items)
    (key,) = tables.items
    one, all_of_them = tables.items[key], many.items[key].unflatten(1, (3, -1))
    for again in range(3):
        real = one[..., 0] >= 0
        assert torch.equal(all_of_them[:, again, :, 0][real], one[..., 0][real] + 4 * again)
        assert torch.equal(all_of_them[:, again, :, 7][real], one[..., 7][real] + tables.num_items * again)
        assert (all_of_them[:, again, :, 0][~real] < 0).all()
        rows = many.ranges[4 * again : 4 * again + 4]
        assert torch.equal(rows - torch.tensor([tables.num_items * again, 0]), tables.ranges)
        for dtype, table in tables.tails.items():
            assert torch.equal(many.tails[dtype][:, 4 * again : 4 * again + 4], table)


def test_tables_that_were_brought_up_to_date_half_way_are_filled_anew(bench, monkeypatch):
    a, b, c = block(7), block(8), block(9)
    for _ in range(3):
        bench.run([1, 2], [a, b])
    copy_rows = Tables.copy_rows

    def short_of_memory(self, other: Tables, rows: list[int]) -> None:
        copy_rows(self, other, rows)
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Tables, "copy_rows", short_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            bench.run([1, 2], [c, b])
    assert bench.run([1, 2], [a, b]) == wanted([1, 2], [7, 8])
    assert bench.run([3, 2], [c, b]) == wanted([3, 2], [9, 8])
    assert bench.replays.captures == 1


def test_another_shape_is_another_step(bench):
    for blocks in ([block(1)], [block(1), block(2)], [block(1, chunks=8)], [block(1, items=40)]):
        for _ in range(2):
            bench.run(list(range(len(blocks))), blocks)
    assert bench.replays.captures == 4


def test_only_the_shapes_used_last_are_kept(bench):
    shapes = [[block(1)], [block(1), block(2)], [block(1, chunks=8)], [block(1, items=40)]]
    for blocks in [*shapes, *shapes]:
        bench.run(list(range(len(blocks))), blocks)
    assert bench.replays.captures == 4, "shapes that were only seen push none out"
    bench.run([1], shapes[0])
    assert (bench.replays.captures, bench.replays.replays) == (4, 4), "the first was forgotten"
    bench.run([1], shapes[3])
    assert bench.replays.captures == 4
    bench.run([1], shapes[0])
    assert bench.replays.captures == 5


def test_a_step_that_fails_to_be_captured_is_computed_and_tried_again_a_few_times(bench, monkeypatch, caplog):
    blocks, tries = [block(3)], []

    def fail(work):
        tries.append(work)
        raise RuntimeError("a secret")

    bench.run([1], blocks)
    with monkeypatch.context() as broken:
        broken.setattr(bench.replays, "capture", fail)
        assert bench.run([1], blocks) == wanted([1], [3])
    assert bench.run([2], blocks) == wanted([2], [3])
    assert bench.replays.captures == 1
    monkeypatch.setattr(bench.replays, "capture", fail)
    for step in range(6):
        assert bench.run([step], [block(4, items=40)]) == wanted([step], [4])
    assert len(tries) == 1 + 3
    assert "was not captured: RuntimeError" in caplog.text and "secret" not in caplog.text


def test_the_order_of_sequences_makes_no_other_shape(bench):
    a, b = block(7), block(8, chunks=8)
    b.items[AttendKey(DENSE, DENSE, 4, True, False)] = torch.full((NUM_LAYERS, 1, ITEM_FIELDS), 8)
    for blocks in ([a, b], [b, a], [a, b]):
        bench.run([1, 2], blocks)
    assert bench.replays.captures == 1


def test_without_graphs_every_step_is_computed():
    steps = CapturedSteps(compute, CPU, None)
    for step in range(3):
        assert steps.run(torch.tensor([[step], [1], [0]]), [block(4)]).tolist() == [[step, 1, 4]]
