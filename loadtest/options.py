"""What `kvsluice loadtest` can be told: one list of keys, checked in one place.

Names are those of `vllm bench serve` where both have them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import InvalidRequest
from .arrivals import RateProfile, parse_rate
from .goals import METRICS, Goal, parse_goodput, parse_slo, request_bounds
from .lengths import Distribution, Fixed, parse_distribution

MAX_PROMPTS = 1_000_000
SEVERAL = ("goodput",)  # may be given more than once
SPELLED = {"json_file": "json"}  # keys whose flag has another name

MAX_TEXT = 4096  # characters of an option


class LoadOptions(BaseModel):
    """Everything that a run is told. Lengths are in tokens, times in seconds unless their name says otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=True)

    address: str = Field(
        "127.0.0.1:8033", max_length=1024, description="host:port of the service; for HTTP also its URL"
    )
    backend: Literal["grpc", "http"] = Field("grpc", description="which door: the gRPC API, or OpenAI's over HTTP")
    model: str = Field("", max_length=256, description="served model's name; default: the server's")

    num_prompts: int = Field(1000, ge=1, le=MAX_PROMPTS, description="requests that count, at most")
    num_warmups: int = Field(0, ge=0, le=MAX_PROMPTS, description="requests in front of them that do not count")
    duration_s: float | None = Field(None, gt=0, le=7 * 86400, description="begin nothing new after so long")
    request_rate: str = Field(
        "inf",
        description="requests a second: a number, inf = all at once, or a ramp such as 1@0,10@60,2@90 (rate@second)",
        max_length=MAX_TEXT,
    )
    burstiness: float = Field(
        1.0, gt=0, description="shape of the gamma distribution of gaps: 1 = Poisson, below = bursts, inf = equal gaps"
    )
    max_concurrency: int | None = Field(
        None, ge=1, le=100_000, description="requests open at once; others wait, and their latency grows"
    )
    closed_loop: bool = Field(
        False, description="hold --max-concurrency conversations open, each followed by the next, instead of arrivals"
    )
    timeout_s: float = Field(600.0, gt=0, le=86400, description="deadline of a request, from when it is sent")
    max_open: int = Field(10_000, ge=1, le=1_000_000, description="open requests beyond which the client gives up")
    late_after_ms: float = Field(50.0, gt=0, le=60_000, description="a request sent later than that counts as late")
    seed: int = Field(0, ge=0, lt=2**63, description="of arrivals, lengths, prompts and all other choices")

    dataset_name: Literal["random", "custom", "mooncake", "azure"] = Field(
        "random", description="made-up prompts, prompts of one's own, or a recorded load"
    )
    dataset_path: Path | None = Field(None, description="file of prompts or of the recorded load")
    input_len: str = Field(
        "512",
        description="of prompts: a number, uniform:LOW..HIGH, lognormal:MEAN,SIGMA, empirical:FILE",
        max_length=MAX_TEXT,
    )
    output_len: str = Field("64", description="of answers, as --input-len", max_length=MAX_TEXT)
    prefix_len: int = Field(0, ge=0, le=2**24, description="tokens in front that prompts share with others")
    num_prefixes: int = Field(1, ge=1, le=2**20, description="how many different ones of these there are")
    tokenizer: Path | None = Field(
        None, description="tokenizer.json or its folder: prompts are made of its words, not of any ids"
    )
    vocab_size: int | None = Field(None, ge=2, le=2**22, description="ids to draw from where the door does not say")
    prompt_text: bool = Field(False, description="send made-up prompts as text, which takes --tokenizer")
    trace_speed: float = Field(1.0, gt=0, le=1e6, description="how much faster than recorded")
    trace_keep: float = Field(1.0, gt=0, le=1, description="share of recorded requests that are sent, drawn by --seed")
    length_scale: float = Field(1.0, gt=0, le=1000, description="of recorded lengths")
    turns: str = Field("1", description="requests of a conversation, as --input-len", max_length=MAX_TEXT)
    think_s: str = Field("0", description="from an answer's end to the next turn, as --input-len", max_length=MAX_TEXT)
    history: bool = Field(False, description="turns send the whole conversation again, instead of naming a session")
    recipes: str = Field(
        "", description="recipes with weights, such as exact=1,balanced=3; default: the server's", max_length=MAX_TEXT
    )
    cancel_rate: float = Field(0.0, ge=0, le=1, description="share of requests that are cancelled")
    cancel_after_s: str = Field(
        "uniform:0..2", description="when they are, in seconds from sending, as --input-len", max_length=MAX_TEXT
    )
    temperature: float = Field(0.0, ge=0, le=2, description="of sampling; 0 = greedy")
    ignore_eos: bool = Field(True, description="answers are as long as asked for")

    slo: str = Field(
        "",
        description="goals, such as ttft_p99=2s,tpot_p99=50ms,errors=1%; the exit status says whether they are met",
        max_length=MAX_TEXT,
    )
    goodput: tuple[str, ...] = Field(
        (), description="bounds of a good request in ms, such as ttft:2000 tpot:50; default: those of --slo"
    )
    percentile_metrics: str = Field("ttft,tpot,itl,e2el", description="latencies to print", max_length=MAX_TEXT)
    metric_percentiles: str = Field("99", description="percentiles to print, such as 50,95,99.9", max_length=MAX_TEXT)
    find_max_rate: bool = Field(
        False, description="look for the highest rate at which --slo is met, beginning with --request-rate"
    )
    max_rate: float = Field(1e4, gt=0, le=1e6, description="the highest rate that --find-max-rate tries")
    rate_tolerance: float = Field(0.05, gt=0, lt=1, description="how close it comes, as a share of the rate")
    max_trials: int = Field(16, ge=2, le=100, description="runs that it makes at most")

    json_file: Path | None = Field(None, description="write the results to this file")
    requests: bool = Field(True, description="write every request to it, for comparisons and plots")
    html: Path | None = Field(None, description="write a report with plots to this file, which needs no network")
    progress: bool = Field(True, description="show how it goes on, on a terminal")

    @field_validator("goodput", mode="before")
    @classmethod
    def _given_once_or_more(cls, value: Any) -> Any:
        return () if value is None else tuple(value)

    @model_validator(mode="after")
    def _parts_parse(self) -> LoadOptions:
        """Everything that has a form of its own is read once, so that what is wrong is said before any work."""
        self.rate, self.percentiles, self.metrics, self.goals, self.bounds, self.mix_of_recipes  # noqa: B018
        for key in ("input_len", "output_len", "turns", "think_s", "cancel_after_s"):
            self.distribution(key)
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> LoadOptions:
        needs = {
            "--closed-loop": (self.closed_loop and self.max_concurrency is None, "with --max-concurrency"),
            "--dataset-path": (
                (self.dataset_path is None) != (self.dataset_name == "random"),
                "a file with --dataset-name custom, mooncake or azure; none with random",
            ),
            "--find-max-rate": (
                self.find_max_rate and (not self.slo or self.closed_loop or not self.has_plain_rate),
                "with --slo and one finite --request-rate to begin with, without --closed-loop",
            ),
            "--prompt-text": (self.prompt_text and self.tokenizer is None, "with --tokenizer"),
            "--history": (
                self.history and (self.backend == "http" or self.prompt_text),
                "over gRPC, with prompts as token ids: other doors do not tell the ids of answers",
            ),
            "--turns": (
                self.dataset_name != "random" and self.distribution("turns") != Fixed(1),
                "with --dataset-name random",
            ),
            "--trace-speed": (
                self.trace_speed != 1 and self.dataset_name == "random",
                "with a recorded load",
            ),
        }
        for option, (is_wrong, allowed) in needs.items():
            if is_wrong:
                raise InvalidRequest(option, "does not fit the other options", allowed)
        return self

    @property
    def has_plain_rate(self) -> bool:
        return len(self.rate.rates) == 1 and not self.rate.at_once

    @property
    def rate(self) -> RateProfile:
        return parse_rate(self.request_rate)

    @property
    def goals(self) -> tuple[Goal, ...]:
        return parse_slo(self.slo) if self.slo else ()

    @property
    def bounds(self) -> dict[str, float]:
        """Of a good request, in seconds by metric."""
        return parse_goodput(self.goodput) if self.goodput else request_bounds(self.goals)

    @property
    def percentiles(self) -> tuple[float, ...]:
        values = []
        for part in self.metric_percentiles.split(","):
            try:
                values.append(float(part))
            except ValueError:
                values.append(-1.0)
        if not values or not all(0 < value <= 100 for value in values):
            allowed = "numbers above 0, up to 100, with commas between them"
            raise InvalidRequest("--metric-percentiles", f"got {self.metric_percentiles[:64]!r}", allowed)
        return tuple(values)

    @property
    def metrics(self) -> tuple[str, ...]:
        names = tuple(part.strip() for part in self.percentile_metrics.split(","))
        if not set(names) <= set(METRICS):
            raise InvalidRequest("--percentile-metrics", f"got {self.percentile_metrics[:64]!r}", ", ".join(METRICS))
        return names

    @property
    def mix_of_recipes(self) -> dict[str, float]:
        """Weights by recipe; "" = the server's default."""
        found: dict[str, float] = {}
        for part in filter(None, (part.strip() for part in self.recipes.split(","))):
            name, equals, weight = part.partition("=")
            try:
                found[name.strip()] = float(weight) if equals else 1.0
            except ValueError:
                found[name.strip()] = -1.0
        if any(not 0 < weight < 1e9 for weight in found.values()) or "" in found:
            raise InvalidRequest("--recipes", f"got {self.recipes[:64]!r}", "NAME or NAME=WEIGHT, weights above 0")
        return found or {"": 1.0}

    def distribution(self, key: str) -> Distribution:
        """The distribution that a key names. Lengths are at least 1."""
        least = 1.0 if key in ("input_len", "output_len", "turns") else 0.0
        return parse_distribution(getattr(self, key), f"--{key.replace('_', '-')}", least)

    def settings(self) -> dict[str, Any]:
        """The options that say what was measured, as JSON can hold them."""
        elsewhere = {"json_file", "html", "progress", "requests"}
        found: dict[str, Any] = {}
        for key, value in self.model_dump(mode="json", exclude=elsewhere).items():
            found[key] = str(value) if isinstance(value, float) and value == float("inf") else value
        return found


@dataclass(frozen=True)
class Listed:
    """A key as a flag, for `services.cli_options.signature`."""

    name: str
    key: str
    full_help: str
    metavar: str
    several: bool
    flag: bool


def listed() -> Iterator[Listed]:
    """One flag for every key; switches that are on by default are named by what turns them off."""
    for key, field in LoadOptions.model_fields.items():
        name, help_text = SPELLED.get(key, key.replace("_", "-")), field.description or ""
        is_switch = field.annotation is bool
        if is_switch and field.default:
            name, help_text = f"no-{name}", f"not so: {help_text}"
        shown = "" if is_switch or field.default in (None, "", ()) else f"; default: {_plain(field.default)}"
        yield Listed(
            name,
            key,
            help_text + shown,
            "" if is_switch else _metavar(field.annotation, name),
            key in SEVERAL,
            is_switch,
        )


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _metavar(annotation: Any, name: str) -> str:
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)] or [annotation]
    if get_origin(annotation) is Literal:
        return "|".join(kinds)
    if name.endswith("-s"):
        return "SECONDS"
    named = {Path: "FILE", int: "N", float: "X"}
    return next((named[kind] for kind in kinds if kind in named), "TEXT")


def parse_options(given: Mapping[str, Any]) -> LoadOptions:
    """Options from flags by key: text, lists of text, or bool; None = not given.

    Raises:
        InvalidRequest: names the option and what it allows.
    """
    values: dict[str, Any] = {}
    for key, field in LoadOptions.model_fields.items():
        value = given.get(key)
        if value is None or value == []:
            continue
        if field.annotation is bool:
            # a switch that was given turns its default around
            values[key] = field.default != value
        else:
            values[key] = value
    try:
        return LoadOptions.model_validate(values)
    except ValidationError as exc:
        first = exc.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else "options"
        option = f"--{SPELLED.get(key, key.replace('_', '-'))}"
        raise InvalidRequest(option, f"got {str(first['input'])[:64]!r}", first["msg"]) from exc
