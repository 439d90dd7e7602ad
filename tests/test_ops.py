"""Every operator x backend x case x dtype: outputs and all gradients against the fp64 reference.

The rule: the error against fp64 is at most twice (outputs) or three times (gradients) that of the
reference run by plain torch in the same dtype, plus a floor of a few rounding steps of the dtype.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import discovery

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERATORS = {op.name: op for op in discovery.operators()}
GRID = [
    pytest.param(
        op.name, case, backend, dtype, id=f"{op.name}-{backend}-{case.name}-{str(dtype)[6:]}"
    )
    for op in OPERATORS.values()
    for case in op.workload.CASES
    for backend in discovery.backend_names(op)
    for dtype in DTYPES
]


@pytest.fixture(autouse=True)
def poison() -> Any:
    """torch.empty returns NaN, so an output element that a kernel does not write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def error(got: Tensor, want: Tensor) -> float:
    """Relative RMS error; infinite where a NaN or an infinity has appeared."""
    got = got.double().cpu()
    want = want.double().cpu()
    if want.numel() == 0:
        return 0.0
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    scale = float(want.square().mean().sqrt()) or 1.0
    return float((got - want).square().mean().sqrt()) / scale


def worst(got: Tensor, want: Tensor) -> float:
    """Largest absolute error over the largest wanted magnitude: catches a single wrong element."""
    got, want = got.double().cpu(), want.double().cpu()
    if want.numel() == 0:
        return 0.0
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got - want).abs().max()) / (float(want.abs().max()) or 1.0)


def unavailable(
    op: discovery.Operator, case: Any, backend: str, inputs: dict[str, Any]
) -> str | None:
    """The backend's own reason for not running this case, read from ``explain``."""
    plain = dict(inputs)
    options = getattr(op.workload, "options", lambda _: {})(case)
    import petal_kernels as pk

    try:
        explained = pk.explain(op.public, **plain, **options)
    except RuntimeError as e:
        return str(e)
    reasons = dict(explained.rows)[backend]
    return "; ".join(reasons) or None


def check(label: str, got: Tensor, exact: Tensor, plain: Tensor, factor: float) -> None:
    eps = torch.finfo(plain.dtype).eps
    assert got.shape == exact.shape, f"{label}: shape {list(got.shape)}, want {list(exact.shape)}"
    assert got.dtype == plain.dtype, f"{label}: dtype {got.dtype}, want {plain.dtype}"
    mine, theirs = error(got, exact), error(plain, exact)
    # A handful of elements is no sample: plain torch may round them all correctly by luck.
    floor = eps / 4 if exact.numel() >= 16 else 2 * eps
    assert mine <= factor * theirs + floor, (
        f"{label}: rms error {mine:.3e}, plain torch {theirs:.3e}"
    )
    mine, theirs = worst(got, exact), worst(plain, exact)
    assert mine <= factor * theirs + 2 * eps, (
        f"{label}: max error {mine:.3e}, plain torch {theirs:.3e}"
    )


@pytest.mark.parametrize(("name", "case", "backend", "dtype"), GRID)
def test_against_fp64(name: str, case: Any, backend: str, dtype: torch.dtype) -> None:
    op = OPERATORS[name]
    inputs = op.workload.make_inputs(case, dtype, DEVICE)
    reason = unavailable(op, case, backend, inputs)
    if reason is not None:
        pytest.skip(reason)
    names = discovery.trainable(op, case)
    options = getattr(op.workload, "options", lambda _: {})(case)
    exact_in = discovery.map_tensors(inputs, lambda _, t: t.double())
    exact_out, exact_grads = discovery.run(op.reference.forward, exact_in, names)
    douts = [d.to(dtype) for d in discovery.output_gradients(exact_out)]
    exact_out, exact_grads = discovery.run(op.reference.forward, exact_in, names, douts)
    plain_out, plain_grads = discovery.run(op.reference.forward, inputs, names, douts)
    got_out, got_grads = discovery.run(op.public, inputs, names, douts, backend=backend, **options)
    for i, (g, e, p) in enumerate(zip(got_out, exact_out, plain_out, strict=True)):
        check(f"output {i}", g, e, p, 2.0)
    assert [n for n, _ in got_grads] == [n for n, _ in exact_grads]
    for (label, g), (_, e), (_, p) in zip(got_grads, exact_grads, plain_grads, strict=True):
        check(f"gradient of {label}", g, e, p, 3.0)
    again_out, again_grads = discovery.run(
        op.public, inputs, names, douts, backend=backend, **options
    )
    for a, b in zip(
        got_out + [g for _, g in got_grads], again_out + [g for _, g in again_grads], strict=True
    ):
        assert torch.equal(a, b), "the same call twice gave other bits"


CASES = [
    pytest.param(op.name, case, id=f"{op.name}-{case.name}")
    for op in OPERATORS.values()
    for case in op.workload.CASES
]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_reference_backward(name: str, case: Any) -> None:
    """The reference's written-out gradients are autograd's, in fp64."""
    op = OPERATORS[name]
    inputs = op.workload.make_inputs(case, torch.float64)
    names = discovery.trainable(op, case)
    outs, grads = discovery.run(op.reference.forward, inputs, names)
    if not outs or outs[0].numel() == 0:
        pytest.skip("nothing to compare")
    douts = [d.to(o) for d, o in zip(discovery.output_gradients(outs), outs, strict=True)]
    explicit = op.reference.backward(
        douts if len(douts) > 1 or name == "lowrank_linear" else douts[0], **inputs
    )
    found = discovery.leaves(explicit, names)
    assert [n for n, _ in found] == [n for n, _ in grads]
    for (label, want), (_, got) in zip(grads, found, strict=True):
        torch.testing.assert_close(got, want, msg=lambda m, label=label: f"{label}: {m}")


@pytest.mark.parametrize(("name", "case"), CASES)
def test_inference_equals_training_forward(name: str, case: Any) -> None:
    """Without gradients (and with it another plan, perhaps) the outputs are the same function."""
    op = OPERATORS[name]
    inputs = op.workload.make_inputs(case, torch.float32, DEVICE)
    with torch.no_grad():
        quiet = op.public(**inputs)
        exact = op.reference.forward(**discovery.map_tensors(inputs, lambda _, t: t.double()))
        plain = op.reference.forward(**inputs)
    quiet = [quiet] if isinstance(quiet, Tensor) else quiet
    for i, (g, e, p) in enumerate(zip(quiet, exact, plain, strict=True)):
        check(f"output {i}", g, e, p, 3.0)
