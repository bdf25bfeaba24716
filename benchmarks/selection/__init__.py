"""Forcing which chunks a decode step attends to."""

from __future__ import annotations

from .held import HeldSelection, force

__all__ = ["HeldSelection", "force"]
