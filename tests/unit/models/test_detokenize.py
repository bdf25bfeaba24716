"""Streaming equals decoding at once, and gives nothing that it must take back."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE

from kvsluice.models.detokenize import WindowDecoder, byte_alphabet
from kvsluice.models.tokenizer import IncrementalDecoder, Tokenizer, load_tokenizer

REPLACEMENT = "\ufffd"
TEXT = "Grüße 日本語 🙂👩‍👩‍👧 नमस्ते שלום é ok"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("smollm2-135m")


def pieces(stream: IncrementalDecoder, ids: Sequence[int], sizes: Sequence[int]) -> list[str]:
    out, start = [], 0
    for size in sizes:
        out.append(stream.push(ids[start : start + size]))
        start += size
    return [*out, stream.push(ids[start:]), stream.finish()]


def test_alphabet_is_the_librarys() -> None:
    raw = RawTokenizer(BPE({c: i for i, c in enumerate(byte_alphabet())}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    for character, byte in byte_alphabet().items():
        if byte < 128:
            assert raw.encode(chr(byte)).tokens == [character]


def test_no_broken_characters_token_by_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    given_out = pieces(tokenizer.stream(), ids, [1] * len(ids))

    assert "".join(given_out) == TEXT
    assert not any(REPLACEMENT in piece for piece in given_out)
    # characters come as early as they can: nothing is left for the end
    assert given_out[-1] == ""


def test_a_character_comes_with_its_last_byte(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("語")
    assert len(ids) > 1
    stream = tokenizer.stream()

    assert [stream.push([i]) for i in ids] == [""] * (len(ids) - 1) + ["語"]


def test_bytes_that_stay_broken_come_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ok 語")[:-1]
    stream = tokenizer.stream()

    assert stream.push(ids) == "ok "
    assert stream.finish() == REPLACEMENT
    assert tokenizer.decode(ids) == "ok " + REPLACEMENT


def test_control_tokens_give_no_text(tokenizer: Tokenizer) -> None:
    ids = [1, *tokenizer.encode("hi"), 2, 10_000_000]
    assert "".join(pieces(tokenizer.stream(), ids, [1, 1, 1])) == "hi"


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 49_160), max_size=30), sizes=st.lists(st.integers(0, 5), max_size=8))
def test_any_tokens_in_any_pushes(ids: list[int], sizes: list[int]) -> None:
    tokenizer = _shared()
    given_out = pieces(tokenizer.stream(), ids, sizes)

    assert "".join(given_out) == tokenizer.decode(ids)


# tokens of single bytes, so that most sequences are invalid UTF-8
@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=12) | st.text(max_size=6).map(str.encode), sizes=st.lists(st.integers(0, 3), max_size=8))
def test_any_bytes_in_any_pushes(data: bytes, sizes: list[int]) -> None:
    tokenizer = _shared()
    known = bytes(b for b in data if b in _single_bytes())
    ids = [_single_bytes()[b] for b in known]
    given_out = pieces(tokenizer.stream(), ids, sizes)

    assert "".join(given_out) == tokenizer.decode(ids) == known.decode("utf-8", "replace")


_CACHE: list[Tokenizer] = []


def _shared() -> Tokenizer:
    if not _CACHE:
        _CACHE.append(load_tokenizer("smollm2-135m"))
    return _CACHE[0]


def _single_bytes() -> dict[int, int]:
    found = {}
    for character, byte in byte_alphabet().items():
        token = _shared()._raw.token_to_id(character)
        if token is not None:
            found[byte] = token
    return found


def fallback_tokenizer() -> RawTokenizer:
    vocab = (
        {"<unk>": 0}
        | {f"<0x{b:02X}>": b + 1 for b in range(256)}
        | {"▁": 257, "▁hi": 258, "a": 259, "<s>": 260, REPLACEMENT: 261}
    )
    raw = RawTokenizer(BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens(["<s>"])
    return raw


FALLBACK = fallback_tokenizer()


BYTES = st.sampled_from([0x41, 0xC3, 0xA9, 0xE4, 0xF0, 0x9F]).map(lambda b: b + 1)


@settings(max_examples=300, deadline=None)
@given(
    # runs of at most four bytes, which are given as a whole
    ids=st.lists(st.tuples(st.lists(BYTES, max_size=4), st.lists(st.integers(257, 261), min_size=1, max_size=3))).map(
        lambda groups: [i for run, texts in groups for i in (*run, 257 if set(texts) == {260} else texts[0], *texts)]
    ),
    sizes=st.lists(st.integers(0, 4), max_size=12),
)
def test_window_decoder_over_byte_fallback(ids: list[int], sizes: list[int]) -> None:
    def decode(some: Sequence[int]) -> str:
        return FALLBACK.decode(list(some))

    given_out = pieces(WindowDecoder(decode, lambda i: None if i == 260 else 1 <= i <= 256), ids, sizes)

    assert "".join(given_out) == decode(ids)


def fallback_stream(num_decoded: list[int] | None = None) -> WindowDecoder:
    def decode(some: Sequence[int]) -> str:
        if num_decoded is not None:
            num_decoded.append(len(some))
        return FALLBACK.decode(list(some))

    return WindowDecoder(decode, lambda i: None if i == 260 else 1 <= i <= 256)


@pytest.mark.parametrize("token", [261, 0x41 + 1, 0xFF + 1, 259, 260])
def test_nothing_is_withheld_or_decoded_again_for_long(token: int) -> None:
    num_decoded: list[int] = []
    stream = fallback_stream(num_decoded)
    text, wanted = "", FALLBACK.decode([259] + [token] * 200)
    for count, token_id in enumerate([259] + [token] * 200):
        text += stream.push([token_id])
        assert len(text) >= len(FALLBACK.decode(([259] + [token] * 200)[: count + 1])) - 4

    assert max(num_decoded) <= 12
    assert text + stream.finish() == wanted


def test_long_runs_of_bytes_come_character_by_character() -> None:
    text = "語🙂éA" * 30
    ids = [byte + 1 for byte in text.encode()]
    given_out = pieces(fallback_stream(), [259, *ids, 259], [1] * (len(ids) + 2))

    assert "".join(given_out) == f"a{text}a"
    assert not any(REPLACEMENT in piece for piece in given_out)
    # all at once as well
    assert "".join(pieces(fallback_stream(), [259, *ids, 259], [])) == f"a{text}a"


def test_a_wrong_byte_spoils_only_what_was_held_back() -> None:
    ids = [byte + 1 for byte in "éééé".encode()] + [0xFF + 1, 259]
    text = "".join(pieces(fallback_stream(), ids, [1] * len(ids)))

    assert text.startswith("éé") and text.endswith("a")
    assert text.count(REPLACEMENT) <= 5
