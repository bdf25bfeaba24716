"""Text to token ids and back, and the chat template of a checkpoint. Free of torch.

Conventions, those of Hugging Face and vLLM:

- `encode` reads control tokens written out in a plain prompt (`<|im_end|>`) as control tokens: who sends a raw prompt
  owns its format. Start-of-text is added only when `add_special_tokens` asks for it.
- `apply_chat_template` reads control tokens in the template, never in a message: a message that spells one out is
  encoded as the characters it is made of, so nobody can close a turn or open another role.
- Decoding does not clean up spaces.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, decoders
from tokenizers import Tokenizer as RawTokenizer

from ..errors import BrokenCheckpoint, InvalidRequest, UnsupportedModel
from .bpe import bpe_of_gguf
from .chat_template import ChatTemplate
from .checkpoint import locate, read_hf_config, read_json
from .config import SHAPES
from .detokenize import ByteLevelDecoder, IncrementalDecoder, WindowDecoder, byte_alphabet

if TYPE_CHECKING:
    from .gguf_file import GgufFile

__all__ = ["IncrementalDecoder", "Tokenizer", "load_tokenizer"]

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# begins what stands for a control token of the template; in the last plane, for private use, where no text is
_STAND_IN = "\U0010fffd"
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """A checkpoint's tokenizer. Immutable, safe to share between threads.

    Args:
        raw: the tokenizer itself.
        template: text of the chat template, or None.
        named: special tokens by name, for the template.
        bos_token_id: start of text, or None.
        eos_token_ids: ids that end a text.
    """

    def __init__(
        self,
        raw: RawTokenizer,
        template: str | None,
        named: Mapping[str, str],
        bos_token_id: int | None,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        raw.no_truncation()
        raw.no_padding()
        self._raw = raw
        self._template = None if template is None else ChatTemplate(template, named)
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        added = raw.get_added_tokens_decoder()
        self._control = {token.content: index for index, token in added.items() if token.special}
        self._special_ids = frozenset(self._control.values())
        # longest first, as the tokenizer matches them
        contents = sorted(self._control, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, contents)) or r"(?!)")
        # also finds those that begin inside another
        self._control_start = re.compile(rf"(?=({self._control_pattern.pattern}))(.)", re.DOTALL)
        self._heads = frozenset(content[:i] for content in contents for i in range(1, len(content)))
        self._tails = frozenset(content[i:] for content in contents for i in range(1, len(content)))
        self._longest = max(map(len, contents), default=0)
        self._disarmed, self._stand_ins = self._stand_in_tokenizer(added)
        self._is_byte_level = isinstance(raw.decoder, decoders.ByteLevel)
        self._bytes_of: dict[int, bytes] = {}  # of the tokens that have come up, at most the vocabulary

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return max(self._raw.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a plain prompt; control tokens written out in it count as such."""
        return list(self._raw.encode(_valid(text), add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids beyond the vocabulary give nothing, bytes that are no UTF-8 give U+FFFD."""
        return self._raw.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """Text of one token by itself, control tokens included; "" beyond the vocabulary."""
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text in UTF-8, which may be part of a character; of a control token its name."""
        if token_id in self._special_ids:
            return self.token_text(token_id).encode()
        if self._is_byte_level:
            return self._token_bytes(token_id)
        token = self._raw.id_to_token(token_id) or ""
        if _BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        return self.token_text(token_id).encode()

    def stream(self) -> IncrementalDecoder:
        """A decoder for tokens that arrive one after another; control tokens give no text."""
        if self._is_byte_level:
            return ByteLevelDecoder(self._token_bytes)
        return WindowDecoder(self.decode, self._is_byte_token)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation.

        Args:
            messages: objects with string `role` and `content`; a missing system message is filled in as the template
                says.
            add_generation_prompt: whether to open the assistant's turn at the end.

        Raises:
            InvalidRequest: the model has no chat template, or the template refuses the messages.
        """
        if self._template is None:
            raise InvalidRequest("messages", "this model has no chat template", "a plain prompt")
        strings = list(_strings(messages))
        if not any(map(self._is_armed, strings)):
            return self.encode(self._template.render(messages, add_generation_prompt))
        mark = _unused_character(strings)
        text = self._template.render([self._disarm(m, mark) for m in messages], add_generation_prompt)
        return self._encode_disarmed(_valid(text), mark)

    def continue_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of further messages of a conversation, to go behind the assistant's last one: what closes that, the
        messages, and the opening of the assistant's next turn.

        Raises:
            InvalidRequest: as `apply_chat_template`, or the template writes earlier messages otherwise when others
                follow, so that nothing can be put behind them.
        """
        if self._template is None:
            raise InvalidRequest("messages", "this model has no chat template", "a plain prompt")
        strings = list(_strings(messages))
        armed = any(map(self._is_armed, strings))
        mark = _unused_character(strings) if armed else ""
        further = [self._disarm(m, mark) for m in messages] if armed else list(messages)
        asked, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
        answered = self._template.render([asked], True) + "y"
        closed = self._template.render([asked, answer], False)
        whole = self._template.render([asked, answer, *further], True)
        if not (closed.startswith(answered) and whole.startswith(closed)):
            raise InvalidRequest("messages", "cannot follow others in this model's chat template", "the whole chat")
        text = whole[len(answered) :]
        return self._encode_disarmed(_valid(text), mark) if armed else self.encode(text)

    def _stand_in_tokenizer(self, added: Mapping[int, AddedToken]) -> tuple[RawTokenizer, dict[int, int]]:
        """The same tokenizer, but control tokens are only characters, and others stand in for them.

        So a text is encoded in one call, like any other: where a word begins, and what spaces a control token takes
        with it, do not depend on what the messages hold.

        Returns:
            (tokenizer, its id of a stand-in -> id of the control token).
        """
        plain = RawTokenizer.from_str(self._raw.to_str())
        plain.encode_special_tokens = True
        names = {index: self._stand_in(index) for index in self._control.values()}
        plain.add_tokens(
            [
                AddedToken(
                    name,
                    single_word=added[index].single_word,
                    lstrip=added[index].lstrip,
                    rstrip=added[index].rstrip,
                    normalized=added[index].normalized,
                    special=False,
                )
                for index, name in names.items()
            ]
        )
        found = {plain.token_to_id(name): index for index, name in names.items()}
        return plain, {index: control for index, control in found.items() if index is not None}

    @staticmethod
    def _stand_in(index: int) -> str:
        # of one length, so that none begins another, and no letter at its ends, which tokens of whole words look at
        return f"{_STAND_IN}{index:08x}{_STAND_IN}"

    def _is_armed(self, text: str) -> bool:
        """Whether a message's string holds a control token, or could be part of one beside what stands around it."""
        return self._control_pattern.search(text) is not None or self._ends_in_head(text) or self._starts_in_tail(text)

    def _ends_in_head(self, text: str) -> bool:
        return any(text[-i:] in self._heads for i in range(1, min(len(text) + 1, self._longest)))

    def _starts_in_tail(self, text: str) -> bool:
        return any(text[:i] in self._tails for i in range(1, min(len(text) + 1, self._longest)))

    def _disarm(self, value: Any, mark: str) -> Any:
        """Put `mark` inside every control token spelled out in a message, at any depth, and where one could be joined.

        That is behind a string that ends as a control token begins, and before one that begins as a control token
        ends: other messages or the template may hold the rest.
        """
        if isinstance(value, str):
            text = self._control_start.sub(lambda m: m[2] + mark, value)
            return mark * self._starts_in_tail(value) + text + mark * self._ends_in_head(value)
        if isinstance(value, Mapping):
            return {key: self._disarm(item, mark) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._disarm(item, mark) for item in value]
        return value

    def _encode_disarmed(self, text: str, mark: str) -> list[int]:
        """Encode a rendered template in which every control token is the template's own."""
        if _STAND_IN in text:
            raise InvalidRequest("messages", "hold both U+10FFFD and parts of control tokens", "text without U+10FFFD")
        text = self._control_pattern.sub(lambda m: self._stand_in(self._control[m[0]]), text).replace(mark, "")
        ids = self._disarmed.encode(text, add_special_tokens=False).ids
        return [self._stand_ins.get(i, i) for i in ids]

    @cached_property
    def _alphabet(self) -> dict[str, int]:
        return byte_alphabet()

    def _token_bytes(self, token_id: int) -> bytes:
        found = self._bytes_of.get(token_id)
        if found is None:
            found = self._look_up_bytes(token_id)
            if 0 <= token_id < self.vocab_size:
                self._bytes_of[token_id] = found
        return found

    def _look_up_bytes(self, token_id: int) -> bytes:
        token = None if token_id in self._special_ids else self._raw.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(self._alphabet[character] for character in token)
        except KeyError:
            # an added token outside the byte alphabet stands for itself
            return token.encode()

    def _is_byte_token(self, token_id: int) -> bool | None:
        token = None if token_id in self._special_ids else self._raw.id_to_token(token_id)
        return None if token is None else _BYTE_TOKEN.fullmatch(token) is not None


def _valid(text: str) -> str:
    """Lone surrogates, which JSON can carry and UTF-8 cannot, as U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _strings(value: Any) -> Iterator[str]:
    """Every string in a message, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _unused_character(strings: Sequence[str]) -> str:
    used = set().union(*strings)
    for code in range(0xE000, 0xF900):
        if chr(code) not in used:
            return chr(code)
    raise InvalidRequest(
        "messages", "use every private-use character", "text that leaves one of U+E000 to U+F8FF unused"
    )


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """Load the tokenizer of a model.

    Args:
        name_or_path: as for `load_model`. A name of `SHAPES` gets the default model's tokenizer, because random weights
            have no words of their own.

    Raises:
        UnknownModel, UnsupportedModel, BrokenCheckpoint: as for `load_model`.
    """
    if name_or_path in SHAPES and not Path(name_or_path).exists():
        name_or_path = "smollm2-135m"
    checkpoint = locate(name_or_path)
    if not checkpoint.is_gguf:
        return _from_folder(checkpoint.path)
    from .gguf_file import GgufFile

    return _from_gguf(GgufFile(checkpoint.path))


def _from_gguf(file: GgufFile) -> Tokenizer:
    from .gguf_config import end_of_text_ids

    raw = bpe_of_gguf(file)
    ids = {
        "bos_token": file.fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token": file.fields.get("tokenizer.ggml.eos_token_id"),
        "unk_token": file.fields.get("tokenizer.ggml.unknown_token_id"),
        "pad_token": file.fields.get("tokenizer.ggml.padding_token_id"),
    }
    named = {}
    for name, index in ids.items():
        if index is None:
            continue
        token = raw.id_to_token(index) if isinstance(index, int) else None
        if token is None:
            raise BrokenCheckpoint(f"{file.name}: the {name} lies outside the vocabulary")
        named[name] = token
    template = file.fields.get("tokenizer.chat_template")
    ends = tuple(end_of_text_ids(file))
    if any(raw.id_to_token(index) is None for index in ends):
        raise BrokenCheckpoint(f"{file.name}: a token that ends a text lies outside the vocabulary")
    return Tokenizer(raw, template, named, ids["bos_token"], ends)


def _from_folder(folder: Path) -> Tokenizer:
    if not (folder / "tokenizer.json").is_file():
        raise UnsupportedModel("the checkpoint has no tokenizer.json; supported: tokenizer.json, GGUF")
    try:
        raw = RawTokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as exc:  # the library raises bare Exception
        raise BrokenCheckpoint("tokenizer.json is not a tokenizer") from exc
    config = read_json(folder, "tokenizer_config.json", optional=True)
    named = _named_tokens(read_json(folder, "special_tokens_map.json", optional=True) | config)
    model = read_hf_config(folder)
    eos = model.get("eos_token_id")
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not eos_ids and "eos_token" in named:
        eos_ids = [raw.token_to_id(named["eos_token"])]
    bos = raw.token_to_id(named["bos_token"]) if "bos_token" in named else None
    return Tokenizer(raw, _template_of(folder, config), named, bos, tuple(i for i in eos_ids if i is not None))


def _named_tokens(raw: Mapping[str, Any]) -> dict[str, str]:
    named = {}
    for name in _NAMED_TOKENS:
        value = raw.get(name)
        content = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(content, str):
            named[name] = content
    return named


def _template_of(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None
