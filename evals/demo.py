"""`kvsluice demo`: a document with hidden facts goes through the running service under several recipes.

Each recipe answers the same questions over the same document; the table says how many values came back right, what
that took, and what was shipped from prefill to decode. Wrong answers stay in.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..client import Client, Completion
from ..compression.recipe import PRESETS
from ..models.checkpoint import DEFAULT_MODEL
from ..models.tokenizer import load_tokenizer
from ..services.cli_options import Service
from .demo_prompt import NUM_FACTS, NUM_TOKENS, SEED, DemoQuestion, demo_questions
from .report import write_results
from .service_process import ServiceFailed, running_service

RECIPES = ("exact", "fastkv", "sluice")
MAX_TOKENS = 48
REQUEST_TIMEOUT_S = 240.0
OWN_PREFILLS = ("--prefix-cache-bytes", "0")  # every first token is that of a prompt that runs whole
# properties of a run that are written out for readers of the file
DERIVED = ("num_right", "num_asked", "time_to_first_token_s", "tokens_per_s", "shipped_share")


@dataclass(frozen=True)
class Answer:
    """One answered question.

    Attributes:
        num_right: asked values that stand in their place.
        time_to_first_token_s: from sending the request to its first token.
        decode_s: from the first token to the last.
    """

    question: str
    expected: list[str]
    text: str
    num_right: int
    num_prompt_tokens: int
    num_tokens: int
    time_to_first_token_s: float
    decode_s: float


@dataclass(frozen=True)
class RecipeRun:
    """All questions under one recipe; sizes are those of the last question's prompt, in bytes."""

    recipe: str
    effective: str
    fallback_reason: str
    answers: list[Answer]
    handoff_bytes: int
    handoff_bf16_bytes: int
    resident_bytes: int

    @property
    def num_right(self) -> int:
        return sum(answer.num_right for answer in self.answers)

    @property
    def num_asked(self) -> int:
        return sum(len(answer.expected) for answer in self.answers)

    @property
    def time_to_first_token_s(self) -> float:
        return statistics.median(answer.time_to_first_token_s for answer in self.answers)

    @property
    def tokens_per_s(self) -> float:
        """Tokens after the first, which prefill samples, over the time that they took."""
        spent = sum(answer.decode_s for answer in self.answers)
        return sum(answer.num_tokens - 1 for answer in self.answers) / spent if spent > 0 else 0.0

    @property
    def shipped_share(self) -> float:
        """Bytes that went from prefill to decode, over what the whole cache takes in bf16."""
        return self.handoff_bytes / self.handoff_bf16_bytes if self.handoff_bf16_bytes else 0.0


def ask(client: Client, recipe: str, question: DemoQuestion) -> tuple[Answer, Completion]:
    """Send one question and wait for its answer."""
    began = time.monotonic()
    first = last = None
    stream = client.stream(
        question.prompt_ids, recipe=recipe, max_tokens=MAX_TOKENS, temperature=0.0, timeout_s=REQUEST_TIMEOUT_S
    )
    for chunk in stream:
        if chunk.token_ids:
            last = time.monotonic()
            first = first or last
    completion = stream.completion
    done = last or time.monotonic()
    text = completion.choices[0].text.strip()
    answer = Answer(
        question=question.text,
        expected=question.values,
        text=text,
        num_right=question.num_right(text),
        num_prompt_tokens=completion.usage.prompt_tokens,
        num_tokens=completion.usage.completion_tokens,
        time_to_first_token_s=(first or done) - began,
        decode_s=done - (first or done),
    )
    return answer, completion


def run_recipe(
    client: Client, recipe: str, questions: Sequence[DemoQuestion], asked: Callable[[], None] = lambda: None
) -> RecipeRun:
    """Ask all questions under one recipe; `asked` is called after each."""
    answers = []
    for question in questions:
        answer, completion = ask(client, recipe, question)
        answers.append(answer)
        asked()
    report = completion.recipe
    return RecipeRun(
        recipe=recipe,
        effective=report.effective,
        fallback_reason=report.fallback_reason,
        answers=answers,
        handoff_bytes=report.handoff_bytes,
        handoff_bf16_bytes=report.handoff_bf16_bytes,
        resident_bytes=report.resident_bytes,
    )


def label(recipe: str) -> str:
    """A recipe's name, with that of its preset where that is another one."""
    presets = [f" ({preset})" for preset, name in PRESETS.items() if name == recipe != preset]
    return recipe + "".join(presets)


def why_wrong(runs: Sequence[RecipeRun]) -> str:
    """What stands below the table when FastKV as published has missed something; else empty."""
    if all(run.num_right == run.num_asked for run in runs if run.recipe == "fastkv"):
        return ""
    return (
        "fastkv chooses what to keep by the prompt's last 8 rows, as published; they do not reach the question, "
        "so parts of the facts that it asks for are dropped"
    )


def table(runs: Sequence[RecipeRun]) -> Table:
    """The comparison that the demo ends with."""
    shown = Table(title="One document, its KV cache kept in different ways", title_justify="left")
    shown.caption = (
        "right: numbers given right; shipped: frames and manifest from prefill to decode, over gRPC, and as a share of "
        "the cache in bf16; held: where the prompt's KV then lies, in the decode worker's memory, landmarks and "
        "metadata included"
    )
    if why := why_wrong(runs):
        shown.caption += f"\n{why}"
    shown.caption_justify = "left"
    shown.add_column("recipe")
    for column in ("right", "first token", "tokens/s", "shipped", "of bf16", "held"):
        shown.add_column(column, justify="right", no_wrap=True)
    for run in runs:
        shown.add_row(
            label(run.recipe),
            f"{run.num_right} of {run.num_asked}",
            f"{run.time_to_first_token_s:.1f} s",
            f"{run.tokens_per_s:.1f}",
            f"{run.handoff_bytes / 1e6:.1f} MB",
            f"{run.shipped_share:.3f}",
            f"{run.resident_bytes / 1e6:.1f} MB",
        )
    return shown


def answer_lines(runs: Sequence[RecipeRun]) -> Iterator[str]:
    """Every question with what each recipe answered."""
    for number, answer in enumerate(runs[0].answers):
        yield f"\n{escape(answer.question)}"
        yield f"  hidden in the text: {escape(', '.join(answer.expected))}"
        for run in runs:
            given = run.answers[number]
            right = given.num_right == len(given.expected)
            mark = "[green]right[/green]" if right else "[red]wrong[/red]"
            yield f"  {run.recipe:<8} {mark}  {escape(given.text)}"


def to_json(runs: Sequence[RecipeRun]) -> dict[str, Any]:
    """The runs with the numbers of the table."""
    return {
        "model": DEFAULT_MODEL,
        "seed": SEED,
        "num_facts": NUM_FACTS,
        "recipes": [asdict(run) | {name: getattr(run, name) for name in DERIVED} for run in runs],
    }


def from_json(results: Mapping[str, Any]) -> list[RecipeRun]:
    """The runs that `to_json` wrote."""
    runs = []
    for stored in results["recipes"]:
        fields = {name: value for name, value in stored.items() if name not in DERIVED}
        runs.append(RecipeRun(**fields | {"answers": [Answer(**answer) for answer in stored["answers"]]}))
    return runs


def _progress(console: Console) -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


@contextlib.contextmanager
def _service(given: Service | None, console: Console) -> Iterator[Service]:
    if given is not None:
        yield given
        return
    with contextlib.ExitStack() as stack:
        with console.status("starting a gateway, a prefill worker and a decode worker"):
            service = stack.enter_context(
                running_service("--prefill-workers", "1", "--decode-workers", "1", *OWN_PREFILLS)
            )
        console.print(f"A gateway, a prefill and a decode worker run in processes of their own, at {service.address}.")
        yield Service(service.address)


def run_demo(service: Service | None = None, json_path: Path | None = None, console: Console | None = None) -> int:
    """Run the demo and print its results.

    Args:
        service: a running one with the default model; None starts one for the demo.
        json_path: where to write the results, too.
        console: where to print.

    Returns:
        A process exit status: 0 when every request was answered, rightly or not; 1 when the service did not start.

    Raises:
        KvsluiceError: a request failed.
    """
    console = console or Console()
    try:
        runs = _ask_all(service, console)
    except ServiceFailed as exc:
        console.print(str(exc), markup=False)
        return 1
    for line in answer_lines(runs):
        console.print(line, highlight=False)
    console.print()
    console.print(table(runs))
    for run in runs:
        if run.fallback_reason:
            console.print(f"{run.recipe} ran as {run.effective}: {run.fallback_reason}")
    if json_path is not None:
        write_results(json_path, to_json(runs))
    return 0


def _ask_all(service: Service | None, console: Console) -> list[RecipeRun]:
    questions = demo_questions(load_tokenizer(DEFAULT_MODEL).encode)
    num_asked = sum(len(question.values) for question in questions)
    console.print(
        f"A document of about {NUM_TOKENS} tokens from Python's own reference, with {NUM_FACTS} facts hidden in it; "
        f"{len(questions)} questions for {num_asked} of the {NUM_FACTS} facts, under each of {', '.join(RECIPES)}."
    )
    runs = []
    with (
        _service(service, console) as where,
        Client(where.address, **where.connecting) as client,
        _progress(console) as progress,
    ):
        for recipe in RECIPES:
            task = progress.add_task(f"{recipe:<8}", total=len(questions))
            runs.append(run_recipe(client, recipe, questions, partial(progress.advance, task)))
    return runs
