"""`kvsluice loadtest`: opens a door, drives a load through it, and says what came of it."""

from __future__ import annotations

import asyncio
import math
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..client import Connecting
from ..errors import InvalidRequest
from .arrivals import RateProfile
from .driver import Driver, Limits
from .figures import by_recipe, measure
from .goals import Goal, Verdict, judge
from .http_transport import HttpTransport
from .options import LoadOptions
from .outcomes import Recording
from .progress import watching
from .results import LoadResults, RunResults, check_writable, request_columns, save
from .search import Trial, find_max_rate
from .stationarity import is_stationary
from .text_report import report
from .traces import TraceRow, read_trace
from .transport import GrpcTransport, Request, Sampling, Transport
from .vocabulary import Vocabulary
from .workload import Lengths, Mix, Trace, Workload

EXIT_MISSED, EXIT_INVALID, EXIT_INTERRUPTED = 3, 4, 130
PROBE_TOKENS = 1


@dataclass(frozen=True)
class Door:
    """An open door and what is behind it.

    Attributes:
        most_tokens: of prompt and answer, or None where the door does not say.
        about: what the service says of itself, for the results.
    """

    transport: Transport
    vocabulary: Vocabulary | None
    most_tokens: int | None
    about: Mapping[str, Any]


def run_command(options: LoadOptions, environment: Mapping[str, Any], connecting: Connecting | None = None) -> int:
    """Run, print the report and write the files. Returns the exit status: 0, or 3 where a goal was missed, 4 where the
    client could not keep up, 130 where it was interrupted.

    Args:
        environment: hardware, versions and commit, for the file of results.
        connecting: key and TLS.

    Raises:
        KvsluiceError: an option that cannot work, or a service that cannot be reached or refuses the requests.
    """
    for path, option in ((options.json_file, "--json"), (options.html, "--html")):
        if path is not None:
            check_writable(path, option)
    rows = [] if options.dataset_path is None else read_trace(options.dataset_name, options.dataset_path)
    results = asyncio.run(run(options, rows, environment, connecting))
    print(report(results.last, options.metrics), end="")
    if results.search is not None:
        print(results.search["shown"])
    if options.json_file is not None:
        save(options.json_file, results)
        print(f"written to {options.json_file}")
    if options.html is not None:
        from .html_report import write_html

        write_html(options.html, results)
        print(f"written to {options.html}")
    return exit_status(results)


def exit_status(results: LoadResults) -> int:
    """What the results come to, as `run_command` says."""
    if results.last.figures["interrupted"]:
        return EXIT_INTERRUPTED
    if results.last.invalid:
        return EXIT_INVALID
    if results.search is not None:
        return 0 if results.search["max_rate"] is not None else EXIT_MISSED
    return 0 if results.last.is_met else EXIT_MISSED


async def run(
    options: LoadOptions,
    rows: list[TraceRow],
    environment: Mapping[str, Any],
    connecting: Connecting | None = None,
) -> LoadResults:
    """The results of a run, or of a search for the highest rate."""
    door = await _open(options, connecting)
    try:
        await _probe(door, options)
        settings = options.settings() | {"service": dict(door.about)}
        if not options.find_max_rate:
            one = await _one_run(door, options, rows, options.rate, options.seed, "load")
            return LoadResults(dict(environment), settings, [one])
        return await _search(door, options, rows, dict(environment), settings)
    finally:
        await door.transport.close()


async def _open(options: LoadOptions, connecting: Connecting | None) -> Door:
    sampling = Sampling(options.model, options.temperature, options.ignore_eos, options.seed)
    vocabulary = None if options.tokenizer is None else Vocabulary.of_tokenizer(options.tokenizer)
    if vocabulary is None and options.vocab_size is not None:
        vocabulary = Vocabulary.of_size(options.vocab_size)
    if options.backend == "grpc":
        return await _open_grpc(GrpcTransport(options.address, sampling, connecting), vocabulary)
    if vocabulary is None and options.dataset_name != "custom":
        problem = "OpenAI's API does not say how large the vocabulary is"
        raise InvalidRequest("--vocab-size", problem, "give it, or --tokenizer")
    transport = HttpTransport(options.address, sampling, connecting)
    try:
        name = options.model or await transport.model_name()
        transport.use_model(name)
    except BaseException:
        await transport.close()
        raise
    return Door(transport, vocabulary, None, {"model": name})


async def _open_grpc(transport: GrpcTransport, vocabulary: Vocabulary | None) -> Door:
    try:
        info = await transport.model_info()
    except BaseException:
        await transport.close()
        raise
    about = {
        "model": info.model,
        "fingerprint": info.fingerprint,
        "version": info.version,
        "max_model_len": info.max_model_len,
        "default_recipe": info.default_recipe,
    }
    return Door(transport, vocabulary or Vocabulary.of_size(info.vocab_size), info.max_model_len, about)


async def _probe(door: Door, options: LoadOptions) -> None:
    """One short request for each recipe before anything counts: what the service refuses ends the command at once."""
    prompt: Any = "Hello" if door.vocabulary is None else tuple(door.vocabulary.ids[:8].tolist())
    for recipe in options.mix_of_recipes:
        request = Request(prompt, PROBE_TOKENS, recipe, "", options.timeout_s)
        async with asyncio.timeout(options.timeout_s):
            await door.transport.run(request, lambda count: None)


def _workload(
    door: Door, options: LoadOptions, rows: list[TraceRow], rate: RateProfile, seed: int, run_id: str
) -> Workload:
    output_tokens = options.distribution("output_len")
    source: Lengths | Trace
    if options.dataset_name == "random":
        source = Lengths(
            rate,
            options.burstiness,
            options.distribution("input_len"),
            output_tokens,
            options.prefix_len,
            options.num_prefixes,
        )
    else:
        source = Trace(
            rows,
            rate,
            options.burstiness,
            output_tokens,
            options.trace_speed,
            options.trace_keep,
            options.length_scale,
        )
    mix = Mix(
        options.mix_of_recipes,
        options.distribution("turns"),
        options.distribution("think_s"),
        options.cancel_rate,
        options.distribution("cancel_after_s"),
        options.prompt_text,
    )
    return Workload(
        source,
        mix,
        door.vocabulary,
        seed=seed,
        count=options.num_prompts,
        num_warmups=options.num_warmups,
        most_tokens=door.most_tokens,
        run_id=run_id,
    )


async def _one_run(
    door: Door, options: LoadOptions, rows: list[TraceRow], rate: RateProfile, seed: int, title: str
) -> RunResults:
    workload = _workload(door, options, rows, rate, seed, uuid.uuid4().hex[:12])
    limits = Limits(
        deadline_s=options.timeout_s,
        max_concurrency=options.max_concurrency,
        closed_loop=options.closed_loop,
        duration_s=options.duration_s,
        max_open=options.max_open,
        late_after_s=options.late_after_ms / 1e3,
        history=options.history,
    )
    with watching(workload.total, title, options.progress) as observer:
        recording = await Driver(door.transport, limits, observer).run(workload)
    return summarize(recording, options, shown_rate(rate, options))


def summarize(recording: Recording, options: LoadOptions, rate: str) -> RunResults:
    """A recording as the results hold it."""
    outcomes = recording.counted()
    health = recording.health
    return RunResults(
        rate=rate,
        settings={"max_concurrency": options.max_concurrency, "closed_loop": options.closed_loop},
        figures=measure(recording, options.bounds, options.percentiles),
        recipes=by_recipe(recording, options.percentiles),
        goals=[_judged(one) for one in judge(options.goals, outcomes, recording.itl)],
        client={
            "late_after_s": health.late_after_s,
            "late": health.late,
            "most_late_s": health.most_late_s,
            "lag_p99_s": health.lag_p99_s,
            "most_lag_s": health.most_lag_s,
            "busy_share": health.busy_share,
            "max_rss_bytes": health.max_rss_bytes,
        },
        invalid=health.complaint(),
        stationary=None if options.closed_loop else is_stationary(outcomes),
        requests=request_columns(recording) if options.requests else {},
        itl=[[value, count] for value, count in recording.itl.filled()] if options.requests else [],
        tokens=[[second, count] for second, count in sorted(recording.tokens.items())] if options.requests else [],
    )


def _judged(verdict: Verdict) -> dict[str, Any]:
    goal: Goal = verdict.goal
    value = verdict.value
    return {
        "name": goal.name,
        "bound": goal.bound,
        "value": None if value is None or math.isinf(value) else value,
        "shown": goal.shown(value),
        "wanted": goal.shown(goal.bound),
        "met": verdict.is_met,
    }


def shown_rate(rate: RateProfile, options: LoadOptions) -> str:
    """A rate as the results name it."""
    if options.closed_loop:
        return f"closed loop of {options.max_concurrency}"
    if options.dataset_name in ("mooncake", "azure"):
        return f"as recorded, {options.trace_speed:g} times as fast"
    if len(rate.rates) > 1:
        return options.request_rate
    return f"{rate.rates[0]:.4g}"


async def _search(
    door: Door, options: LoadOptions, rows: list[TraceRow], environment: dict[str, Any], settings: dict[str, Any]
) -> LoadResults:
    runs: list[RunResults] = []

    async def attempt(rate: float) -> Trial:
        number = len(runs)
        # a seed of its own: a rate must not be found because of one lucky sequence
        one = await _one_run(
            door, options, rows, RateProfile.constant(rate), options.seed + number, f"trial {number + 1}"
        )
        runs.append(one)
        trial = Trial(rate, one.is_met, one.stationary is not False, one.invalid, bool(one.figures["interrupted"]))
        reasons = ", ".join(f"{goal['name']} {goal['shown']}" for goal in one.goals)
        print(f"trial {number + 1}: {rate:.4g} req/s: {trial.shown} ({reasons})", file=sys.stderr, flush=True)
        return trial

    found = await find_max_rate(
        attempt, options.rate.rates[0], options.max_rate, options.rate_tolerance, options.max_trials
    )
    # the run at the rate that was found is the one reported
    best = next((i for i, trial in enumerate(found.trials) if trial.rate == found.max_rate and trial.passes), None)
    ordered = runs if best is None else [*runs[:best], *runs[best + 1 :], runs[best]]
    last = ordered[-1]
    kept = [replace(one, requests={}, itl=[], tokens=[]) for one in ordered[:-1]]
    return LoadResults(environment, settings, [*kept, last], found.to_json())
