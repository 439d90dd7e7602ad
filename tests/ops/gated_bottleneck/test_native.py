"""The C++ CPU kernels of ``gated_bottleneck`` beyond one block of rows: several ragged blocks per
split, several splits, samples longer than a block, every instruction set, any number of threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import petal_kernels as pk
from petal_kernels._runtime import device
from petal_kernels.ops.gated_bottleneck.workload import Case
from tests.ops import discovery
from tests.ops.gated_bottleneck import traffic

OPERATOR = discovery.OPERATORS["gated_bottleneck"]
BART: dict[str, Any] = {"dropout": 0.1, "residual": "gate_input", "norm": True}
CASES = (
    Case("large", (1505,), 70, 20, gate="large", gate_rank=13, scale=0.5, **BART),
    Case("large-gram", (5, 301), 70, 20, gate="large", route="gram", vision=3, **BART),
    Case("middleX-release", (1505,), 70, 20, gate="middleX", variant="release", **BART),
    Case("middleY", (1505,), 70, 20, base="given", out=45, gate="middleY", dropout=0.3, norm=True),
    Case("small", (5, 301), 70, 20, gate="small", mask=True, **BART),
    Case("small-release", (5, 301), 70, 20, gate="small", variant="release", route="mul", **BART),
    Case("expand", (5, 301), 70, 20, route="expand", activation="silu"),
    Case("gram-square", (5, 301), 70, 8, route="gram_relu", vision=37, activation="relu"),
    Case("value", (1505,), 70, 20, base="input", bottleneck=True, gate="middleX", residual="given"),
)

pytestmark = pytest.mark.skipif(device.cpu_library_reason() is not None, reason="no CPU library")


def _run(case: Case, exact: bool = False) -> list[tuple[str, Tensor]]:
    """Outputs and gradients, of the kernels or of the reference in fp64."""
    inputs = OPERATOR.workload.make_inputs(case, torch.float32)
    names = discovery.trainable(OPERATOR, case)
    douts = [torch.randn(*case.lead, case.outs, generator=torch.Generator().manual_seed(1))]
    if exact:
        inputs = discovery.map_tensors(inputs, lambda _, t: t.double())
        outs, grads = discovery.run(OPERATOR.reference.forward, inputs, names, douts)
    else:
        outs, grads = discovery.run(OPERATOR.public, inputs, names, douts, backend="native")
    return [("output", outs[0]), *grads]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_many_blocks_agree_with_fp64(case: Case, every_isa: list[str]) -> None:
    exact = _run(case, exact=True)
    for name in every_isa:
        assert torch.ops.petal_native.cpu_isa(name) == name
        for (label, want), (_, got) in zip(exact, _run(case), strict=True):
            apart = (got.double() - want).abs().max() / want.abs().max()
            assert apart < 1e-5, f"{name}: {label}: {apart:.1e}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_threads_do_not_change_bits(case: Case) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = _run(case)
        torch.set_num_threads(3)
        three = _run(case)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(one, three, strict=True))


@pytest.mark.parametrize("route", ["add", "mul", "expand", "gram"])
def test_traffic_of_routed_lora(route: str) -> None:
    """GPT-2's c_attn: x, the middle and q and v where they lie, beyond the base."""
    call = traffic.RoutedProjection(route)

    def kernel(tensors: list[Tensor | None], *rest: Any) -> tuple[Any, Any]:
        return tensors, rest[-1]

    with pk.use_backend("native"):
        call.check(call.count({"petal_native::gated_bottleneck_fwd": kernel}))


@pytest.mark.parametrize("out", [7, 16, 45])
@pytest.mark.parametrize("norm", [False, True])
def test_the_padding_of_a_vector_is_no_part_of_a_sum(out: int, norm: bool) -> None:
    """An infinite number times a weight's padding is NaN. A saturated gate is finite, so is its
    row, and its norm and gradients too."""
    g = torch.Generator().manual_seed(0)
    x, up = torch.randn(5, out, generator=g), torch.randn(out, 3, generator=g)
    gate_input, gate_up = torch.randn(5, 9, generator=g), torch.randn(out, 1, generator=g)
    gate_input[2, 4] = float("inf")
    weights = {"norm_weight": torch.randn(out, generator=g), "norm_bias": torch.zeros(out)}
    given = {
        "x": x, "down": torch.randn(3, out, generator=g), "up": up, "activation": "relu",
        "gate": "large", "gate_input": gate_input, "gate_up": gate_up,
        "gate_down": torch.randn(1, 9, generator=g).abs(), **(weights if norm else {}),
    }  # fmt: skip
    names = ("x", "up", *(weights if norm else ()))
    want, got = (
        discovery.run(pk.gated_bottleneck, given, names, backend=name)
        for name in ("torch", "native")
    )
    assert torch.isfinite(got[0][0]).all()
    torch.testing.assert_close(got[0][0], want[0][0], rtol=1e-4, atol=1e-5)
    for (label, a), (_, b) in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=label)
