"""Every argument that is no tensor reaches the output and each gradient, on every backend."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

import petal_kernels as pk
from petal_kernels._runtime.numerics import ACTIVATIONS
from petal_kernels.ops.frozen_norm import arguments as norms
from petal_kernels.ops.gated_bottleneck import arguments as gated
from petal_kernels.ops.lowrank_linear import arguments as lowrank
from petal_kernels.tools import parity
from tests.ops import discovery
from tests.ops.discovery import OPERATORS

# Values that no default, sign or symmetry hides.
ODD = {"scale": -1.75, "dropout": 0.3, "norm_eps": 0.625, "keep": -0.375, "mix": 1.625,
       "eps": 0.625}  # fmt: skip
CHOICES = {
    "activation": ACTIVATIONS,
    "route": gated.ROUTES,
    "gate": {
        op.name: arguments.GATES
        for op in OPERATORS.values()
        if (arguments := op.module("arguments")) and hasattr(arguments, "GATES")
    },
    "variant": gated.VARIANTS,
    "kind": norms.KINDS,
    "dropout_at": lowrank.DROPOUT_SITES,
    "router_input": ("token", "pooled"),
    "renormalize": (True, False),
}
# How it runs, not what; and what its own tests cover.
ELSEWHERE = {
    "backend",
    "plan",
    "rng",
    "training",
    "return_routing",
    "update_at",
    "dtype",
    "recompute",
}
INTERPRETED = (
    "cp-matrices", "tucker-matrices", "cp", "tucker", "qkv-odd", "lora", "lora-own-odd",
    "middleX-odd", "large-odd", "mean-odd", "indices", "shared-down-topk",
    "llama-dropout", "layer-odd",
)  # fmt: skip


def scalars(op: discovery.Operator) -> dict[str, str]:
    """Names and annotations of the keywords that hold no tensor."""
    parameters = inspect.signature(op.public).parameters.values()
    return {
        p.name: str(p.annotation)
        for p in parameters
        if "Tensor" not in str(p.annotation) and p.name not in ELSEWHERE
    }


def oddly(op: discovery.Operator, case: Any) -> dict[str, Any]:
    """The case's arguments with every number at its odd value."""
    lead = getattr(case, "lead", None)
    case = case if lead is None else replace(case, lead=tuple(min(n, 9) for n in lead))
    inputs = op.workload.make_inputs(case, torch.float32)
    names = set(ODD) & set(scalars(op))
    if inputs.get("norm_weight") is None:
        names.discard("norm_eps")
    if "dropout" in names:
        inputs["rng"] = torch.tensor([4711, 3])
    return inputs | {name: ODD[name] for name in names}


@pytest.mark.parametrize("name", list(OPERATORS))
def test_every_scalar_is_known_here(name: str) -> None:
    """A new argument needs an odd value or its choices; each choice is in a case."""
    op = OPERATORS[name]
    given = [op.workload.make_inputs(case, torch.float32) for case in op.workload.CASES]
    defaults = {n: p.default for n, p in inspect.signature(op.public).parameters.items()}
    for scalar, annotation in scalars(op).items():
        if annotation.split(" | ")[0] == "float":  # or one for each output
            assert scalar in ODD, scalar
            continue
        seen = {each.get(scalar, defaults[scalar]) for each in given}
        if annotation.startswith("int"):
            assert len(seen) > 2, scalar
            continue
        choices = CHOICES[scalar]
        wanted = choices[name] if isinstance(choices, dict) else choices
        assert seen == set(wanted), scalar


RUNS = [
    pytest.param(op.name, case, backend, id=f"{op.name}-{backend}-{case.name}")
    for op in OPERATORS.values()
    for case in op.workload.CASES
    for backend in ("torch", "native", "triton")
    if backend != "triton" or case.name in INTERPRETED
]


def test_every_operator_runs_in_the_interpreter() -> None:
    """By a case of `INTERPRETED`."""
    assert {run.values[0] for run in RUNS if run.values[2] == "triton"} == set(OPERATORS)


@pytest.mark.parametrize(("name", "case", "backend"), RUNS)
def test_every_number_reaches_the_output_and_each_gradient(
    name: str, case: Any, backend: str
) -> None:
    """All numbers at once at odd values: outputs and gradients are the fp64 reference's."""
    op = OPERATORS[name]
    names, inputs = discovery.trainable(op, case), oddly(op, case)
    reasons = dict(pk.explain(op.public, **inputs).rows)[backend]
    if reasons:
        pytest.skip("; ".join(reasons))
    exact_in = discovery.map_tensors(inputs, lambda _, t: t.double())
    douts = [d.float() for d in discovery.output_gradients(op.reference.forward(**inputs))]
    exact = flat(discovery.run(op.reference.forward, exact_in, names, douts))
    plain = flat(discovery.run(op.reference.forward, inputs, names, douts))
    got = flat(discovery.run(op.public, inputs, names, douts, backend=backend))
    for label, value in got.items():
        # What is lost is of the order of one; how near a backend must be is test_ops.py's.
        allowed = 1e-4 + 10 * parity.error(plain[label], exact[label])
        assert parity.error(value, exact[label]) <= allowed, label


def flat(results: Any) -> dict[str, torch.Tensor]:
    outs, grads = results
    return {f"output {i}": o for i, o in enumerate(outs)} | dict(grads)


@pytest.mark.parametrize("name", list(OPERATORS))
def test_every_number_matters_in_some_gradient(name: str) -> None:
    """What the test above compares would be another, were a number at its default."""
    op = OPERATORS[name]
    missing = set(ODD) & set(scalars(op))
    for case in op.workload.CASES:
        inputs, names = oddly(op, case), discovery.trainable(op, case)
        odd = flat(discovery.run(op.reference.forward, inputs, names))
        for scalar in sorted(missing & set(inputs)):
            other = inputs | {scalar: 0.0 if scalar == "dropout" else ODD[scalar] / 2}
            plain = flat(discovery.run(op.reference.forward, other, names))
            changed = {k for k in odd if not torch.allclose(odd[k], plain[k])}
            if "output 0" in changed and len(changed) > 1:
                missing.discard(scalar)
    assert not missing


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("backend", ["auto", "torch", "native", "triton"])
@pytest.mark.parametrize("core", ["cp", "tucker"])
def test_mode_contract_in_every_dtype(core: str, backend: str) -> None:
    """Factors of any dtype, a result of any other: right, forward and backward, or refused before
    anything runs."""
    g = torch.Generator().manual_seed(3)
    draws = [torch.randn(s, generator=g, dtype=torch.float64) for s in ((4,) * 3, (3, 4), (5, 4))]
    draws[0] = draws[0] if core == "tucker" else draws[0][0, 0]
    for kept, result, fold in itertools.product(DTYPES, DTYPES, (True, False)):
        factors = [t.to(kept).requires_grad_() for t in draws[: 3 if fold else 2]]
        exact = [t.detach().double().requires_grad_() for t in factors]
        reasons = dict(pk.explain(pk.mode_contract, *factors, dtype=result).rows)
        if reasons.get(backend):
            assert backend in ("native", "triton")
            with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot run here"):
                pk.mode_contract(*factors, dtype=result, backend=backend)
            continue
        out = pk.mode_contract(*factors, scale=0.75, dtype=result, backend=backend)
        assert out.dtype == result
        want = pk.mode_contract(*exact, scale=0.75, backend="torch")
        dout = torch.randn(out.shape, generator=g, dtype=torch.float64).to(result)
        got = [out, *torch.autograd.grad(out, factors, dout)]
        wanted = [want, *torch.autograd.grad(want, exact, dout.double())]
        for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
            assert a.dtype == (result if i == 0 else kept)
            coarse = max(torch.finfo(result).eps if i == 0 else 0.0, torch.finfo(kept).eps)
            # Where neither is float64, sums are in fp32.
            coarse = coarse if kept == torch.float64 else max(coarse, 1.2e-7)
            near = 8 * coarse * max(1.0, float(b.abs().max()))
            assert float((a.double() - b).abs().max()) <= near, (kept, result, fold, i)
