"""What every slot filling is, how one is built from JSON, and the checks that their fields share. Free of torch."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from typing import Any, ClassVar

from ..errors import InvalidRecipe

SLOT_NAMES = (
    "propagation",
    "scorer",
    "budget",
    "evicted",
    "key_codec",
    "value_codec",
    "sharing",
    "retrieval",
    "window",
)

_FILLINGS: dict[str, dict[str, type[Filling]]] = {name: {} for name in SLOT_NAMES}


class Filling:
    """Base of all slot fillings: frozen dataclasses of plain numbers. Defining one registers it.

    Attributes:
        slot: the slots that the filling may stand in.
        kind: its name in JSON.
    """

    slot: ClassVar[tuple[str, ...]] = ()
    kind: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        add_filling(cls)

    def open_field(self) -> str | None:
        """A field that resolution must still fill in, None when there is none."""
        return next((f.name for f in fields(self) if getattr(self, f.name) is None), None)  # type: ignore[arg-type]

    def neutral(self) -> Filling:
        """The filling that loses nothing, as near to this one as there is; itself where it loses nothing."""
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind} | {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]


def add_filling(cls: type[Filling]) -> None:
    """Make a filling known by its kind, in every slot that it may stand in."""
    for slot in cls.slot:
        _FILLINGS[slot][cls.kind] = cls


def forget_filling(cls: type[Filling]) -> None:
    """Take a filling that was defined for a while, as in a test, out of the table of kinds."""
    for slot in cls.slot:
        if _FILLINGS[slot].get(cls.kind) is cls:
            del _FILLINGS[slot][cls.kind]


def filling_kinds(slot: str) -> tuple[str, ...]:
    """The kinds that may stand in a slot."""
    return tuple(sorted(_FILLINGS[slot]))


def filling_from_dict(slot: str, raw: object) -> Filling:
    """Build the filling that a JSON object describes.

    Raises:
        InvalidRecipe: an unknown kind or key, a missing key, or a value that the filling refuses.
    """
    known = _FILLINGS[slot]
    if not isinstance(raw, dict) or not isinstance(raw.get("kind"), str):
        raise InvalidRecipe(f"recipe.{slot}", "is not an object with a string `kind`", ", ".join(sorted(known)))
    kind = raw["kind"]
    if kind not in known:
        raise InvalidRecipe(f"recipe.{slot}.kind", f"unknown kind {kind[:64]!r}", ", ".join(sorted(known)))
    cls = known[kind]
    names = sorted(f.name for f in fields(cls))  # type: ignore[arg-type]
    for key in raw:
        if key != "kind" and key not in names:
            raise InvalidRecipe(f"recipe.{slot}", f"unknown key {str(key)[:64]!r}", ", ".join(names) or "no keys")
    try:
        return cls(**{key: value for key, value in raw.items() if key != "kind"})
    except InvalidRecipe as exc:
        # a filling that fits several slots does not know in which one it stands
        field = re.sub(r"^recipe\.codec\b", f"recipe.{slot}", exc.field)
        raise InvalidRecipe(field, exc.problem, exc.allowed) from exc
    except TypeError as exc:
        raise InvalidRecipe(f"recipe.{slot}", "a required key is missing", ", ".join(names)) from exc


def shown(value: object) -> str:
    """A value as an error message may show it: bounded, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 256:
        return "got an integer of more than 256 bits"
    return f"got {value!r}"[:96]


def check_int(where: str, value: object, low: int, high: int, optional: bool = False) -> None:
    """Refuse anything but an integer in [low, high] (or None where it is optional)."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRecipe(where, shown(value), f"an integer from {low} to {high}")


def check_odd(where: str, value: object, high: int) -> None:
    """Refuse anything but an odd integer in [1, high]."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high or value % 2 == 0:
        raise InvalidRecipe(where, shown(value), f"an odd integer from 1 to {high}")


def check_rate(where: str, value: object, optional: bool = False) -> None:
    """Refuse anything but a finite number in (0, 1] (or None where it is optional)."""
    if value is None and optional:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value <= 1 or not math.isfinite(value):  # type: ignore[operator, arg-type]
        raise InvalidRecipe(where, shown(value), "a number above 0 and at most 1")


def check_number(where: str, value: object, low: float, high: float) -> None:
    """Refuse anything but a finite number in [low, high]."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # type: ignore[operator]
        raise InvalidRecipe(where, shown(value), f"a number from {low:g} to {high:g}")


def check_choice(where: str, value: object, allowed: tuple[object, ...]) -> None:
    """Refuse anything that is not one of the allowed values."""
    if not any(type(value) is type(a) and value == a for a in allowed):
        raise InvalidRecipe(where, shown(value), ", ".join(map(str, allowed)))


def as_float(filling: Filling, *names: str) -> None:
    """Store integers given for rates as floats, so that equal fillings have equal JSON."""
    for name in names:
        value = getattr(filling, name)
        if value is not None:
            object.__setattr__(filling, name, float(value))
