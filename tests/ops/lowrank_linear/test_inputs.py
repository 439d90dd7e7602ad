"""Bad input to ``lowrank_linear``: each mistake is a named error, raised before anything runs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import petal_kernels as pk


def good() -> dict[str, Any]:
    return {
        "x": torch.zeros(5, 8),
        "down": torch.zeros(3, 8),
        "ups": [torch.zeros(4, 3), torch.zeros(6, 3)],
        "weights": [torch.zeros(4, 8), torch.zeros(6, 8)],
        "biases": [torch.zeros(4), None],
    }


BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("x-type", {"x": [1.0]}, TypeError, "x: want a Tensor, got list"),
    (
        "x-integer",
        {"x": torch.zeros(5, 8, dtype=torch.int64)},
        TypeError,
        "x: want dtype float32, float16",
    ),
    ("x-complex", {"x": torch.zeros(5, 8, dtype=torch.complex64)}, TypeError, "got complex64"),
    ("x-scalar", {"x": torch.zeros(())}, ValueError, "x: want shape [..., D], got []"),
    (
        "x-none",
        {"x": None},
        TypeError,
        "x: want a Tensor (or hidden instead of x and down), got None",
    ),
    ("down-width", {"down": torch.zeros(3, 7)}, ValueError, "down: want shape [R, 8], got [3, 7]"),
    (
        "down-rank-0",
        {"down": torch.zeros(0, 8)},
        ValueError,
        "down: want R >= 1 and D >= 1, got [0, 8]",
    ),
    (
        "ups-empty",
        {"ups": [], "weights": None, "biases": None},
        ValueError,
        "ups: want at least one tensor",
    ),
    (
        "ups-type",
        {"ups": torch.zeros(4, 3)},
        TypeError,
        "ups: want a sequence of tensors, got a 2-D Tensor",
    ),
    (
        "ups-rank",
        {"ups": [torch.zeros(4, 3), torch.zeros(6, 2)]},
        ValueError,
        "ups[1]: want shape [O, 3], got [6, 2]",
    ),
    (
        "ups-width-0",
        {"ups": [torch.zeros(4, 3), torch.zeros(0, 3)]},
        ValueError,
        "ups[1]: want O >= 1, got [0, 3]",
    ),
    ("weights-count", {"weights": [torch.zeros(4, 8)]}, ValueError, "weights: want 2 entries"),
    (
        "weights-shape",
        {"weights": [torch.zeros(4, 8), torch.zeros(5, 8)]},
        ValueError,
        "weights[1]: want shape [6, 8]",
    ),
    (
        "weights-trained",
        {"weights": [torch.zeros(4, 8, requires_grad=True), torch.zeros(6, 8)]},
        ValueError,
        "weights[0]: want a frozen weight, got one that requires grad",
    ),
    (
        "bias-shape",
        {"biases": [torch.zeros(5), None]},
        ValueError,
        "biases[0]: want shape [4], got [5]",
    ),
    ("bias-alone", {"weights": None}, ValueError, "biases: want None unless weights are given"),
    (
        "base-and-weights",
        {"base": [torch.zeros(5, 4), torch.zeros(5, 6)]},
        ValueError,
        "base: want either weights or base",
    ),
    (
        "base-rows",
        {"weights": None, "biases": None, "base": [torch.zeros(4, 4), torch.zeros(5, 6)]},
        ValueError,
        "base[0]: want shape [5, 4], got [4, 4]",
    ),
    (
        "mixed-dtype",
        {"weights": [torch.zeros(4, 8).half(), torch.zeros(6, 8)]},
        TypeError,
        "weights[0]: want dtype float32",
    ),
    (
        "up-dtype",
        {"ups": [torch.zeros(4, 3).half(), torch.zeros(6, 3)]},
        TypeError,
        "ups[0]: want dtype float32",
    ),
    (
        "device",
        {"down": torch.zeros(3, 8, device="meta")},
        ValueError,
        "down: want device cpu, got meta",
    ),
    ("dropout-range", {"dropout": 1.0}, ValueError, "dropout: want 0 <= dropout < 1, got 1.0"),
    ("dropout-type", {"dropout": "0.1"}, TypeError, "dropout: want a float, got str"),
    (
        "dropout-at",
        {"dropout_at": "output"},
        ValueError,
        "dropout_at: want one of bottleneck, input, mode, got 'output'",
    ),
    (
        "core-missing",
        {"dropout_at": "mode"},
        ValueError,
        "core: want [K, R, R] with dropout_at='mode', got None",
    ),
    (
        "core-unwanted",
        {"core": torch.zeros(2, 3, 3)},
        ValueError,
        "core: want None with dropout_at='bottleneck'",
    ),
    ("scale-tensor", {"scale": torch.ones(())}, TypeError, "scale: want a float, got Tensor"),
    ("rng-dtype", {"rng": torch.zeros(2)}, TypeError, "rng: want dtype int64, got float32"),
    (
        "rng-shape",
        {"rng": torch.zeros(3, dtype=torch.int64)},
        ValueError,
        "rng: want shape [2], got [3]",
    ),
    (
        "plan",
        {"plan": "fast"},
        ValueError,
        "plan: want one of auto, update, extend, augment, merge, got 'fast'",
    ),
    (
        "merge-dropout",
        {"plan": "merge", "dropout": 0.1},
        ValueError,
        "plan: 'merge' does not apply: dropout is on",
    ),
    (
        "hidden-and-down",
        {"hidden": torch.zeros(5, 3)},
        ValueError,
        "down: want None when hidden is given",
    ),
    (
        "hidden-input-dropout",
        {"hidden": torch.zeros(5, 3), "down": None, "dropout_at": "input"},
        ValueError,
        "dropout_at: want 'bottleneck' or 'mode' when hidden is given",
    ),
]


@pytest.mark.parametrize(
    ("change", "kind", "message"), [c[1:] for c in BAD], ids=[c[0] for c in BAD]
)
def test_lowrank_linear(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    pk.lowrank_linear(**good())
    with pytest.raises(kind, match=re.escape(message)):
        pk.lowrank_linear(**(good() | change))
