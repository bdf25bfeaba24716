"""Loaded by every Python process that starts with this folder on its PYTHONPATH: wraps the functions that are points,
and lets the process tell of its tasks.

It knows nothing of what it wraps: names come from `points.json` in the folder that `FAILPOINTS` names, which
`rig/failpoints.py` writes. A process of the product that is started otherwise never sees any of this.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import signal
import sys
from collections import Counter
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import tasks

FOLDER = Path(os.environ["FAILPOINTS"])
POINTS: dict[str, list[str]] = json.loads((FOLDER / "points.json").read_text())
_passed: Counter[str] = Counter()


def passing(name: str) -> None:
    """The process is at a point: do what has been ordered for it, once in all processes."""
    order_file = FOLDER / f"{name}.order"
    try:
        order = json.loads(order_file.read_text())
    except FileNotFoundError:
        return
    _passed[order["id"]] += 1
    if _passed[order["id"]] < order["passing"]:
        return
    mine = FOLDER / f"{order['id']}.{os.getpid()}"
    try:
        order_file.rename(mine)  # of several processes, one
    except FileNotFoundError:
        return
    mine.write_text(str(os.getpid()))
    mine.rename(FOLDER / f"{order['id']}.done")
    if order["do"] in ("SIGKILL", "SIGSTOP"):
        os.kill(os.getpid(), signal.Signals[order["do"]])
        return
    module, _, error = order["do"].partition(":")
    raise getattr(importlib.import_module(module), error)(f"failpoint {name}")


def wrapped(function: Any, name: str, moment: str) -> Any:
    """The function with a point before its first line or behind its last."""
    before, after = moment == "before", moment == "after"
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def awaited(*args: Any, **kwargs: Any) -> Any:
            if before:
                passing(name)
            result = await function(*args, **kwargs)
            if after:
                passing(name)
            return result

        return awaited

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if before:
            passing(name)
        result = function(*args, **kwargs)
        if after:
            passing(name)
        return result

    return called


def wrap_points(module: ModuleType) -> None:
    """Put a module's points in. A function that is not there (any more) is an error, not a test of nothing."""
    for name, (of_module, path, moment) in POINTS.items():
        if of_module == module.__name__:
            owner: Any = module
            *outer, last = path.split(".")
            for part in outer:
                owner = getattr(owner, part)
            setattr(owner, last, wrapped(getattr(owner, last), name, moment))


class Finder(MetaPathFinder):
    """Finds the modules that have points as they would be found anyway, and wraps once they are loaded."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not any(module == name for module, _, _ in POINTS.values()):
            return None
        spec = PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.loader is not None, f"{name} has points and is not there"
        load = spec.loader.exec_module

        def load_and_wrap(module: ModuleType) -> None:
            load(module)
            wrap_points(module)

        spec.loader.exec_module = load_and_wrap  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Finder())
tasks.start(FOLDER)
