"""Stop strings over text that arrives in pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsluice.services.gateway.text import ChoiceText, StopMatcher

letters = st.text("ab", max_size=12)
pieces = st.lists(st.text("ab", max_size=4), max_size=8)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


def run(stops, chunks):
    """What is shown, and the stop string that ended it."""
    matcher = StopMatcher(stops)
    shown = []
    for chunk in chunks:
        step = matcher.push(chunk, True)
        shown.append(step.text)
        if step.stop_match is not None:
            return "".join(shown), step.stop_match
    return "".join(shown) + matcher.finish(), None


def first_match(stops, text):
    """The stop string that is complete first; of several that end together, the one that begins first."""
    found = [(at + len(s), at, s) for s in stops for at in range(len(text)) if text.startswith(s, at)]
    return min(found, default=None)


@given(stop_lists, letters)
def test_letter_by_letter_equals_a_search_of_the_whole(stops, text):
    match = first_match(stops, text)
    shown, stop = run(stops, list(text))
    assert (shown, stop) == ((text, None) if match is None else (text[: match[1]], match[2]))


@given(stop_lists, pieces)
def test_nothing_is_lost_or_shown_too_early(stops, chunks):
    text = "".join(chunks)
    shown, stop = run(stops, chunks)
    assert text.startswith(shown)
    assert (stop is None) == (first_match(stops, text) is None)
    if stop is None:
        assert shown == text
    else:
        assert text[len(shown) :].startswith(stop)
        # a piece may complete one stop string and hold all of a later one; the earlier end counts
        assert first_match(stops, shown + stop)[0] == len(shown) + len(stop)


@given(stop_lists, pieces)
def test_what_is_withheld_is_always_the_start_of_a_stop_string(stops, chunks):
    matcher = StopMatcher(stops)
    pushed = shown = ""
    for chunk in chunks:
        step = matcher.push(chunk, False)
        pushed, shown = pushed + chunk, shown + step.text
        held = pushed[len(shown) :]
        assert any(stop.startswith(held) and stop != held for stop in stops) or held == ""


class Letters:
    """Token ids are code points; the odd letter gives its text one token late."""

    def __init__(self) -> None:
        self.late = ""

    def push(self, ids):
        text = self.late + "".join(map(chr, ids))
        self.late = ""
        if text.endswith("~"):
            text, self.late = text[:-1], "é"
        return text

    def finish(self):
        rest, self.late = self.late, ""
        return rest


@pytest.mark.parametrize(
    ("text", "stops", "min_tokens", "shown", "match"),
    [
        ("abcabc", ["c"], 0, "ab", "c"),
        ("abcabc", ["c"], 3, "abcab", "c"),
        ("abcabc", ["ca"], 3, "ab", "ca"),  # the token that completes it is past the minimum
        ("abcabc", ["abc"], 6, "abcabc", None),
        ("ab~", ["é"], 0, "ab", "é"),  # completed by what the detokenizer held back
        ("ab~", ["xé"], 0, "abé", None),
    ],
)
def test_choice_text(text, stops, min_tokens, shown, match):
    choice = ChoiceText(Letters(), stops, min_tokens)
    out = ""
    for letter in text:
        step = choice.push(ord(letter))
        out += step.text
        if step.stop_match is not None:
            break
    else:
        step = choice.finish()
        out += step.text
    assert (out, step.stop_match) == (shown, match)
