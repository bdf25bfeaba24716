"""Texts for long prompts."""

from __future__ import annotations

import pytest

from kvsluice.evals import texts


def test_tags_scripts_and_entities_leave_a_page():
    page = "<html><style>p {}</style><p>one &amp; <b>two</b></p>\n\n  <script>x<1</script>three"
    assert texts.without_tags(page).split() == ["one", "&", "two", "three"]


def test_shares_meet_without_overlap():
    text = "abcdefghij"
    assert texts.share(text, 0, 0.9) + texts.share(text, 0.9, 1.0) == text


def test_long_texts_are_tokenized_in_blocks():
    seen: list[int] = []

    def encode(block: str) -> list[int]:
        seen.append(len(block))
        return [len(block)]

    assert texts.token_ids(encode, "x" * 45_000) == [20_000, 20_000, 5_000]
    assert seen == [20_000, 20_000, 5_000]


def test_python_carries_enough_text_for_the_demo():
    assert len(texts.python_topics()) > 200_000


@pytest.mark.parametrize("read", [texts.king_james_bible, texts.python_documentation, texts.debian_manuals])
def test_a_missing_text_says_how_to_get_it(read, tmp_path):
    with pytest.raises(texts.TextMissing, match=r"scripts/fetch_texts\.sh"):
        read(tmp_path)
