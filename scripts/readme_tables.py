"""Puts what `make acceptance` measured into README.md; scripts/recipe_report.py does the same for the recipes.

With --check it only says whether README.md holds what the results say.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from kvsluice.evals import demo
from kvsluice.evals.pages import filled

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "acceptance.json"
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


def blocks(results: Mapping[str, Any]) -> dict[str, str]:
    """Every block by its name."""
    return {"demo": demo_table(results), "parity": parity_lines(results)}


def main() -> int:
    if not RESULTS.exists():
        print(f"{RESULTS.relative_to(ROOT)} is missing; `make acceptance` writes it")
        return 1
    readme = README.read_text()
    wanted = filled(readme, blocks(json.loads(RESULTS.read_text())), README.name)
    if "--check" in sys.argv[1:]:
        if wanted != readme:
            print("README.md does not hold the numbers of benchmarks/results; run `make readme`")
        return int(wanted != readme)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
