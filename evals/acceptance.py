"""What is too long for the test suite; run by `make acceptance`. Writes benchmarks/results/acceptance.json.

- Greedy tokens under `exact` equal transformers' on prompts of every kind, up to 8K tokens, singly and all at once.
- What `sluice` and `fastkv` ship from prefill to decode for the demo's prompt stays under their share of bf16.
- The demo itself, so that its table in the README comes from the same run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from ..client import Client
from ..models.checkpoint import DEFAULT_MODEL
from ..models.tokenizer import load_tokenizer
from . import demo, parity
from .demo_prompt import demo_questions
from .reference_model import load_long_context
from .report import RESULTS, write_results
from .service_process import running_service

MAX_SHARE_OF_BF16 = {"sluice": 1 / 4, "fastkv": 1 / 8}


def parity_results(client: Client, console: Console) -> tuple[dict[str, Any], bool]:
    """Compare with transformers, singly and together."""
    tokenizer = load_tokenizer(DEFAULT_MODEL)
    prompts = parity.parity_prompts(tokenizer, long=True)
    with console.status("transformers generates the reference answers"):
        model = load_long_context()
        references = {name: parity.generate_reference(model, ids) for name, ids in prompts.items()}
    results: dict[str, Any] = {"noise": parity.NOISE}
    passed = True
    for how, compare in (("singly", parity.compare_singly), ("together", parity.compare_together)):
        with console.status(f"{len(prompts)} prompts {how}"):
            comparisons = compare(model, client, prompts, references)
        results[how] = [asdict(comparison) | {"equal": comparison.equal} for comparison in comparisons]
        passed &= all(comparison.equal for comparison in comparisons)
        console.print(summary(how, comparisons))
    return results, passed


def summary(how: str, comparisons: Sequence[parity.Comparison]) -> str:
    """One line: how many prompts are equal, how many near ties that took, and what differs."""
    equal = sum(comparison.equal for comparison in comparisons)
    ties = sum(comparison.num_near_ties for comparison in comparisons)
    error = max(comparison.logprob_error for comparison in comparisons)
    wrong = [f"{c.prompt} from token {c.first_difference}" for c in comparisons if not c.equal]
    line = (
        f"tokens as transformers', {how}: {equal} of {len(comparisons)} prompts, {ties} near ties, "
        f"log-probabilities within {error:.1e}"
    )
    return line + (f"; differ: {', '.join(wrong)}" if wrong else "")


def demo_results(client: Client, console: Console) -> tuple[dict[str, Any], bool]:
    """Run the demo's recipes and hold what they ship against their limits."""
    questions = demo_questions(load_tokenizer(DEFAULT_MODEL).encode)
    with console.status("the demo's questions"):
        runs = [demo.run_recipe(client, recipe, questions) for recipe in demo.RECIPES]
    console.print(demo.table(runs))
    passed = True
    for run in runs:
        limit = MAX_SHARE_OF_BF16.get(run.recipe)
        if limit is not None:
            fits = run.effective == run.recipe and 0 < run.shipped_share <= limit
            console.print(
                f"{run.recipe} ships {run.shipped_share:.3f} of bf16, at most {limit:.3f}: {'ok' if fits else 'FAILED'}"
            )
            passed &= fits
    return demo.to_json(runs) | {"max_share_of_bf16": MAX_SHARE_OF_BF16}, passed


def main() -> int:
    """Run everything against one service and write the results, passed or not."""
    console = Console()
    with (
        running_service("--prefill-workers", "1", "--decode-workers", "1") as service,
        Client(service.address) as client,
    ):
        tokens, tokens_passed = parity_results(client, console)
        shipped, shipped_passed = demo_results(client, console)
    passed = tokens_passed and shipped_passed
    path = RESULTS / "acceptance.json"
    write_results(path, {"passed": passed, "parity": tokens, "demo": shipped})
    console.print(f"acceptance: {'ok' if passed else 'FAILED'}; results in {path.relative_to(RESULTS.parent.parent)}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
