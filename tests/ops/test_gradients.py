"""What a gradient may be: its own storage, whatever is asked for, on every backend."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import petal_kernels as pk
from petal_kernels.ops.gated_bottleneck import workload as gated
from tests.ops import discovery
from tests.ops.discovery import CASES, OPERATORS, options

ROOT = Path(pk.__file__).parent
# Cases that run in Triton's interpreter too.
INTERPRETED = (
    "qkv-outputs", "lora", "lora-own", "value", "value-odd", "adapter-norm", "tucker", "pooled",
    "llama-dropout", "layer",
)  # fmt: skip


def storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def small(case: Any) -> Any:
    """The case with fewer rows: what is asked here is no matter of size."""
    lead = getattr(case, "lead", None)
    return case if lead is None else replace(case, lead=tuple(min(n, 4) for n in lead))


def check_own_storage(label: str, outs: list[Tensor], douts: list[Tensor], leaves: Any) -> None:
    """No two results share a storage, none is the upstream gradient's or a leaf's; and gradients
    accumulate over two micro-batches to their sum."""
    before = [d.clone() for d in douts]
    grads = torch.autograd.grad(outs, list(leaves.values()), douts, retain_graph=True)
    want = {name: g.clone() for name, g in zip(leaves, grads, strict=True)}
    taken = {storage(d): "the upstream gradient" for d in douts if d.numel()}
    taken |= {storage(t): f"leaf {name}" for name, t in leaves.items() if t.numel()}
    for name, g in zip(leaves, grads, strict=True):
        if g.numel():
            assert storage(g) not in taken, f"{label}: d{name} is {taken[storage(g)]}'s storage"
            taken[storage(g)] = f"d{name}"
            g.fill_(float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(before, douts, strict=True)), label
    for _ in range(2):
        torch.autograd.backward(outs, douts, retain_graph=True, inputs=list(leaves.values()))
    for name, t in leaves.items():
        assert torch.equal(t.grad, want[name] + want[name]), f"{label}: accumulated d{name}"
        t.grad = None
    assert all(torch.equal(a, b) for a, b in zip(before, douts, strict=True)), label


def able(op: discovery.Operator, case: Any) -> list[str]:
    given = op.workload.make_inputs(case, torch.float32) | options(op, case)
    return [name for name, reasons in pk.explain(op.public, **given).rows if not reasons]


def call(
    op: discovery.Operator, case: Any, names: tuple[str, ...], backend: str, dtype: Any
) -> Any:
    inputs = discovery.require_grad(op.workload.make_inputs(case, dtype), names)
    out = op.public(**inputs, **options(op, case), backend=backend)
    outs = [out] if isinstance(out, Tensor) else list(out)
    douts = [d.to(o) for d, o in zip(discovery.output_gradients(outs), outs, strict=True)]
    return outs, douts, dict(discovery.leaves(inputs, names))


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_gradient_shares_no_storage(name: str, case: Any) -> None:
    """Autograd may take a gradient for good and add into it: two that share a storage, or one that
    is the upstream's, then change under somebody else. Asked for together, and each alone."""
    op, case = OPERATORS[name], small(case)
    present = op.workload.make_inputs(case, torch.float32)
    names = tuple(n for n in discovery.trainable(op, case) if discovery.leaves(present, (n,)))
    for backend in able(op, case):
        if backend == "triton":
            chosen = [(names, torch.float16)] if case.name in INTERPRETED else []
        else:
            chosen = [(names, torch.float16), *(((n,), torch.float32) for n in names)]
        for which, dtype in chosen if names else ():
            check_own_storage(f"{backend} {which}", *call(op, case, which, backend, dtype))


def test_every_operator_runs_in_the_interpreter() -> None:
    """By a case of `INTERPRETED`."""
    for op in OPERATORS.values():
        assert any(case.name in INTERPRETED for case in op.workload.CASES), op.name


PLAIN = [
    gated.Case("plain", (2, 3), 8, 4, gate=gate, base=base, bottleneck=given, residual=residual,
               norm=norm, activation="identity")
    for gate in ("none", "large", "middleX", "middleY")
    for base in ("input", "given", "none")
    for given in (False, True)
    for residual in ("none", "given", "gate_input")
    for norm in (False, True)
]  # fmt: skip


def test_where_nothing_stands_between_an_input_and_the_output() -> None:
    """Without scale, dropout or activation the sums that reach several inputs are one tensor."""
    op = OPERATORS["gated_bottleneck"]
    for case in PLAIN:
        present = op.workload.make_inputs(case, torch.float32)
        names = [n for n in op.workload.DIFFERENTIABLE if discovery.leaves(present, (n,))]
        rows = [n for n in names if n in op.workload.ACTIVATIONS]
        for backend in able(op, case):
            for which in (names, rows) if backend != "triton" else ():
                label = f"{backend} {case} {which}"
                check_own_storage(label, *call(op, case, tuple(which), backend, torch.float32))


@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
def test_the_gradient_of_an_updated_base_is_its_own(backend: str) -> None:
    start, middle = torch.randn(6, 12, requires_grad=True), torch.randn(6, 3)
    up = torch.randn(4, 3, requires_grad=True)
    base = start * 2.0
    seen: list[Tensor] = []
    base.register_hook(seen.append)
    out = pk.gated_bottleneck(
        None, None, up, base=base, bottleneck=middle, activation="identity", update_at=4,
        backend=backend,
    )  # fmt: skip
    dout = torch.randn_like(out)
    torch.autograd.grad(out, (start, up), dout)
    assert torch.equal(seen[0], dout)
    assert storage(seen[0]) != storage(dout)


@pytest.mark.parametrize("operator", ["gated_bottleneck", "lowrank_linear"])
@pytest.mark.parametrize("trained", ["input", "bias", "summand", "output"])
def test_only_a_product_takes_the_upstream_gradient_itself(operator: str, trained: str) -> None:
    """It forms another gradient and hands this one to nobody, so a copy would be traffic for
    nothing. A trained summand would get the very tensor."""
    summand = torch.randn(*((5, 12) if trained == "summand" else (12,)))
    x, weight = torch.randn(5, 3, requires_grad=True), torch.randn(3, 12)
    summand.requires_grad_(trained in ("bias", "summand"))
    base = torch.addmm(summand, x, weight)
    base = base * 1.0 if trained == "output" else torch.ops.aten._unsafe_view(base, (5, 12))
    arrived: list[Tensor] = []
    base.register_hook(arrived.append)
    up, middle = torch.randn(12, 2, requires_grad=True), torch.randn(5, 2)
    if operator == "lowrank_linear":
        (out,) = pk.lowrank_linear(None, None, [up], hidden=middle, base=[base])
    else:
        out = pk.gated_bottleneck(
            None, None, up, base=base, bottleneck=middle, activation="identity", update_at=0
        )
    dout = torch.randn(5, 12)
    leaves = (x, summand) if summand.requires_grad else (x,)
    grads = torch.autograd.grad(out, leaves, dout)
    assert torch.equal(arrived[0], dout)
    assert (storage(arrived[0]) == storage(dout)) == (trained == "input")
    torch.testing.assert_close(grads[0], dout @ weight.t())
    assert all(storage(g) != storage(dout) for g in grads)


@pytest.mark.parametrize("bias", [True, False])
def test_an_update_in_place_copies_no_gradient(bias: bool) -> None:
    """A linear's output of three dims is a view where the linear has a bias, and autograd's way
    back from a write into a view copies the gradient of all columns thrice."""

    class Copies(TorchDispatchMode):
        found: ClassVar[list[str]] = []

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            copies = ("aten.clone", "aten.copy_", "aten._to_copy")
            if str(func).startswith(copies) and out.numel() >= rows * 48:
                self.found.append(str(func))
            return out

    rows, base = 10, nn.Linear(16, 48, bias=bias).requires_grad_(False)
    layer = pk.nn.RoutedLoRALinear(base, 2, parts=3, targets=(0, 2))
    out = layer(torch.randn(2, 5, 16, requires_grad=True))
    dout = torch.randn_like(out)
    with Copies() as watch:
        out.backward(dout)
    assert watch.found == []


def test_every_function_is_of_the_one_kind() -> None:
    """Whatever walks past the base class has neither its refusals nor these tests."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(base).endswith("autograd.Function") for base in node.bases)
    ]
    assert {place.split(":")[0] for place in found} == {"_runtime/first_order.py"}, found
