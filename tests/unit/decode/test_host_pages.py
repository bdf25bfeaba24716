"""The arena of pages in host memory."""

from __future__ import annotations

import pytest
import torch

from kvsluice.errors import ConfigError
from kvsluice.services.decode.host_pages import HostPages

CPU = torch.device("cpu")


def test_pages_come_back_when_they_are_dropped() -> None:
    arena = HostPages(1000, CPU, 64)
    assert (arena.num_pages, arena.capacity_bytes, arena.num_free) == (15, 960, 15)
    first, second = arena.take(4), arena.take(11)
    addresses = [view.data_ptr() for held in (first, second) for view in held.views]
    assert len(set(addresses)) == 15
    assert all(view.shape == (64,) for view in first.views)
    arena.check_integrity()
    assert arena.num_free == 0
    view = second.views[0]
    del second
    assert arena.num_free == 11, "a view of a page does not hold it"
    assert view.shape == (64,)
    again = arena.take(11)
    assert {v.data_ptr() for v in again.views} == set(addresses[4:])
    del first, again
    arena.check_integrity()
    assert arena.num_free == 15


def test_pages_that_an_exception_holds_are_found() -> None:
    """A cycle, as an exception's traceback makes one, is collected where its pages are needed."""
    arena = HostPages(256, CPU, 64)
    cycle: list = [arena.take(4)]
    cycle.append(cycle)
    del cycle
    assert arena.num_free == 0
    assert len(arena.take(4).views) == 4


def test_more_than_there_are_is_a_fault_of_the_caller() -> None:
    arena = HostPages(256, CPU, 64)
    with pytest.raises(AssertionError, match="5 pages of 4"):
        arena.take(5)
    assert arena.num_free == 4


@pytest.mark.parametrize(("capacity", "page", "named"), [(63, 64, "kv_offloading_bytes"), (640, 24, "page_nbytes")])
def test_sizes_that_make_no_arena_are_refused(capacity: int, page: int, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        HostPages(capacity, CPU, page)


def test_pages_that_follow_each_other_are_one_piece() -> None:
    arena = HostPages(640, CPU, 64)
    first, second, third = arena.take(2), arena.take(3), arena.take(1)
    assert [span.shape for span in second.spans] == [(192,)]
    assert second.spans[0].data_ptr() == second.views[0].data_ptr()
    del first, third
    arena.check_integrity()
    again = arena.take(5)
    assert [span.shape for span in again.spans] == [(128,), (192,)]
    assert [span.data_ptr() for span in again.spans] == [again.views[0].data_ptr(), again.views[2].data_ptr()]
    arena.check_integrity()
