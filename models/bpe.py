"""Byte-level BPE tokenizers out of a GGUF file's vocabulary and merges. Free of torch.

Versions of transformers guess different tokenizers for such files, so it is built here from what the file says: its
`tokenizer.ggml.pre` names the pre-tokenizer that the model was trained with. Bytes that the vocabulary lacks (SmolLM2
has no token for some control characters and unassigned planes) are dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from ..errors import BrokenCheckpoint, UnsupportedModel

if TYPE_CHECKING:
    from .gguf_file import GgufFile

_CONTROL, _USER_DEFINED = 3, 4
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def _smollm() -> pre_tokenizers.PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": _smollm,
    "qwen2": lambda: _split(_QWEN2),
    "llama-bpe": lambda: _split(_LLAMA3),
}
# as llama.cpp does for files without add_bos_token
_STARTS_BY_DEFAULT = ("llama-bpe",)


def bpe_of_gguf(file: GgufFile) -> Tokenizer:
    """Build the tokenizer of a GGUF file.

    Raises:
        UnsupportedModel: not byte-level BPE, or an unknown pre-tokenizer.
        BrokenCheckpoint: vocabulary or merges are missing or contradict each other.
    """
    model, pre = file.fields.get("tokenizer.ggml.model"), file.fields.get("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise UnsupportedModel(
            f"{file.name}: tokenizer {str(model)[:64]}/{str(pre)[:64]} is not supported; "
            f"supported: gpt2 with {', '.join(_PRE_TOKENIZERS)}"
        )
    tokens, merges = file.fields.get("tokenizer.ggml.tokens"), file.fields.get("tokenizer.ggml.merges")
    kinds = file.fields.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not isinstance(merges, list) or not isinstance(kinds, list):
        raise BrokenCheckpoint(f"{file.name}: tokenizer vocabulary, merges or token types are missing")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if len(kinds) != len(tokens) or any(len(pair) != 2 for pair in pairs):
        raise BrokenCheckpoint(f"{file.name}: tokenizer vocabulary, merges and token types do not fit together")
    vocab = {token: index for index, token in enumerate(tokens)}
    try:
        # llama-3 merges stop short of some whole words that its vocabulary has
        tokenizer = Tokenizer(BPE(vocab, pairs, ignore_merges=pre == "llama-bpe"))
    except Exception as exc:  # the library raises bare Exception
        raise BrokenCheckpoint(f"{file.name}: merges name tokens that the vocabulary lacks") from exc
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[str(pre)]()
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    _add_start_of_text(tokenizer, file, str(pre))
    return tokenizer


def _add_start_of_text(tokenizer: Tokenizer, file: GgufFile, pre: str) -> None:
    """Make plain prompts start with start-of-text where the file says so, or is silent and the family does so."""
    flag, bos = file.fields.get("tokenizer.ggml.add_bos_token"), file.fields.get("tokenizer.ggml.bos_token_id")
    if flag is False or (flag is None and (bos is None or pre not in _STARTS_BY_DEFAULT)):
        return
    token = tokenizer.id_to_token(bos) if isinstance(bos, int) and bos >= 0 else None
    if token is None or not isinstance(flag, bool | None):
        raise BrokenCheckpoint(f"{file.name}: tokenizer.ggml.add_bos_token and the bos_token do not fit together")
    start = {"id": "start", "ids": [bos], "tokens": [token]}
    tokenizer.post_processor = processors.TemplateProcessing(single=["start", "$A"], special_tokens=[start])
