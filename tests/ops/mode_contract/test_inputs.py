"""Bad input to ``mode_contract``: each mistake is a named error, raised before anything runs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import petal_kernels as pk

BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    (
        "core-2d",
        {"core": torch.zeros(3, 3)},
        ValueError,
        "core: want shape [R] (CP) or [R, R, R] (Tucker), got [3, 3]",
    ),
    (
        "core-uneven",
        {"core": torch.zeros(3, 3, 4)},
        ValueError,
        "core: want shape [3, 3, 3], got [3, 3, 4]",
    ),
    ("core-empty", {"core": torch.zeros(0)}, ValueError, "core: want rank R >= 1, got [0]"),
    ("modes", {"modes": torch.zeros(2, 4)}, ValueError, "modes: want shape [K, 3], got [2, 4]"),
    ("up", {"up": torch.zeros(5, 4)}, ValueError, "up: want shape [O, 3], got [5, 4]"),
    (
        "dtype",
        {"up": torch.zeros(5, 3).half()},
        TypeError,
        "up: want dtype float32 like core, got float16",
    ),
    ("integer", {"modes": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "modes: want dtype"),
    (
        "device",
        {"modes": torch.zeros(2, 3, device="meta")},
        ValueError,
        "modes: want device cpu, got meta",
    ),
    ("out-dtype", {"dtype": torch.int8}, TypeError, "dtype: want a floating dtype, got torch.int8"),
    ("scale", {"scale": "1"}, TypeError, "scale: want a float, got str"),
]


@pytest.mark.parametrize(
    ("change", "kind", "message"), [c[1:] for c in BAD], ids=[c[0] for c in BAD]
)
def test_mode_contract(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    inputs: dict[str, Any] = {
        "core": torch.zeros(3, 3, 3),
        "modes": torch.zeros(2, 3),
        "up": torch.zeros(5, 3),
    }
    pk.mode_contract(**inputs)
    with pytest.raises(kind, match=re.escape(message)):
        pk.mode_contract(**(inputs | change))
