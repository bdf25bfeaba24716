"""Points in the product's code at which a test has a process killed, frozen, or fail.

The product knows nothing of them. Processes of a service that is started inside `failpoints` load
`injected/sitecustomize.py`, which wraps functions by name when their modules are loaded; a test then orders what
happens at a point, by a file. None of it is in the wheel.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvsluice.tests.faults.rig.processes import wait_until

INJECTED = Path(__file__).resolve().parent / "injected"


@dataclass(frozen=True)
class Point:
    """Before a function's first line, or behind its last.

    Attributes:
        module: as the function is looked up when it is called.
        function: name in the module, or Class.method.
        moment: before or after.
    """

    module: str
    function: str
    moment: str


class Failpoints:
    """Orders what happens at points.

    Args:
        folder: that the processes look into.
        points: by name.
    """

    def __init__(self, folder: Path, points: Mapping[str, Point]) -> None:
        self._folder, self._points = folder, points
        self._numbers = itertools.count()
        table = {name: [point.module, point.function, point.moment] for name, point in points.items()}
        (folder / "points.json").write_text(json.dumps(table))

    def order(self, name: str, do: str = "SIGKILL", passing: int = 1) -> Path:
        """Have the process that passes a point for this time from now on do something there.

        Args:
            do: SIGKILL, SIGSTOP, or the error that is raised, as module:class.
            passing: passings are counted in each process; the first that comes so far does it, and no other.

        Returns:
            A file that holds the process's id once it was done.
        """
        assert name in self._points, f"no point is called {name}"
        number = f"{name}-{next(self._numbers)}"
        draft = self._folder / f"{number}.draft"
        draft.write_text(json.dumps({"id": number, "do": do, "passing": passing}))
        draft.rename(self._folder / f"{name}.order")  # whole or not at all
        return self._folder / f"{number}.done"

    def await_passed(self, done: Path) -> int:
        """Wait until an order was carried out. Returns the process that did."""
        wait_until(done.exists, f"{done.stem} is passed", timeout_s=60.0)
        return int(done.read_text())

    def tasks(self, pids: Sequence[int]) -> dict[int, Counter[str]]:
        """Tasks of asyncio that have not ended in each of these processes, by the name of what they run."""
        number = next(self._numbers)
        draft = self._folder / "tasks.draft"
        draft.write_text(str(number))
        draft.rename(self._folder / "tasks.question")
        answers = {pid: self._folder / f"tasks.{pid}.{number}" for pid in pids}
        wait_until(lambda: all(answer.exists() for answer in answers.values()), "processes tell of their tasks")
        return {pid: Counter(json.loads(answer.read_text())) for pid, answer in answers.items()}

    def withdraw(self) -> None:
        """Forget what has not come about."""
        for order in self._folder.glob("*.order"):
            order.unlink(missing_ok=True)


@contextmanager
def failpoints(folder: Path, points: Mapping[str, Point]) -> Iterator[Failpoints]:
    """Processes that are started inside have these points."""
    made = Failpoints(folder, points)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAILPOINTS", str(folder))
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(INJECTED), os.environ.get("PYTHONPATH")))))
        yield made
