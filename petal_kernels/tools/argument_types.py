"""Types of command-line arguments: what is wrong with a word is said when it is read."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence

import torch


def positive(text: str) -> int:
    """A whole number of at least one."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"want a number >= 1, got {text}")
    return int(text)


def positives(text: str) -> tuple[int, ...]:
    """Several, with commas between."""
    return tuple(map(positive, text.split(",")))


def _finite(text: str) -> float:
    """A number, or -1 for what is none."""
    try:
        value = float(text)
    except ValueError:
        return -1.0
    return value if math.isfinite(value) else -1.0


def minutes(text: str) -> float:
    """A time, none included."""
    if _finite(text) < 0.0:
        raise ArgumentTypeError(f"want minutes >= 0, got {text}")
    return _finite(text)


def factor(text: str) -> float:
    """How many times: a number above zero."""
    if _finite(text) <= 0.0:
        raise ArgumentTypeError(f"want a number > 0, got {text}")
    return _finite(text)


def seed(text: str) -> int:
    """A whole number that torch's generators take, and its sum with a few others."""
    if not text.isdecimal() or int(text) >= 1 << 31:
        raise ArgumentTypeError(f"want a whole number from 0 to 2^31 - 1, got {text}")
    return int(text)


def device(text: str) -> str:
    """`cpu`, or a CUDA device that is here."""
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise ArgumentTypeError(f"want cpu or cuda[:N], got {text}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ArgumentTypeError(f"no CUDA device {index or 0} here")
    return text


def listed(choices: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Names with commas between."""

    def parse(text: str) -> tuple[str, ...]:
        found = tuple(word for word in text.split(",") if word)
        unknown = [word for word in found if word not in choices]
        if unknown or not found:
            raise ArgumentTypeError(f"want some of {', '.join(choices)}, got {text!r}")
        return found

    return parse
