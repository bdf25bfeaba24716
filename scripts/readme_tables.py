"""Puts what `make acceptance` measured into README.md and docs/cluster.md; scripts/recipe_report.py does the same for
the recipes.

With --check it only says whether the pages hold what the results say.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from kvsluice.evals import demo
from kvsluice.evals.pages import filled

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TABLE_WIDTH = 96


def demo_table(results: Mapping[str, Any]) -> str:
    """The demo's closing table as the terminal shows it."""
    console = Console(file=io.StringIO(), width=TABLE_WIDTH, force_terminal=False)
    console.print(demo.table(demo.from_json(results["demo"])))
    assert isinstance(console.file, io.StringIO)
    shown = "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())
    return f"```text\n{shown}\n```\n\n{origin(results)}"


def parity_lines(results: Mapping[str, Any]) -> str:
    """How many prompts gave transformers' tokens."""
    lines = []
    for how in ("singly", "together"):
        prompts = results["parity"][how]
        equal = sum(prompt["equal"] for prompt in prompts)
        ties = sum(prompt["num_near_ties"] for prompt in prompts)
        error = max(prompt["logprob_error"] for prompt in prompts)
        words = {"singly": "one after another", "together": "all at once"}[how]
        lines.append(
            f"- {words}: {equal} of {len(prompts)} prompts token for token as transformers, {ties} near ties, "
            f"log-probabilities within {error:.0e}"
        )
    return "\n".join(lines)


def origin(results: Mapping[str, Any]) -> str:
    """Where the numbers come from."""
    made = results["environment"]
    hardware = made["hardware"]
    return (
        f"Measured by `make acceptance` on {hardware['cores']} cores of {hardware['cpu']}, without a GPU, in fp32, "
        f"at commit {made['commit']}."
    )


def scaling_lines(results: Mapping[str, Any]) -> str:
    """What came of scaling up and down under load."""
    found, settings = results["results"], results["settings"]
    few, many = settings["clients"]
    return (
        f"A run: {few} client, then {many}, then {few} again, each sending one request after another: from 1P1D to "
        f"2P2D in {found['up_s']:.0f} s and back in {found['down_s']:.0f} s. {found['answered']} requests were "
        f"answered, {found['failed']} failed, {found['wrong']} had other tokens than the same request before, and "
        f"{found['migrated']} moved to other workers. The groups changed {len(found['course']) - 1} times in all: the "
        f"run's times are short, with {settings['scaling']['down_after_s']} s of quiet before a group shrinks."
        f"\n\n{origin(results)}"
    )


PAGES: dict[str, tuple[str, Callable[[Mapping[str, Any]], dict[str, str]]]] = {
    "README.md": ("acceptance.json", lambda results: {"demo": demo_table(results), "parity": parity_lines(results)}),
    "docs/cluster.md": ("scaling.json", lambda results: {"scaling": scaling_lines(results)}),
}


def main() -> int:
    stale = 0
    for page, (file, blocks) in PAGES.items():
        if not (RESULTS / file).exists():
            print(f"{(RESULTS / file).relative_to(ROOT)} is missing; `make acceptance` writes it")
            return 1
        text = (ROOT / page).read_text()
        wanted = filled(text, blocks(json.loads((RESULTS / file).read_text())), page)
        if "--check" not in sys.argv[1:]:
            (ROOT / page).write_text(wanted)
        elif wanted != text:
            print(f"{page} does not hold the numbers of benchmarks/results; run `make readme`")
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
