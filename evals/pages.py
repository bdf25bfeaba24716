"""Pages of Markdown with blocks that a program fills: `<!-- NAME -->`, what it made, `<!-- end NAME -->`; and the
files that such programs keep up to date."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path


def filled(page: str, blocks: Mapping[str, str], where: str) -> str:
    """The page with each block made anew.

    Args:
        blocks: name to text.
        where: the page's name, for messages.

    Raises:
        ValueError: a block is missing.
    """
    for name, text in blocks.items():
        before, _, after = _cut(page, name, where)
        page = f"{before}{_begin(name)}\n{text}\n{_end(name)}{after}"
    return page


def block(page: str, name: str, where: str) -> str:
    """What stands in a block.

    Raises:
        ValueError: it is missing.
    """
    return _cut(page, name, where)[1].strip()


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int = 1) -> str:
    """A Markdown table; columns from `numbers_from` on are set to the right."""
    rules = ["---" if place < numbers_from else "---:" for place in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rules, *rows))


def apart(root: Path, made: Mapping[Path, str]) -> list[Path]:
    """Files that hold something else than they should.

    Args:
        made: path below `root` to text; "" where no file should be.
    """
    return [
        path for path, text in made.items() if ((root / path).read_text() if (root / path).exists() else "") != text
    ]


def write(root: Path, made: Mapping[Path, str]) -> None:
    """Write or remove what differs, and say which files those are."""
    for path in apart(root, made):
        if made[path]:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(made[path])
            print(f"written: {root / path}")
        else:
            (root / path).unlink()
            print(f"removed: {root / path}")


def make_or_check(root: Path, wanted: Callable[[Path], Mapping[Path, str]], arguments: Sequence[str]) -> int:
    """What a program that keeps such files does. Returns its exit status: 1 where `--check` finds a difference, which
    changes nothing."""
    made = wanted(root)
    if list(arguments) != ["--check"]:
        write(root, made)
        return 0
    behind = apart(root, made)
    for path in behind:
        print(f"{path} does not hold what benchmarks/results says; run `make readme`")
    return int(bool(behind))


def _begin(name: str) -> str:
    return f"<!-- {name} -->"


def _end(name: str) -> str:
    return f"<!-- end {name} -->"


def _cut(page: str, name: str, where: str) -> tuple[str, str, str]:
    before, found, rest = page.partition(f"{_begin(name)}\n")
    inside, closed, after = rest.partition(_end(name))
    if not (found and closed):
        raise ValueError(f"{where} must hold a block {_begin(name)} ... {_end(name)}")
    return before, inside, after
