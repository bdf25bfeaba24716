"""A head as a remote store holds it: an envelope (`envelope.py`), its header the epoch, its body the manifest's key.

The checksum matters more here than for frames: a flipped digit would be another epoch, and let a replaced owner in.
"""

from __future__ import annotations

from .envelope import Fault, corrupt, open_envelope, seal
from .identity import ManifestKey, StoreKey
from .store import Head

MAGIC = b"KVSE"
MAX_HEAD_BYTES = 4096
MAX_EPOCH_DIGITS = 20


def encode_head(head: Head) -> bytes:
    """The bytes of a head; equal heads give equal bytes.

    Raises:
        ValueError: `decode_head` would refuse them.
    """
    raw = seal(MAGIC, b"%d" % head.epoch, head.manifest.encode())
    if head.epoch < 0 or len(str(head.epoch)) > MAX_EPOCH_DIGITS or len(raw) > MAX_HEAD_BYTES:
        raise ValueError("a head's epoch is below 0 or too high, or its manifest's key too long")
    return raw


def decode_head(data: bytes) -> Head:
    """The head that `data` is.

    Raises:
        CorruptFrame: it is none.
    """
    opened = open_envelope("head", MAGIC, data, MAX_HEAD_BYTES, MAX_EPOCH_DIGITS)
    if not opened.header.isdigit():
        raise corrupt("head", Fault.HEADER_PARSE)
    try:
        manifest = str(opened.body, "utf-8")
    except UnicodeDecodeError:
        raise corrupt("head", Fault.ENTRY) from None
    return Head(int(opened.header), ManifestKey(StoreKey(manifest)))
