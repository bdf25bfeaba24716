"""Key names: another identity is another name, and no name tells what a request holds."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsluice.kvstore.identity import (
    FrameIdent,
    content_key,
    frame_key,
    head_key,
    manifest_key,
    sequence_key,
)

IDENT = FrameIdent(request_id="r", epoch=1, tenant="t", model_fingerprint="m", recipe_fingerprint="c")
OTHERS = [
    replace(IDENT, request_id="x"),
    replace(IDENT, tenant="x"),
    replace(IDENT, model_fingerprint="x"),
    replace(IDENT, recipe_fingerprint="x"),
    replace(IDENT, tenant="tm", model_fingerprint=""),
    replace(IDENT, tenant="m", model_fingerprint="t"),
]


@pytest.mark.parametrize("name", [sequence_key, head_key, manifest_key, lambda ident: frame_key(ident, 0)])
def test_every_part_of_an_identity_is_in_every_name(name):
    names = {name(ident) for ident in [IDENT, *OTHERS]}
    assert len(names) == 1 + len(OTHERS)


def test_the_epoch_is_in_every_name_but_the_head_s():
    later = replace(IDENT, epoch=2)
    assert frame_key(later, 0) != frame_key(IDENT, 0)
    assert manifest_key(later) != manifest_key(IDENT)
    assert head_key(later) == head_key(IDENT)


def test_epoch_and_index_cannot_be_confused():
    names = {frame_key(replace(IDENT, epoch=epoch), index) for epoch in range(12) for index in range(12)}
    assert len(names) == 144


@given(st.lists(st.text(max_size=4), max_size=4), st.lists(st.text(max_size=4), max_size=4))
def test_content_keys_of_different_parts_differ(left, right):
    assert (content_key("p", *left) == content_key("p", *right)) == (left == right)


def test_content_keys_of_shifted_borders_differ():
    split = [("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc"), ("abc",), ("a", "b", "c")]
    keys = [content_key("p", *parts) for parts in split]
    assert all(one != other for one, other in combinations(keys, 2))
    assert content_key("pa", "b") != content_key("p", "ab")


def test_names_hold_no_text_of_the_request():
    secret = replace(IDENT, request_id="my-secret:\n*", tenant="bank\x00")
    for name in (head_key(secret), manifest_key(secret), frame_key(secret, 3)):
        assert re.fullmatch(r"kvsluice:(head|manifest|frame):[0-9a-f]{64}(:1)?(:3)?", name)
