"""Puts what `make acceptance` measured into README.md and pages under docs/;
scripts/recipe_report.py does the same for the recipes.

With --check it only says whether the pages hold what the results say.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console

from kvsluice.evals import demo
from kvsluice.evals.pages import filled, make_or_check, table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("benchmarks") / "results"
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


def attack_lines(results: Mapping[str, Any]) -> str:
    """What came of attacks on the store."""
    wrong = {name: found for name, found in results["wrong"].items() if found}
    said = "nothing wrong in any" if not wrong else f"wrong: {', '.join(f'{k}: {v}' for k, v in wrong.items())}"
    return f"{len(results['wrong'])} attacks of {results['seconds']:g} s each: {said} ({_where(results)})."


def fault_table(results: Mapping[str, Any]) -> str:
    """What came of workers that were killed and frozen."""
    rows = []
    for name, what in (("kills", "SIGKILL"), ("stalls", "SIGSTOP past the lease, SIGCONT")):
        one = results[name]
        errors = sum(one["errors"].values())
        numbers = (one["faults"], one["answers"], one["wrong"], errors, one["moved"], one["migrations"])
        rows.append((what, *map(str, numbers)))
    header = ("decode workers", "faults", "answers", "wrong", "errors", "went on elsewhere", "moves")
    origin = f"Eight clients at once, seed {results['seed']} ({_where(results)})."
    return f"{table(header, rows)}\n\n{origin}"


def soak_lines(results: Mapping[str, Any]) -> str:
    """What came of random faults."""
    load, faults = results["load"], results["faults"]
    wrong = "; ".join(results["wrong"]) or "nothing"
    kinds = ", ".join(f"{count} × {name}" for name, count in sorted(faults.items()))
    errors = ", ".join(f"{count} × {name}" for name, count in sorted(load["errors"].items())) or "none"
    return (
        f"{results['seconds']:g} s of random faults, seed {results['seed']} ({_where(results)}): {kinds}. "
        f"{load['answers']} answers, {load['left']} left by their clients, {load['moved']} that went on elsewhere; "
        f"success rate {load['success_rate']:.3f}, errors: {errors}. Wrong or left over: {wrong}."
    )


def prefix_table(results: Mapping[str, Any]) -> str:
    """Times to the first token of prompts whose document was there, and was not."""
    rows = []
    for one in results["results"]:
        tokens = one["document_tokens"] + one["question_tokens"]
        seconds = (f"{one[name]:.2f} s" for name in ("alone_s", "fills_s", "hits_s"))
        found = f"{one['found_tokens']:,} of {tokens:,}"
        rows.append((f"`{one['recipe']}`", found, *seconds, _spread(one["rounds"], "hits_s", "alone_s")))
    header = ("recipe", "tokens found", "nothing kept", "first question, kept", "second question, a hit", "hit ÷ alone")
    first, device = results["results"][0], results["device"]
    same = sum(one["same_tokens"] for one in results["results"])
    rounds = sum(len(one["rounds"]) for one in results["results"])
    origin = (
        f"Time to the first token of the prefill engine, medians of {len(first['rounds'])} rounds, "
        f"`{results['model']}` in {device['dtype']} on {_where(results)}. In {same} of {rounds} rounds a hit drew the "
        "token that it drew alone."
    )
    return f"{table(header, rows)}\n\n{origin}"


def turn_table(results: Mapping[str, Any]) -> str:
    """Times to the first token of a conversation's second turn, beside its first and beside no session."""
    rows = []
    for one in results["results"]:
        seconds = (f"{one[name]:.1f} s" for name in ("first_s", "second_s", "again_s"))
        spreads = [_spread(one["rounds"], "second_s", other) for other in ("first_s", "again_s")]
        rows.append((one["recipe"], *seconds, *spreads))
    header = ("recipe", "first turn", "second turn", "all of it as a prompt", "second ÷ first", "second ÷ all of it")
    first, device = results["results"][0], results["device"]
    origin = (
        f"Time to the first token in the engines, medians of {len(first['rounds'])} rounds (least to most): a document "
        f"of {first['context']:,} tokens and a second turn of {first['turn']}, `{results['model']}` in "
        f"{device['dtype']} on {_where(results)}."
    )
    return f"{table(header, rows)}\n\n{origin}"


def _spread(rounds: Sequence[Mapping[str, float]], over: str, under: str) -> str:
    """The median of the rounds' ratios, and the least and the most."""
    ratios = sorted(one[over] / one[under] for one in rounds)
    return f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def late_table(results: Mapping[str, Any]) -> str:
    """How far answers' distributions lie apart, by how rows came into the deep layers."""
    names = {
        "without to exact": "plain propagation, to `exact`",
        "late to exact": "recalled while decoding, to `exact`",
        "early to exact": "the same rows propagated from the start, to `exact`",
        "late to early": "recalled while decoding, to propagated from the start",
    }
    rows = []
    for pair, words in names.items():
        nats, same = (results["summary"][pair][name] for name in ("nats", "same"))
        rows.append((words, *(f"{one['mean']:.3f} [{one['low']:.3f}, {one['high']:.3f}]" for one in (nats, same))))
    header = ("", "KL in nats a token [95 %]", "same likeliest token [95 %]")
    settings, count = results["settings"], len(results["samples"])
    origin = (
        f"{count} samples of {settings['context']:,} tokens, tasks {settings['tasks'].replace(',', ', ')}; "
        f"`{settings['recipe']}` with recall {settings['recall']:g}, `{settings['model']}`, on {_where(results)}."
    )
    return f"{table(header, rows)}\n\n{origin}"


def overload_table(results: Mapping[str, Any]) -> str:
    """Goodput by how much more is asked than can be served."""
    loads = [row["load"] for row in results["scenarios"][0]["rows"]]
    rows = []
    for one in results["scenarios"]:
        within = [row["shed_within_50_ms"] for row in one["rows"] if row.get("shed_within_50_ms") is not None]
        soon = f"{min(within):.1%}" if within else ""
        rows.append((one["name"], *(f"{row['of_peak']:.2f}" for row in one["rows"]), soon))
    header = ("goodput ÷ its peak", *(f"{load:g} ×" for load in loads), "refused within 50 ms, at least")
    origin = f"Measured on {_where(results)}; the first three are the policy alone, on a simulated clock."
    return f"{table(header, rows)}\n\n{origin}"


def _where(results: Mapping[str, Any]) -> str:
    made = results["environment"]
    return f"{made['hardware']['cores']} cores of {made['hardware']['cpu']}, commit {made['commit']}"


class Block(NamedTuple):
    """A block of a page, and what it is made from."""

    page: str
    name: str
    file: str
    made: Callable[[Mapping[str, Any]], str]


BLOCKS = (
    Block("README.md", "demo", "acceptance.json", demo_table),
    Block("README.md", "parity", "acceptance.json", parity_lines),
    Block("docs/cluster.md", "scaling", "scaling.json", scaling_lines),
    Block("docs/faults.md", "fault runs", "faults.json", fault_table),
    Block("docs/faults.md", "attacks", "attacks.json", attack_lines),
    Block("docs/faults.md", "soak", "soak.json", soak_lines),
    Block("docs/prefixes.md", "hits", "shared_prefixes_cpu.json", prefix_table),
    Block("docs/sessions.md", "turns", "second_turn_cpu.json", turn_table),
    Block("docs/recall.md", "late", "late_recall_cpu.json", late_table),
    Block("docs/security.md", "overload", "overload.json", overload_table),
)


def wanted(root: Path) -> dict[Path, str]:
    """The pages as they should be. Raises `ValueError` where one lacks a block."""
    made: dict[Path, str] = {}
    for one in BLOCKS:
        page, path = Path(one.page), root / RESULTS / one.file
        text = one.made(json.loads(path.read_text())) if path.exists() else "Not measured yet."
        before = made[page] if page in made else (root / page).read_text()
        made[page] = filled(before, {one.name: text}, one.page)
    return made


if __name__ == "__main__":
    sys.exit(make_or_check(ROOT, wanted, sys.argv[1:]))
