"""What the general suites cannot see in ``gated_bottleneck``: bad input, identities, masks."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import petal_kernels as pk
from petal_kernels._runtime import philox
from petal_kernels.ops.gated_bottleneck import workload
from petal_kernels.ops.gated_bottleneck.op import _route_factors
from tests.ops import discovery

B, L, D, R = 2, 5, 8, 3


def good(gate: str = "large", route: str = "none") -> dict[str, Any]:
    inputs: dict[str, Any] = {
        "x": torch.zeros(B, L, D),
        "down": torch.zeros(R, D),
        "up": torch.zeros(D, R),
        "down_bias": torch.zeros(R),
        "up_bias": torch.zeros(D),
        "gate": gate,
        "route": route,
    }
    if gate == "large":
        inputs |= {"gate_down": torch.zeros(R, D), "gate_up": torch.zeros(D, R)}
    if gate in ("large", "middleX", "small"):
        inputs["gate_input"] = torch.zeros(B, L, D)
    if gate in ("middleX", "middleY"):
        inputs["gate_weight"] = torch.zeros(D)
    if gate == "small":
        inputs["gate_weight"] = torch.zeros(2 * D)
    if route != "none":
        inputs["vision"] = torch.zeros(B, 4, R)
    return inputs


BAD: list[tuple[str, dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ("x-type", {}, {"x": 1}, TypeError, "x: want a Tensor, got int"),
    ("x-none", {}, {"x": None}, TypeError, "x: want a Tensor (or bottleneck"),
    ("x-integer", {}, {"x": torch.zeros(B, L, D).long()}, TypeError, "x: want dtype float32"),
    ("down-width", {}, {"down": torch.zeros(R, 7)}, ValueError, "down: want shape [r, 8]"),
    ("down-rank-0", {}, {"down": torch.zeros(0, D)}, ValueError, "down: want r >= 1"),
    ("down-bias", {}, {"down_bias": torch.zeros(4)}, ValueError, "down_bias: want shape [3]"),
    ("up-rank", {}, {"up": torch.zeros(D, 4)}, ValueError, "up: want shape [O, 3], got [8, 4]"),
    ("up-bias", {}, {"up_bias": torch.zeros(3)}, ValueError, "up_bias: want shape [8]"),
    ("activation", {}, {"activation": "gelu_new"}, ValueError, "activation: want one of identity"),
    ("gate-name", {}, {"gate": "huge"}, ValueError, "gate: want one of none, large"),
    ("route-name", {}, {"route": "dot"}, ValueError, "route: want one of none, add"),
    ("variant", {}, {"variant": "code"}, ValueError, "variant: want one of paper, release"),
    ("no-gate-input", {}, {"gate_input": None}, TypeError, "gate_input: want a Tensor with gate="),
    ("no-gate-down", {}, {"gate_down": None}, TypeError, "gate_down: want a Tensor with gate="),
    (
        "gate-input-lead",
        {},
        {"gate_input": torch.zeros(B, 4, D)},
        ValueError,
        "gate_input: want shape [2, 5, Dg], got [2, 4, 8]",
    ),
    ("gate-up", {}, {"gate_up": torch.zeros(D, 4)}, ValueError, "gate_up: want shape [8, 3]"),
    ("stray-weight", {}, {"gate_weight": torch.zeros(D)}, ValueError, "gate_weight: want None"),
    (
        "stray-gate-input",
        {"gate": "none"},
        {"gate_input": torch.zeros(B, L, D)},
        ValueError,
        "gate_input: want None with gate='none'",
    ),
    (
        "stray-mask",
        {},
        {"mask": torch.ones(B, L)},
        ValueError,
        "mask: want None with gate='large'",
    ),
    (
        "mask-shape",
        {"gate": "small"},
        {"mask": torch.ones(B, 4)},
        ValueError,
        "mask: want shape [2, 5], got [2, 4]",
    ),
    (
        "mask-release",
        {"gate": "small"},
        {"mask": torch.ones(B, L), "variant": "release"},
        ValueError,
        "mask: want None with variant='release'",
    ),
    (
        "small-2d",
        {"gate": "small"},
        {"x": torch.zeros(10, D), "gate_input": torch.zeros(10, D)},
        ValueError,
        "x: want shape [B, L, D] with gate='small', got [10, 8]",
    ),
    (
        "small-weight",
        {"gate": "small"},
        {"gate_weight": torch.zeros(D)},
        ValueError,
        "gate_weight: want shape [16], got [8]",
    ),
    (
        "no-vision",
        {"route": "mul"},
        {"vision": None},
        TypeError,
        "vision: want a Tensor [B, V, r]",
    ),
    (
        "vision-batch",
        {"route": "mul"},
        {"vision": torch.zeros(3, 4, R)},
        ValueError,
        "vision: want shape [2, V, 3], got [3, 4, 3]",
    ),
    (
        "vision-rank",
        {"route": "gram"},
        {"vision": torch.zeros(B, 4, 4)},
        ValueError,
        "vision: want shape [2, V, 3], got [2, 4, 4]",
    ),
    (
        "vision-empty",
        {"route": "gram"},
        {"vision": torch.zeros(B, 0, R)},
        ValueError,
        "vision: want V >= 1",
    ),
    ("stray-vision", {}, {"vision": torch.zeros(B, 1, R)}, ValueError, "vision: want None"),
    ("base-name", {}, {"base": "output"}, ValueError, "base: want one of input, got 'output'"),
    ("base-shape", {}, {"base": torch.zeros(B, L, 9)}, ValueError, "base: want shape [2, 5, 8]"),
    ("residual-name", {}, {"residual": "x"}, ValueError, "residual: want one of gate_input"),
    (
        "residual-shape",
        {},
        {"residual": torch.zeros(B, L, 9)},
        ValueError,
        "residual: want shape [2, 5, 8]",
    ),
    (
        "norm-alone",
        {},
        {"norm_weight": torch.zeros(D)},
        TypeError,
        "norm_bias: want norm_weight and norm_bias together",
    ),
    ("norm-eps", {}, {"norm_eps": -1.0}, ValueError, "norm_eps: want a number >= 0"),
    ("scale", {}, {"scale": torch.ones(())}, TypeError, "scale: want a float, got Tensor"),
    ("dropout", {}, {"dropout": 1.0}, ValueError, "dropout: want 0 <= dropout < 1, got 1.0"),
    (
        "dtypes",
        {},
        {"gate_input": torch.zeros(B, L, D, dtype=torch.float16)},
        TypeError,
        "gate_input: want dtype float32 like the activations, got float16",
    ),
    ("parameter-dtype", {}, {"up": torch.zeros(D, R).half()}, TypeError, "up: want dtype float32"),
    ("device", {}, {"up": torch.zeros(D, R, device="meta")}, ValueError, "up: want device cpu"),
    ("rng", {}, {"rng": torch.zeros(2)}, TypeError, "rng: want dtype int64, got float32"),
    (
        "bottleneck-and-down",
        {},
        {"bottleneck": torch.zeros(B, L, R), "down_bias": None},
        ValueError,
        "down: want None when bottleneck is given",
    ),
]


@pytest.mark.parametrize(
    ("kind", "change", "error", "message"), [pytest.param(*b[1:], id=b[0]) for b in BAD]
)
def test_bad_input(
    kind: dict[str, Any], change: dict[str, Any], error: type[Exception], message: str
) -> None:
    inputs = good(**kind) | change
    with pytest.raises(error, match=re.escape(message)):
        pk.gated_bottleneck(**inputs)
    pk.gated_bottleneck(**good(**kind))


def runnable(case: Any, dtype: torch.dtype = torch.float32) -> list[str]:
    inputs = workload.make_inputs(case, dtype)
    return [n for n, why in pk.explain(pk.gated_bottleneck, **inputs).rows if not why]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_masks_equal_bit_for_bit_across_backends(p: float) -> None:
    """An identity adapter exposes the mask in the output, its gradient exposes it in backward."""
    rng = torch.tensor([-(2**61) + 12345, 2**33 + 7])
    n, d = 77, 40
    want = philox.scaled_masks(rng, p, 1, n, d, torch.float32)[0]
    for backend in runnable(workload.CASES[0]):
        for dtype in (torch.float32,) if backend == "triton" else (torch.float32, torch.bfloat16):
            x = torch.ones(n, d, dtype=dtype, requires_grad=True)
            down, up = torch.zeros(4, d, dtype=dtype), torch.zeros(d, 4, dtype=dtype)
            out = pk.gated_bottleneck(x, down, up, dropout=p, rng=rng, backend=backend)
            (dx,) = torch.autograd.grad(out.sum(), x)
            assert torch.equal(out, want.to(dtype)), f"{backend} {dtype}"
            assert torch.equal(dx, want.to(dtype)), f"{backend} {dtype} backward"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case_named(name: str) -> Any:
    return next(c for c in workload.CASES if c.name == name)


@pytest.mark.parametrize("length", [3, 50])
def test_both_orders_of_the_gram_product_are_one_function(length: int) -> None:
    """z (v^T v) and (z v^T) v; the shorter way is taken by shape."""
    v = draw(2, 9, 6)
    kind, _, left, right = _route_factors("gram", v, length, "paper")
    assert kind == "product"
    assert (right is None) == (6 * (length + 9) < 2 * length * 9)
    z = draw(2, length, 6, seed=1)
    assert left is not None
    q = z @ left.transpose(1, 2)
    q = q if right is None else q @ right
    torch.testing.assert_close(q, (z @ v.transpose(1, 2)) @ v)


def test_one_vision_token_makes_release_and_paper_one() -> None:
    x, down, up, v = draw(2, 7, 8), draw(3, 8, seed=1), draw(8, 3, seed=2), draw(2, 1, 3, seed=3)
    for route in ("gram", "gram_relu"):
        a, b = (
            pk.gated_bottleneck(x, down, up, route=route, vision=v, variant=variant)
            for variant in ("paper", "release")
        )
        assert torch.equal(a, b)


def test_expand_and_gram_of_one_token_are_rank_one() -> None:
    """Before the activation q is a number per token times one vector per sample."""
    x, down, v = draw(2, 7, 8), draw(3, 8, seed=1), draw(2, 1, 3, seed=3)
    eye = torch.eye(3, dtype=torch.float64)
    for route, weights in (("expand", torch.ones(2, 3, dtype=torch.float64)), ("gram", v[:, 0])):
        q = pk.gated_bottleneck(
            x, down, eye, base=None, activation="identity", route=route, vision=v
        )
        s = (x * (weights @ down).unsqueeze(1)).sum(-1, keepdim=True)
        torch.testing.assert_close(q, s * v)


@pytest.mark.parametrize("name", ["large", "middleX", "small-mask-odd"])
def test_residual_and_gate_input_given_apart_are_the_same_function(name: str) -> None:
    """Reading X once for gate and residual changes nothing but the traffic."""
    case = case_named(name)
    names = discovery.trainable(discovery.operators()[0], case)
    inputs = workload.make_inputs(case, torch.float64)
    once, grads = discovery.run(pk.gated_bottleneck, inputs, names)
    apart = inputs | {"residual": inputs["gate_input"].clone()}
    twice, more = discovery.run(pk.gated_bottleneck, apart, (*names, "residual"))
    torch.testing.assert_close(once, twice)
    found = dict(more)
    for label, gradient in grads:
        other = found[label] + (found["residual"] if label == "gate_input" else 0)
        torch.testing.assert_close(gradient, other)


def test_input_and_base_given_apart_are_the_same_function() -> None:
    x, down, up = draw(2, 7, 8), draw(3, 8, seed=1), draw(8, 3, seed=2)
    want = pk.gated_bottleneck(x, down, up)
    torch.testing.assert_close(pk.gated_bottleneck(x, down, up, base=x.clone()), want)
    z = x @ down.t()
    got = pk.gated_bottleneck(None, None, up, base=x, bottleneck=z)
    torch.testing.assert_close(got, want)


def test_a_sample_without_tokens_is_gated_by_zero() -> None:
    """A mask that leaves nothing gives gate 0, not NaN."""
    inputs = workload.make_inputs(case_named("small-release"), torch.float64)
    inputs |= {"variant": "paper", "dropout": 0.0, "mask": torch.zeros(3, 40)}
    assert float(pk.gated_bottleneck(**inputs).abs().max()) == 0.0


SUMS = [c for c in workload.CASES if c.name in ("value", "value-odd", "lora-add", "lora-mul")]


@pytest.mark.parametrize("case", SUMS, ids=lambda c: c.name)
@pytest.mark.parametrize("backend", discovery.backend_names(discovery.operators()[0]))
def test_update_in_columns_of_a_fused_projection(case: Any, backend: str) -> None:
    """In place, between untouched columns: the same values and gradients as the sum by itself."""
    inputs = workload.make_inputs(case, torch.float32) | {"scale": 1.0}
    if backend not in runnable(case):
        pytest.skip(dict(pk.explain(pk.gated_bottleneck, **inputs).rows)[backend][0])
    names = tuple(n for n in discovery.trainable(discovery.operators()[0], case) if n != "base")
    base = inputs.pop("base")
    wide = torch.randn(*base.shape[:-1], base.shape[-1] + 24)
    first, last = 8, 8 + base.shape[-1]
    wide[..., first:last] = base

    def in_place(**given: Any) -> Tensor:
        fused = source * 1.0  # nobody else's
        pointer = fused.data_ptr()
        out = pk.gated_bottleneck(**given, base=fused, update_at=first, backend=backend)
        assert out.data_ptr() == pointer
        return out

    def apart(**given: Any) -> Tensor:
        inner = source[..., first:last]
        y = pk.gated_bottleneck(**given, base=inner, backend=backend)
        return torch.cat((source[..., :first], y, source[..., last:]), -1)

    results = []
    for form in (in_place, apart):
        source = wide.clone().requires_grad_()
        douts = [torch.randn(wide.shape, generator=torch.Generator().manual_seed(2))]
        outs, grads = discovery.run(form, inputs, names, douts)
        with torch.no_grad():
            quiet = form(**inputs)
        results.append([*outs, quiet, *[g for _, g in grads]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    source = wide.clone().requires_grad_()
    (got,) = torch.autograd.grad(in_place(**inputs).sum(), source)
    assert torch.equal(got, torch.ones_like(got))


def test_update_at_is_for_plain_sums_on_a_base_of_ones_own() -> None:
    x, up, base = torch.zeros(4, 8), torch.zeros(6, 3), torch.zeros(4, 20)
    call: dict[str, Any] = {
        "x": x,
        "down": torch.zeros(3, 8),
        "up": up,
        "base": base,
        "update_at": 2,
    }
    pk.gated_bottleneck(**call)
    for change, error, message in (
        ({"update_at": 15}, ValueError, "update_at: want 0 <= update_at <= 14, got 15"),
        ({"update_at": "q"}, TypeError, "update_at: want an int, got str"),
        ({"base": "input"}, TypeError, "base: want a Tensor with update_at, got str"),
        ({"base": torch.zeros(20, 4).t()}, ValueError, "base: want a contiguous tensor"),
        ({"base": torch.zeros(4, 20).requires_grad_()}, ValueError, "that is no leaf"),
        ({"scale": 2.0}, ValueError, "scale: want 1.0 with update_at, got 2.0"),
        ({"dropout": 0.5}, ValueError, "dropout: want 0.0 with update_at, got 0.5"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            pk.gated_bottleneck(**call | change)


def test_saved_bytes_of_a_vl_pet_insertion() -> None:
    """H, X and r-wide values: at most 2.3 N d for r = 96."""
    case = workload.SHAPES[0]
    assert case.rank == 96
    assert case.gate == "large"
    unit = case.rows * case.width * 4
    assert workload.saved_bytes(case, torch.float32) <= 2.3 * unit


def test_least_traffic_of_a_vl_pet_insertion() -> None:
    """Forward at most 4 N d, one-pass backward at most 7, saved values included."""
    case = workload.SHAPES[0]
    forward, backward = workload.bytes_moved(case, torch.float32)
    unit = case.rows * case.width * 4
    assert forward <= 4 * unit
    assert backward <= 7 * unit
