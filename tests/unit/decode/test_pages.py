"""The ledger of cache memory."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsluice.errors import ConfigError
from kvsluice.services.decode.pages import PagePool, Region


def test_a_reservation_is_whole_or_not_at_all() -> None:
    pool = PagePool(100)
    assert pool.reserve({Region("a"): 60, Region("a", 0): 10})
    assert not pool.reserve({Region("b"): 20, Region("b", 0): 20})
    assert pool.regions() == {Region("a"): 60, Region("a", 0): 10}
    assert pool.free_bytes == 30
    pool.check_integrity()


def test_the_last_holder_frees_a_region() -> None:
    pool = PagePool(100)
    pool.reserve({Region("a"): 60})
    pool.retain(Region("a"))
    pool.release(Region("a"))
    assert pool.used_bytes == 60
    pool.release(Region("a"))
    assert pool.used_bytes == 0
    assert pool.high_water_bytes == 60
    pool.check_integrity()


def test_misuse_is_caught() -> None:
    pool = PagePool(10)
    pool.reserve({Region("a"): 1})
    with pytest.raises(AssertionError):
        pool.reserve({Region("a"): 1})
    with pytest.raises(AssertionError):
        pool.release(Region("b"))
    with pytest.raises(AssertionError):
        pool.retain(Region("b"))
    with pytest.raises(ConfigError, match="capacity_bytes"):
        PagePool(0)


def test_integrity_notices_a_lost_byte() -> None:
    pool = PagePool(10)
    pool.reserve({Region("a"): 4})
    pool._used_bytes -= 1
    with pytest.raises(AssertionError, match="make up"):
        pool.check_integrity()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["reserve", "retain", "release"]), st.integers(0, 5), st.integers(0, 40))))
def test_any_sequence_of_calls_keeps_the_books(calls: list) -> None:
    pool = PagePool(100)
    held: dict[Region, list[int]] = {}
    for verb, name, size in calls:
        region = Region(str(name))
        if verb == "reserve" and region not in held:
            fits = sum(s for s, _ in held.values()) + size <= 100
            assert pool.reserve({region: size}) is fits
            if fits:
                held[region] = [size, 1]
        elif verb == "retain" and region in held:
            pool.retain(region)
            held[region][1] += 1
        elif verb == "release" and region in held:
            pool.release(region)
            held[region][1] -= 1
            if held[region][1] == 0:
                del held[region]
        pool.check_integrity()
        assert pool.regions() == {region: size for region, (size, _) in held.items()}
