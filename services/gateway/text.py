"""Text of one choice as it grows: incremental detokenization and stop strings across token and chunk boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class IncrementalDecoder(Protocol):
    """What `models.tokenizer.Tokenizer.stream()` returns."""

    def push(self, ids: list[int]) -> str: ...
    def finish(self) -> str: ...


@dataclass(frozen=True)
class TextStep:
    """What became final with one more token.

    Attributes:
        text: text that no later token can change or take back.
        stop_match: the stop string that this token completed, else None.
    """

    text: str
    stop_match: str | None = None


class StopMatcher:
    """Withholds text while it could be the start of a stop string.

    `held` is always the longest end of the text so far that is a proper beginning of some stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str, may_stop: bool) -> TextStep:
        """Add text. A stop string ends the choice only if this text completes it and `may_stop` is set."""
        if not self._stops:
            return TextStep(text)
        old = len(self._held)
        whole = self._held + text
        if may_stop:
            match = self._first_match(whole, old)
            if match is not None:
                begin, stop = match
                self._held = ""
                return TextStep(whole[:begin], stop)
        keep = self._start_of_stop(whole)
        self._held = whole[len(whole) - keep :]
        return TextStep(whole[: len(whole) - keep])

    def finish(self) -> str:
        """The withheld text, once nothing can follow."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, whole: str, old: int) -> tuple[int, str] | None:
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            # a match that ends inside the old part was complete while stopping was not allowed
            begin = whole.find(stop, max(0, old - len(stop) + 1))
            if begin >= 0 and (best is None or (begin + len(stop), begin) < best[:2]):
                best = (begin + len(stop), begin, stop)
        return None if best is None else (best[1], best[2])

    def _start_of_stop(self, whole: str) -> int:
        longest = 0
        for stop in self._stops:
            for n in range(min(len(stop) - 1, len(whole)), longest, -1):
                if whole.endswith(stop[:n]):
                    longest = n
                    break
        return longest


class ChoiceText:
    """Turns a choice's token ids into text.

    Args:
        min_tokens: stop strings that a token at or before this count completes do not end the choice.
    """

    def __init__(self, decoder: IncrementalDecoder, stops: Sequence[str], min_tokens: int) -> None:
        self._decoder = decoder
        self._matcher = StopMatcher(stops)
        self._min_tokens = min_tokens
        self.num_tokens = 0

    def push(self, token_id: int) -> TextStep:
        """Add one token."""
        self.num_tokens += 1
        return self._matcher.push(self._decoder.push([token_id]), self.num_tokens > self._min_tokens)

    def skip(self) -> None:
        """Count a token that ends the choice and gives no text, such as end of sequence."""
        self.num_tokens += 1

    def finish(self) -> TextStep:
        """The rest, once the model has ended the choice."""
        last = self._matcher.push(self._decoder.finish(), self.num_tokens > self._min_tokens)
        if last.stop_match is not None:
            return last
        return TextStep(last.text + self._matcher.finish())
