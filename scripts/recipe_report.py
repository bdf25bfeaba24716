"""Puts what was measured of the recipes into README.md, docs/recipes.md and docs/recipes/, and draws docs/images/.

The numbers come from benchmarks/results/{ruler,multiturn,prefix,niah,ppl,peer_kvpress}*.json, the tables of slots from
the recipes themselves. What was not measured says so. With --check it only says whether pages and images hold all that.
With --results and --out it makes a page and images of other files that `kvsluice eval` wrote, and leaves the project's
alone.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvsluice.errors import InvalidRequest, KvsluiceError
from kvsluice.evals import cost_tables, recipe_slots, recipe_tables, simulation
from kvsluice.evals.pages import apart, block, filled, write
from kvsluice.evals.recipe_tables import NOT_MEASURED
from kvsluice.evals.recorded import Run
from kvsluice.evals.results import load
from kvsluice.evals.suites import SUITE_NAMES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("benchmarks") / "results"
README = Path("README.md")
LIBRARY = Path("docs") / "recipes.md"
PAGES = Path("docs") / "recipes"
IMAGES = Path("docs") / "images"
DRAWN = ("ruler", "multiturn", "niah")  # suites that have images
COSTS, TURNS = "_costs", "_turns"  # ends of the names of images of one file, beside its own
MAIN = "ruler"  # the file that README.md shows
TITLES = {
    MAIN: "Every recipe",
    "ruler_compiled": "Every recipe at a later commit, on another GPU, fewer samples",
    "ruler_float32": "In full precision, beside transformers",
    "ruler_retrieval": "How much a step reads, and what packing costs beside it",
    "ruler_reach": "Three times the rows, or outlier chunks (four tasks, float32)",
    "ruler_sinks": "Sinks (four tasks, float32)",
    "ruler_recall": "Rows that come back: from which layer, and how many",
    "ruler_recall_2k": "Rows that come back, 33 samples on a processor",
    "ruler_variants": "Single parts, as an early simulation had them",
}
EXPLANATIONS = "explanations"


@dataclass(frozen=True)
class Measurements:
    """What the files of results hold, by suite."""

    ruler: Sequence[Run]
    references: Sequence[Run]
    multiturn: Sequence[Run]
    prefix: Sequence[Run]
    niah: Sequence[Run]
    ppl: Sequence[Run]
    peers: Sequence[tuple[str, Any]]

    @property
    def runs(self) -> list[Run]:
        return [*self.ruler, *self.multiturn, *self.prefix, *self.niah, *self.ppl]

    @property
    def main(self) -> Run | None:
        return next((run for run in self.ruler if run.name == MAIN), None)

    def beside(self, reference: Run) -> Run:
        """The run of compiled kernels that one of plain torch belongs to: what is equal but the kernels.

        Raises:
            InvalidRequest: there is none, so that a difference would be one of commits or devices.
        """
        for run in self.ruler:
            if run.results.environment == reference.results.environment:
                return run
        raise InvalidRequest(f"{reference.name}: no results of compiled kernels from the same commit and machine")


def read(root: Path) -> Measurements:
    """Every file of results below a root.

    Raises:
        InvalidRequest: a file is not what its name says.
    """
    found = {}
    for suite in SUITE_NAMES:
        files = sorted((root / RESULTS).glob(f"{suite}*.json"), key=lambda path: path.stem)
        found[suite] = [Run(path.stem, load(path)) for path in files]
    found["references"] = [run for run in found["ruler"] if run.is_reference]
    found["ruler"] = [run for run in found["ruler"] if not run.is_reference]
    peers = sorted((root / RESULTS).glob("peer_kvpress*.json"), key=lambda path: path.stem)
    return Measurements(**found, peers=[(path.stem, json.loads(path.read_text())) for path in peers])


def images(found: Measurements) -> dict[Path, str]:
    """Every image by its path."""
    drawn = {IMAGES / f"{run.name}.svg": recipe_tables.bytes_plot(run) for run in found.ruler if _worth_drawing(run)}
    drawn |= {IMAGES / f"{run.name}.svg": recipe_tables.needle_plot(run) for run in found.niah}
    drawn |= {IMAGES / f"{run.name}{TURNS}.svg": cost_tables.turns_plot(run) for run in found.multiturn}
    return drawn | {
        IMAGES / f"{run.name}{COSTS}.svg": cost_tables.costs_plot(run)
        for run in [*found.ruler, *found.multiturn]
        if _costs_are_drawn(run)
    }


def readme_blocks(found: Measurements) -> dict[str, str]:
    """Blocks of README.md."""
    run = found.main
    if run is None:
        return {"recipes": NOT_MEASURED}
    image = _costs_image(run, "docs/images") or _image(run, "docs/images")
    return {"recipes": f"{image}\n\n{recipe_tables.overview(run)}"}


def library_blocks(found: Measurements) -> dict[str, str]:
    """Blocks of docs/recipes.md."""

    def each(texts: Sequence[str]) -> str:
        return "\n\n".join(texts) or NOT_MEASURED

    return {
        "shipped": recipe_slots.shipped_table(),
        "fillings": recipe_slots.fillings_table(),
        "accuracy": each([f"{_title(run)}{_drawn(run)}{recipe_tables.averages(run)}" for run in found.ruler]),
        "tasks": each([f"{_title(run)}{recipe_tables.task_scores(run)}" for run in found.ruler]),
        "reference": each([recipe_tables.beside_reference(found.beside(one), one) for one in found.references]),
        "turns": each([f"{_drawn_turns(run, 'images')}{cost_tables.turn_scores(run)}" for run in found.multiturn]),
        "prefixes": each([cost_tables.found_prefixes(run) for run in found.prefix]),
        "needles": each([f"{_image(run, 'images')}\n\n{recipe_tables.found_needles(run)}" for run in found.niah]),
        "perplexity": each([recipe_tables.perplexity(run) for run in found.ppl]),
        "peers": each([recipe_tables.peers(name, raw) for name, raw in found.peers]),
        "simulation": simulation.comparison(found.ruler),
        "variants": "```sh\n" + _variants_command() + "\n```",
    }


def page_blocks(page: str, found: Measurements) -> dict[str, str]:
    """Blocks of a recipe's page: for every `slots NAME` and `measured NAME` that it has."""
    made = {}
    for kind, name in re.findall(r"^<!-- (slots|measured) (\S+) -->$", page, re.MULTILINE):
        text = recipe_slots.slots_table(name) if kind == "slots" else recipe_tables.measured(name, found.runs)
        made[f"{kind} {name}"] = text
    return made


def wanted(root: Path) -> dict[Path, str]:
    """Every file that this script writes, as it should be; "" for images of results that are no more.

    Raises:
        ValueError: a page lacks a block.
    """
    found = read(root)
    pages = {README: readme_blocks(found), LIBRARY: library_blocks(found)}
    for path in sorted((root / PAGES).glob("*.md")):
        pages[path.relative_to(root)] = page_blocks(path.read_text(), found)
    drawn = [path.relative_to(root) for suite in DRAWN for path in (root / IMAGES).glob(f"{suite}*.svg")]
    made = dict.fromkeys(sorted(drawn), "") | images(found)
    return made | {path: filled((root / path).read_text(), blocks, str(path)) for path, blocks in pages.items()}


def faults(root: Path, made: dict[Path, str]) -> list[str]:
    """What differs from what the results say, and what is not explained."""
    behind = apart(root, made)
    explanations = block(made[LIBRARY], EXPLANATIONS, str(LIBRARY))
    return [
        *(f"{path} does not hold what benchmarks/results says; run `make readme`" for path in behind if made[path]),
        *(f"{path} shows results that are no more; run `make readme`" for path in behind if not made[path]),
        *(
            f"{LIBRARY} does not explain the difference to the simulation for {label}: write an item `- **{label}**: …`"
            for label in simulation.unexplained(read(root).ruler, explanations)
        ),
    ]


def _image(run: Run, folder: str) -> str:
    what = "scores against bytes shipped" if run.results.suite == "ruler" else "needles found by depth and length"
    return f"![{what}]({folder}/{run.name}.svg)"


def _worth_drawing(run: Run) -> bool:
    """A single recipe makes no plot."""
    return len(run.results.recipes) > 1


def _drawn(run: Run) -> str:
    drawn = [_costs_image(run, "images"), _image(run, "images") if _worth_drawing(run) else ""]
    return "".join(f"{image}\n\n" for image in drawn if image)


def _costs_are_drawn(run: Run) -> bool:
    return _worth_drawing(run) and cost_tables.costs_differ(run)


def _costs_image(run: Run, folder: str) -> str:
    """The plot of scores against costs, as a page shows it; "" where there is none."""
    what = "scores against prefill's operations and against bytes held"
    return f"![{what}]({folder}/{run.name}{COSTS}.svg)" if _costs_are_drawn(run) else ""


def _drawn_turns(run: Run, folder: str) -> str:
    images = (f"![scores by turn]({folder}/{run.name}{TURNS}.svg)", _costs_image(run, folder))
    return "".join(f"{image}\n\n" for image in images if image)


def _title(run: Run) -> str:
    return f"### {TITLES.get(run.name, f'`{run.name}.json`')}\n\n"


def _variants_command() -> str:
    lines = [f"  --variant '{label}={variant}'" for label, variant in simulation.VARIANTS.items()]
    head = f"kvsluice eval --suite ruler --recipe exact --context {simulation.CONTEXT} --samples 50"
    return " \\\n".join([head, *lines, f"  --json {RESULTS}/ruler_variants.json"])


def own_report(paths: Sequence[Path]) -> dict[Path, str]:
    """A page of files of results, and its images, by path below the folder that they are written to.

    Raises:
        InvalidRequest: a file is no results file.
    """
    page, made = ["# Measured by `kvsluice eval`"], {}
    for path in paths:
        run = Run(path.stem, load(path))
        page.append(f"## {path.name}")
        if run.results.suite in ("ppl", "prefix"):
            whole = recipe_tables.perplexity if run.results.suite == "ppl" else cost_tables.found_prefixes
            page.append(whole(run))
            continue
        if _costs_are_drawn(run):
            made[Path(f"{run.name}{COSTS}.svg")] = cost_tables.costs_plot(run)
        if run.results.suite == "multiturn":
            made[Path(f"{run.name}{TURNS}.svg")] = cost_tables.turns_plot(run)
            page += [f"{_drawn_turns(run, '.')}{recipe_tables.averages(run)}", cost_tables.turn_scores(run)]
            continue
        is_ruler = run.results.suite == "ruler"
        made[Path(f"{run.name}.svg")] = recipe_tables.bytes_plot(run) if is_ruler else recipe_tables.needle_plot(run)
        page.append(_image(run, "."))
        tables = (recipe_tables.averages, recipe_tables.task_scores) if is_ruler else (recipe_tables.found_needles,)
        page += [one(run) for one in tables]
    return made | {Path("report.md"): "\n\n".join(page) + "\n"}


def _arguments(given: Sequence[str]) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split()))
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where pages are behind")
    parser.add_argument("--results", nargs="+", type=Path, metavar="FILE", help="files of `kvsluice eval`")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the page of --results goes")
    options = parser.parse_args(given)
    if (options.results is None) != (options.out is None) or (options.check and options.out):
        parser.error("--results and --out belong together, and not to --check")
    return options


def main(root: Path = ROOT) -> int:
    options = _arguments(sys.argv[1:])
    try:
        if options.out is not None:
            write(options.out, own_report(options.results))
            return 0
        made = wanted(root)
        if options.check:
            found = faults(root, made)
            print("\n".join(found), end="\n" if found else "")
            return int(bool(found))
    except KvsluiceError as exc:
        print(f"recipe_report: {exc.message}", file=sys.stderr)
        return 1
    write(root, made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
