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

from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders

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
        # the same tokenizer, but for text in which control tokens are only characters
        self._plain = RawTokenizer.from_str(raw.to_str())
        self._plain.encode_special_tokens = True
        self._template = None if template is None else ChatTemplate(template, named)
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        added = raw.get_added_tokens_decoder()
        self._control = {token.content: index for index, token in added.items() if token.special}
        self._special_ids = frozenset(self._control.values())
        # longest first, as the tokenizer matches them
        contents = sorted(self._control, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, contents)) or r"(?!)")
        self._is_byte_level = isinstance(raw.decoder, decoders.ByteLevel)

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
        if not any(map(self._control_pattern.search, strings)):
            return self.encode(self._template.render(messages, add_generation_prompt))
        mark = _unused_character(strings)
        text = self._template.render([self._disarm(m, mark) for m in messages], add_generation_prompt)
        return self._encode_disarmed(_valid(text), mark)

    def _disarm(self, value: Any, mark: str) -> Any:
        """Put `mark` after the first character of every control token spelled out in a message, at any depth."""
        if isinstance(value, str):
            return self._control_pattern.sub(lambda m: m[0][0] + mark + m[0][1:], value)
        if isinstance(value, Mapping):
            return {key: self._disarm(item, mark) for key, item in value.items()}
        if isinstance(value, list):
            return [self._disarm(item, mark) for item in value]
        return value

    def _encode_disarmed(self, text: str, mark: str) -> list[int]:
        """Encode a rendered template in which every control token is the template's own."""
        ids: list[int] = []
        start = 0
        for match in self._control_pattern.finditer(text):
            ids += self._encode_plain(text[start : match.start()].replace(mark, ""))
            ids.append(self._control[match[0]])
            start = match.end()
        return ids + self._encode_plain(text[start:].replace(mark, ""))

    def _encode_plain(self, text: str) -> list[int]:
        return list(self._plain.encode(text, add_special_tokens=False).ids) if text else []

    @cached_property
    def _alphabet(self) -> dict[str, int]:
        return byte_alphabet()

    def _token_bytes(self, token_id: int) -> bytes:
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
    eos = ids["eos_token"]
    return Tokenizer(raw, template, named, ids["bos_token"], () if eos is None else (eos,))


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
