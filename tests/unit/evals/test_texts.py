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


def test_heldout_tenths_are_written_once_and_are_all_that_is_needed(tmp_path, monkeypatch):
    texts_by_name = {"king_james_bible": "ab\r\n" * 50, "python_documentation": "cd" * 50, "debian_manuals": "é" * 50}
    with monkeypatch.context() as patched:
        for name, text in texts_by_name.items():
            patched.setattr(texts, name, lambda folder, text=text: text)
        first = texts.heldout_texts(tmp_path)
    assert first == {"bible": "ab\r\n" * 5, "python": "cd" * 5, "debian": "é" * 5}
    assert texts.heldout_texts(tmp_path) == first
    with pytest.raises(texts.TextMissing, match=r"scripts/fetch_texts\.sh"):
        texts.heldout_texts(tmp_path / "elsewhere")
