"""The rule by which a backend is correct, and its check of one case.

A result's error against the fp64 reference is at most twice (outputs) or three times (gradients)
that of the reference run by plain torch in the same dtype, plus a floor of a few rounding steps;
the same call twice gives the same bits; memory that was never written reads NaN.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import petal_kernels as pk
from petal_kernels.tools import operators
from petal_kernels.tools.operators import Operator

OUTPUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


def error(got: Tensor, want: Tensor) -> float:
    """Relative RMS error; infinite where a NaN or an infinity has appeared."""
    got, want = got.double().to(want.device), want.double()
    if want.numel() == 0:
        return 0.0
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    scale = float(want.square().mean().sqrt()) or 1.0
    return float((got - want).square().mean().sqrt()) / scale


def worst(got: Tensor, want: Tensor) -> float:
    """Largest absolute error over the largest wanted magnitude: catches a single wrong element."""
    got, want = got.double().to(want.device), want.double()
    if want.numel() == 0:
        return 0.0
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got - want).abs().max()) / (float(want.abs().max()) or 1.0)


def numbers(exact: Tensor) -> int:
    """How many numbers decide a result's error: all, but of the product of a column and a row (a
    gradient of one token) those of the shorter, and those of the same size once."""
    if exact.dim() != 2 or not 1 < min(exact.shape) <= 64 or not bool(torch.isfinite(exact).all()):
        return exact.numel()
    rows = exact.double() if exact.shape[0] <= exact.shape[1] else exact.double().t()
    gram = rows @ rows.t()
    total = float(gram.trace())
    if total == 0.0 or float(gram.square().sum()) < total**2 * (1 - 1e-9):
        return exact.numel()
    sizes = (gram.diagonal() / total).sqrt()
    return int((sizes[sizes > 1e-7] * 1e6).round().unique().numel())


def compare(
    label: str, got: Tensor, exact: Tensor, plain: Tensor, factor: float
) -> tuple[float, str | None]:
    """The largest error as a share of what the rule allows, and what is wrong where that is above
    1 (or shape or dtype differ)."""
    if got.shape != exact.shape:
        return float("inf"), f"{label}: shape {list(got.shape)}, want {list(exact.shape)}"
    if got.dtype != plain.dtype:
        return float("inf"), f"{label}: dtype {got.dtype}, want {plain.dtype}"
    eps, found = torch.finfo(plain.dtype).eps, numbers(exact)
    # A handful of numbers is no sample: plain torch may round them all correctly by luck.
    # Of a single one, a sum, the order of the additions alone decides.
    floor = eps / 4 if found >= 16 else 2 * eps if found > 1 else 8 * eps
    ratio, fault = 0.0, None
    for name, measure, least in (("rms", error, floor), ("max", worst, max(floor, 2 * eps))):
        mine, theirs = measure(got, exact), measure(plain, exact)
        allowed = factor * theirs + least
        if allowed == float("inf"):
            return allowed, f"{label}: plain torch is not finite, so the case shows nothing"
        if mine > allowed and fault is None:
            fault = f"{label}: {name} error {mine:.3e}, plain torch {theirs:.3e}"
        ratio = max(ratio, mine / allowed)
    return ratio, fault


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """``torch.empty`` returns NaN, so an output element that a kernel does not write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def refusal(
    op: Operator, case: Any, backend: str, inputs: dict[str, Any] | None = None
) -> str | None:
    """The backend's own reason for not running this case, read from ``explain``."""
    given = operators.options(op, case)
    try:
        explained = pk.explain(op.public, **(inputs or {}), **given)
    except RuntimeError as e:
        return str(e)
    except ValueError as e:
        if str(e).startswith("plan:"):  # asked for by name where it has no meaning
            return str(e)
        raise
    return "; ".join(dict(explained.rows)[backend]) or None


@dataclass
class Verdict:
    """What the check of one case found: the largest share of the allowed error, what is wrong, or
    why the backend declines."""

    ratio: float = 0.0
    faults: list[str] = field(default_factory=list)
    refused: str | None = None


def verify(
    op: Operator, case: Any, backend: str, dtype: torch.dtype, device: str = "cpu"
) -> Verdict:
    """Outputs and every gradient of one case on one backend, by the rule."""
    inputs = op.workload.make_inputs(case, dtype, device)
    reason = refusal(op, case, backend, inputs)
    if reason is not None:
        return Verdict(refused=reason)
    names = operators.trainable(op, case)
    given = {"backend": backend} | operators.options(op, case)
    exact_in = operators.map_tensors(inputs, lambda _, t: t.double())
    with torch.no_grad():
        shapes = op.reference.forward(**inputs)
    outs = [shapes] if isinstance(shapes, Tensor) else list(shapes)
    douts = [d.to(dtype) for d in operators.output_gradients(outs)]
    exact = _flat(operators.run(op.reference.forward, exact_in, names, douts))
    plain = _flat(operators.run(op.reference.forward, inputs, names, douts))
    with poisoned():
        got = _flat(operators.run(op.public, inputs, names, douts, **given))
        again = _flat(operators.run(op.public, inputs, names, douts, **given))
    found = Verdict()
    if [label for label, _ in got] != [label for label, _ in exact]:
        found.faults.append(f"results are {[n for n, _ in got]}, want {[n for n, _ in exact]}")
        return found
    for (label, g), (_, e), (_, p) in zip(got, exact, plain, strict=True):
        factor = OUTPUT_FACTOR if label.startswith("output") else GRADIENT_FACTOR
        ratio, fault = compare(label, g, e, p, factor)
        found.ratio = max(found.ratio, ratio)
        found.faults += [fault] if fault else []
    for (label, a), (_, b) in zip(got, again, strict=True):
        if not torch.equal(a, b) and not any(label in fault for fault in found.faults):
            found.faults.append(f"{label}: the same call twice gave other bits")
    return found


def _flat(results: tuple[Sequence[Tensor], Sequence[tuple[str, Tensor]]]) -> list[Any]:
    outs, grads = results
    return [(f"output {i}", t) for i, t in enumerate(outs)] + [
        (f"gradient of {label}", t) for label, t in grads
    ]
