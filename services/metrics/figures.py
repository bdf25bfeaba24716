"""What an engine counts of its own work: plain numbers, written by its thread alone and read by any.

An engine runs where no metrics library is installed, so these are exported by whoever has one (`worker`). A reader may
see numbers that are one step apart.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...errors import RequestCancelled

BATCH = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
ROWS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 65536)
WORK_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
NATS = (1e-6, 1e-5, 1e-4, 1e-3, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
MEMORY_ERRORS = ("OutOfMemoryError", "MemoryError")


class Distribution:
    """A histogram.

    Args:
        bounds: upper bounds of its buckets, ascending.

    Attributes:
        counts: of each bucket, one more for what lies above all.
        total: sum of all values.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass
class Figures:
    """What both kinds of engines count.

    Attributes:
        failures: requests that ended by an error, by its type; what is not of the error tree counts under its own.
    """

    failures: Counter[str] = field(default_factory=Counter)

    def failed(self, exc: Exception) -> None:
        """A request has ended so; those that were cancelled do not count."""
        if not isinstance(exc, RequestCancelled):
            self.failures[type(exc).__name__] += 1


@dataclass
class PrefillFigures(Figures):
    """A prefill engine's work.

    Attributes:
        pack_rows: rows of each pack that ran; one value a pack.
        pack_seconds: of the engine's thread, for each; on a GPU the work goes on beside it.
        prompts, prompt_tokens: that gave their first tokens.
        prefix_queries, prefix_hits: tokens of prompts that were looked up in shared prefixes, and those of them that
            were found, so that they did not run.
    """

    pack_rows: Distribution = field(default_factory=lambda: Distribution(ROWS))
    pack_seconds: Distribution = field(default_factory=lambda: Distribution(WORK_S))
    prompts: int = 0
    prompt_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0

    def looked_up(self, prompt_tokens: int, found_tokens: int) -> None:
        """A prompt has started, of which so many tokens were found."""
        self.prefix_queries += prompt_tokens
        self.prefix_hits += found_tokens

    def ran(self, rows: int, seconds: float) -> None:
        """A pack has run."""
        self.pack_rows.add(rows)
        self.pack_seconds.add(seconds)

    def began(self, prompt_tokens: int) -> None:
        """A prompt has given its first tokens."""
        self.prompts += 1
        self.prompt_tokens += prompt_tokens


class QualityFigures:
    """What comparing steps with full attention gave, by recipe.

    Attributes:
        divergence: KL of the next token's distributions, in nats; one value a comparison.
        agreements: comparisons in which the best token was the same.
        skipped: (recipe, reason) -> steps that were to be compared and were not.
    """

    def __init__(self) -> None:
        self.divergence: dict[str, Distribution] = {}
        self.agreements: Counter[str] = Counter()
        self.skipped: Counter[tuple[str, str]] = Counter()

    def compared(self, recipe: str, divergence: float, agrees: bool) -> None:
        """A step was compared."""
        if recipe not in self.divergence:
            self.divergence[recipe] = Distribution(NATS)
        self.divergence[recipe].add(divergence)
        self.agreements[recipe] += agrees


@dataclass
class DecodeFigures(Figures):
    """A decode engine's work.

    Attributes:
        batch: choices in each step that ran; one value a step.
        step_seconds: of the engine's thread, for each; on a GPU the work goes on beside it.
        tokens: that were drawn and told.
        quality: of steps that were compared with full attention.
        hot_lookups, hot_misses: chunks of values in host memory that attention wanted, and those of them that had to be
            fetched; up to some steps ago.
    """

    batch: Distribution = field(default_factory=lambda: Distribution(BATCH))
    step_seconds: Distribution = field(default_factory=lambda: Distribution(WORK_S))
    tokens: int = 0
    quality: QualityFigures = field(default_factory=QualityFigures)
    hot_lookups: int = 0
    hot_misses: int = 0

    def ran(self, choices: int, seconds: float, hot_counts: tuple[int, int]) -> None:
        """A step has run; `hot_counts` are lookups and misses up to some steps ago."""
        self.hot_lookups, self.hot_misses = hot_counts
        self.batch.add(choices)
        self.step_seconds.add(seconds)


def out_of_memory(failures: Counter[str]) -> int:
    """How many of the failures were for want of memory."""
    return sum(failures[name] for name in MEMORY_ERRORS)
