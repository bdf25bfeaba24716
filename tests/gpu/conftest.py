"""What tests on a GPU share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch


@pytest.fixture
def without_waiting() -> Callable[[], AbstractContextManager[None]]:
    """`with without_waiting():` fails where the host would wait for the device."""

    @contextmanager
    def watch() -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mode is a prototype
            try:
                torch.cuda.set_sync_debug_mode("error")
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")

    return watch
