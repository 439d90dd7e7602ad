"""Correctness before speed: each provider against fp64, and the operators' own tests.

The rule is `parity`'s: the error against the fp64 reference is at most twice (outputs) or three
times (gradients) that of plain torch in the same dtype, plus a floor of a few rounding steps.
`Errors` says it as two ratios: error / (plain torch's + floor / factor).
"""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from petal_kernels._runtime.columns import rounded
from petal_kernels.tools import environment, parity
from petal_kernels.tools.parity import GRADIENT_FACTOR, OUTPUT_FACTOR

ANOTHER_FUNCTION = 30.0
Results = tuple[Sequence[Tensor], Sequence[Tensor | None]]


@dataclass(frozen=True)
class Errors:
    """Largest ratio among the outputs and among the gradients."""

    outputs: float
    gradients: float

    def __post_init__(self) -> None:
        # A NaN is above every limit, though Python's max() may pass it over.
        for name in ("outputs", "gradients"):
            if math.isnan(getattr(self, name)):
                object.__setattr__(self, name, math.inf)

    @property
    def worst(self) -> float:
        """The larger of the two."""
        return max(self.outputs, self.gradients)

    def __or__(self, other: Errors) -> Errors:
        """The worst of two checks."""
        outputs = max(self.outputs, other.outputs)
        return Errors(outputs, max(self.gradients, other.gradients))

    @property
    def red(self) -> bool:
        """Whether a limit is passed."""
        return self.outputs > OUTPUT_FACTOR or self.gradients > GRADIENT_FACTOR

    @property
    def wrong(self) -> bool:
        """Whether no order of summation explains it: another function is computed."""
        return self.worst > ANOTHER_FUNCTION

    def __str__(self) -> str:
        return f"{rounded(self.outputs, 2)} / {rounded(self.gradients, 2)}"


def _like(got: Tensor | None, exact: Tensor, plain: Tensor) -> Tensor:
    """A missing gradient as zeros; that of a package's factor, without our leading 1 or of fewer
    bits, in our shape and dtype."""
    if got is None:
        return torch.zeros_like(plain)
    if got.dtype.itemsize < plain.dtype.itemsize:
        got = got.to(plain.dtype)
    return got.detach().reshape(exact.shape if got.numel() == exact.numel() else got.shape)


def _none(got: Tensor | None) -> float:
    """The error where there is no gradient: zeros are none too."""
    return 0.0 if got is None or not bool(got.any()) else math.inf


def compare(got: Results, exact: Results, plain: Results) -> Errors:
    """Errors of `got`, each of the three being outputs and gradients; no gradient is zeros."""
    worst = []
    for part, limit in ((0, OUTPUT_FACTOR), (1, GRADIENT_FACTOR)):
        ratios = [0.0]
        for g, e, p in zip(got[part], exact[part], plain[part], strict=True):
            if e is None or p is None:
                ratios.append(_none(g))
                continue
            g = _like(g, e, p)
            ratios.append(limit * parity.compare("", g, e, p, limit)[0])
        worst.append(max(ratios))
    return Errors(*worst)


def pooled(got: Results, exact: Results, plain: Results) -> Errors:
    """The same for a whole model: one RMS over all outputs and one over all gradients, each tensor
    by its own scale.

    A model has hundreds of small ones, of which plain torch rounds some exactly by luck.
    """
    ratios = []
    for part, limit in ((0, OUTPUT_FACTOR), (1, GRADIENT_FACTOR)):
        mine, theirs, floors = [0.0], [0.0], [0.0]
        for g, e, p in zip(got[part], exact[part], plain[part], strict=True):
            if e is None or p is None:
                mine.append(_none(g))
                continue
            g = _like(g, e, p)
            mine.append(parity.error(g, e) if g.shape == e.shape else math.inf)
            theirs.append(parity.error(p, e))
            floors.append(torch.finfo(p.dtype).eps / 4 / limit)
        allowed = math.hypot(*theirs) + math.hypot(*floors)
        found = math.hypot(*mine)
        if math.isinf(allowed):  # plain torch is not finite, so the case shows nothing
            found = allowed
        ratios.append(found / allowed if allowed else found)
    return Errors(*ratios)


def tests(names: Sequence[str]) -> str | None:
    """Run the operators' tests: their last line, or None where there is no checkout to run them in.

    Raises SystemExit(2) when they are red.
    """
    if importlib.util.find_spec("pytest") is None:
        return None
    if not (environment.ROOT / "tests" / "ops" / "test_ops.py").exists():
        return None
    expression = f"({' or '.join(names)}) and (native or torch) and float32"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "tests/ops/test_ops.py", "-k", expression],
        cwd=environment.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout.strip()
    if done.returncode != 0:
        print(said[-3000:] + done.stderr[-1000:], file=sys.stderr)
        raise SystemExit(2)
    return said.splitlines()[-1] if said else "no output"
