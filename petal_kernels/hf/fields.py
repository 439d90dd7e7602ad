"""What a config's fields may be: each check names the field, what is wanted and what came."""

from __future__ import annotations

import re
import sys
from typing import Any


def want(ok: bool, name: str, want: str, got: object) -> None:
    """ValueError about the field `name` unless `ok`."""
    if not ok:
        raise ValueError(f"{name}: want {want}, got {got!r}")


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    """ValueError unless `value` is one of `choices`."""
    # A string first: an array would compare element by element.
    want(isinstance(value, str) and value in choices, name, f"one of {choices}", value)


def is_number(value: object) -> bool:
    """An int or a float, no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_size(value: object, least: int) -> bool:
    """An int of at least `least`, no bool."""
    return type(value) is int and value >= least


def is_finite(value: object) -> bool:
    """A number that a float can be."""
    largest = sys.float_info.max  # an int may be beyond it
    return is_number(value) and -largest <= value <= largest  # type: ignore[operator]


def names(name: str, value: object) -> list[str] | None:
    """None, or the module names that `value` lists, sets in order."""
    if value is None:
        return None
    ok = isinstance(value, (list, tuple, set, frozenset)) and len(value) > 0
    ok = ok and all(isinstance(item, str) for item in value)  # type: ignore[attr-defined]
    want(ok, name, "None or a non-empty list of module names", value)
    found = [str(item) for item in value]  # type: ignore[attr-defined]
    return sorted(found) if isinstance(value, (set, frozenset)) else found


def check_pattern(name: str, value: str) -> None:
    """ValueError unless `value` is a regular expression."""
    try:
        re.compile(value)
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{name}: want a regular expression or a list of names, got {value!r} ({error})"
        ) from error


def plain(value: Any) -> Any:
    """A number of numpy's as Python's own, since json knows no other; all else as it is."""
    numpy = sys.modules.get("numpy")  # where nobody imported it there is none
    if numpy is not None and isinstance(value, numpy.generic):
        return value.item()
    return value
