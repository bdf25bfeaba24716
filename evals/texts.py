"""Natural texts to build long prompts from.

`python_topics` comes with every Python. The others come from Debian packages that `scripts/fetch_texts.sh` unpacks
into a folder; they are what the long-context adapter was trained on (first 90 % of each; the rest is held out).

`heldout_texts` writes the held-out tenths into `heldout/` of that folder when it first reads them. That small folder is
all that an evaluation needs: copied to another machine, it does there without the packages.
"""

from __future__ import annotations

import html
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .tasks import Encode

BLOCK_CHARS = 20_000  # texts are tokenized in blocks of this many characters
TRAIN_SHARE = 0.9  # the adapter saw this share of each text, from its start
DEFAULT_FOLDER = Path(".cache/texts")
HELDOUT = "heldout"
MANUALS = ("usr/share/doc/debian-handbook/html/en-US", "usr/share/debian-reference", "usr/share/developers-reference")


class TextMissing(FileNotFoundError):
    """A text's package is not unpacked in the folder; the message says how to get it."""


def python_topics() -> str:
    """The language reference that `help()` shows; its wording follows the Python version that runs."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _existing(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.exists():
        raise TextMissing(f"{path} is missing; run scripts/fetch_texts.sh {folder}")
    return path


def king_james_bible(folder: Path) -> str:
    """Package bible-kjv: all verses, one a line, without their numbers."""
    program = _existing(folder, "usr/bin/bible")
    data = _existing(folder, "usr/lib/bible.data").parent
    done = subprocess.run(  # noqa: S603 - the program that was just unpacked, with fixed arguments
        [str(program), "-p", str(data), "-f", "gen1:1-rev22:21"], capture_output=True, check=True, text=True
    )
    return re.sub(r"(?m)^\s*\S+?\d+:\d+\s+", "", done.stdout)


def python_documentation(folder: Path) -> str:
    """Package python3.11-doc: the reStructuredText sources, sorted by path."""
    sources = _existing(folder, "usr/share/doc/python3.11/html/_sources")
    return "\n".join(path.read_text(errors="ignore") for path in sorted(sources.rglob("*.txt")))


def debian_manuals(folder: Path) -> str:
    """Packages debian-handbook, debian-reference-en, developers-reference: the HTML pages without their tags."""
    pages = [page for manual in MANUALS for page in sorted(_existing(folder, manual).glob("*.html"))]
    return "\n".join(without_tags(page.read_text(errors="ignore")) for page in pages)


def without_tags(page: str) -> str:
    """The text of an HTML page."""
    page = re.sub(r"(?is)<(script|style)\b.*?</\1>", " ", page)
    page = html.unescape(re.sub(r"<[^>]*>", " ", page))
    return re.sub(r"[ \t]+", " ", re.sub(r"\s*\n\s*", "\n", page))


def share(text: str, low: float, high: float) -> str:
    """The characters of `text` between two shares of its length."""
    return text[int(len(text) * low) : int(len(text) * high)]


def token_ids(encode: Encode, text: str) -> list[int]:
    """Tokenize a long text in blocks: fast, at the price of an unusual split every `BLOCK_CHARS` characters."""
    return [token for i in range(0, len(text), BLOCK_CHARS) for token in encode(text[i : i + BLOCK_CHARS])]


def _read(path: Path) -> str:
    with path.open(encoding="utf-8", newline="") as file:
        return file.read()


def heldout_texts(folder: Path) -> dict[str, str]:
    """The last tenth of each text that the adapter is trained on, by name.

    Raises:
        TextMissing: neither the tenths nor the packages are in `folder`.
    """
    readers = {"bible": king_james_bible, "python": python_documentation, "debian": debian_manuals}
    paths = {name: folder / HELDOUT / f"{name}.txt" for name in readers}
    for name, read in readers.items():
        if paths[name].exists():
            continue
        tenth = share(read(folder), TRAIN_SHARE, 1.0)
        paths[name].parent.mkdir(exist_ok=True)
        part = paths[name].with_name(f"{name}.{os.getpid()}.part")
        with part.open("w", encoding="utf-8", newline="") as file:  # newlines stay as they are
            file.write(tenth)
        part.replace(paths[name])
    return {name: _read(path) for name, path in paths.items()}


def training_texts(encode: Encode, folder: Path, low: float = 0.0, high: float = TRAIN_SHARE) -> list[Sequence[int]]:
    """Token ids of a share of each text that the adapter is trained on.

    Raises:
        TextMissing: a package is not unpacked in `folder`.
    """
    texts = (king_james_bible(folder), python_documentation(folder), debian_manuals(folder))
    return [token_ids(encode, share(text, low, high)) for text in texts]
