"""``expert_dispatch`` beyond the common grid: plans agree, permutations, repeatability, routing,
losses, refusals."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import petal_kernels as pk
from petal_kernels._runtime.backends import bound
from petal_kernels.ops.expert_dispatch import op as op_module
from petal_kernels.ops.expert_dispatch import planner, routing, workload
from petal_kernels.ops.expert_dispatch.routing import Routing
from petal_kernels.tools import parity
from tests.ops import discovery

OP = next(op for op in discovery.operators() if op.name == "expert_dispatch")
BY_NAME = {case.name: case for case in workload.CASES}
CHOSEN = [c for c in workload.CASES if c.top_k and c.rows]


def backends(inputs: dict[str, Any], **options: Any) -> list[str]:
    rows = dict(pk.explain(pk.expert_dispatch, **inputs, **options).rows)
    return [name for name, reasons in rows.items() if not reasons]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cast(dtype: torch.dtype) -> Callable[[str, Tensor], Tensor]:
    return lambda _, t: t.detach().to(dtype)


def assert_close(got: Any, want: Any, **tolerance: Any) -> None:
    """Outputs and labelled gradients."""
    torch.testing.assert_close(got[0], want[0], **tolerance)
    torch.testing.assert_close(dict(got[1]), dict(want[1]), **tolerance)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("case", CHOSEN, ids=lambda c: c.name)
def test_the_plans_are_one_function(case: workload.Case) -> None:
    """Stationary and sorted give the same values and gradients, on every backend that runs."""
    names = discovery.trainable(OP, case)
    inputs = workload.make_inputs(case, torch.float64)
    want = discovery.run(pk.expert_dispatch, inputs, names, plan="stationary", backend="torch")
    got = discovery.run(pk.expert_dispatch, inputs, names, plan="sorted", backend="torch")
    assert_close(got, want)
    inputs = workload.make_inputs(case, torch.float32)
    want = discovery.run(pk.expert_dispatch, inputs, names, plan="stationary", backend="torch")
    for backend in backends(inputs):
        for plan in planner.PLANS:
            got = discovery.run(pk.expert_dispatch, inputs, names, plan=plan, backend=backend)
            assert_close(got, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["softmax", "topk-sorted", "topk-stationary", "indices"])
def test_a_permutation_of_the_tokens_permutes_the_outputs(name: str) -> None:
    case = dataclasses.replace(BY_NAME[name], lead=(149,))
    inputs = workload.make_inputs(case, torch.float32)
    order = torch.randperm(149, generator=torch.Generator().manual_seed(3))
    moved = {
        k: v[order] if k in ("x", "noise", "gates", "indices") else v for k, v in inputs.items()
    }
    for backend in backends(inputs):
        options: dict[str, Any] = {"plan": case.plan, "backend": backend}
        out, dx = (
            discovery.run(pk.expert_dispatch, i, ("x",), [d], **options)
            for i, d in ((inputs, draw(149, 64)), (moved, draw(149, 64)[order]))
        )
        torch.testing.assert_close(dx[0][0], out[0][0][order], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dx[1][0][1], out[1][0][1][order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["softmax", "topk-many", "topk-stationary", "indices-samples"])
def test_twenty_runs_give_the_same_bits(name: str) -> None:
    case = BY_NAME[name]
    names = discovery.trainable(OP, case)
    inputs = workload.make_inputs(case, torch.float32)
    fast = [b for b in backends(inputs) if b != "triton"]  # its interpreter takes minutes
    for backend in fast:
        options: dict[str, Any] = {"plan": case.plan, "backend": backend}
        first = discovery.run(pk.expert_dispatch, inputs, names, **options)
        for _ in range(19):
            again = discovery.run(pk.expert_dispatch, inputs, names, **options)
            for (label, a), (_, b) in zip(first[1], again[1], strict=True):
                assert torch.equal(a, b), f"{backend} {label}"
            assert torch.equal(first[0][0], again[0][0]), backend


@pytest.mark.parametrize("case", [c for c in workload.CASES if c.rows], ids=lambda c: c.name)
def test_the_baselines_compute_the_same(case: workload.Case) -> None:
    """Published, well-written and, where they can be had, other engines."""
    inputs = workload.make_inputs(case, torch.float32)
    want = OP.reference.forward(**inputs)[0]
    others = workload.optional_baselines(case, torch.device("cpu"))
    for f in (*workload.BASELINES.values(), *others.values()):
        torch.testing.assert_close(f(**inputs)[0], want, rtol=1e-4, atol=1e-4)


def test_a_router_of_zeros_is_the_mean() -> None:
    inputs = workload.make_inputs(BY_NAME["softmax-odd"], torch.float64)
    for name in ("router", "router_bias", "noise"):
        inputs[name] = torch.zeros_like(inputs[name])
    mean = {k: v for k, v in inputs.items() if k not in ("router", "router_bias", "noise")}
    torch.testing.assert_close(
        pk.expert_dispatch(**inputs), pk.expert_dispatch(**mean | {"gate": "mean"})
    )


def test_the_mean_of_linear_experts_is_one_dense_map() -> None:
    """keep I + mix / E sum_e B_e A_e: what the bottleneck computes, as one matrix."""
    inputs = workload.make_inputs(BY_NAME["mean"], torch.float64)
    down, up = inputs["down"], inputs["up"]
    dense = 0.6 * torch.eye(64, dtype=torch.float64) + 0.4 / 6 * (up @ down).sum(0)
    bias = 0.4 / 6 * ((up @ inputs["down_bias"].unsqueeze(-1)).squeeze(-1) + inputs["up_bias"])
    want = inputs["x"] @ dense.t() + bias.sum(0)
    torch.testing.assert_close(pk.expert_dispatch(**inputs), want)


def test_ties_go_to_the_first_experts() -> None:
    x, k = draw(70, 64), 2
    inputs: dict[str, Any] = {"x": x, "down": draw(5, 8, 64), "up": draw(5, 64, 8)}
    inputs["router"] = torch.zeros(5, 64)
    found: Any
    for backend in backends(inputs, top_k=k):
        _, found = pk.expert_dispatch(**inputs, top_k=k, return_routing=True, backend=backend)
        assert found.chosen[:, :k].all(), backend
        assert not found.chosen[:, k:].any(), backend


@pytest.mark.parametrize("skew", ["uniform", "one", "zipf"])
@pytest.mark.parametrize(("n", "experts", "k"), [(0, 4, 2), (1, 8, 3), (5, 8, 2), (301, 7, 2)])
def test_sort_by_expert(skew: str, n: int, experts: int, k: int) -> None:
    """Against Python: each expert's tokens in their order, -1 behind the last."""
    case = workload.Case("", (n,), 8, experts, 2, skew=skew)
    ranking = workload._ranking(case, (n,), torch.Generator().manual_seed(0))
    chosen = routing.choose(ranking, k)
    chosen[: n // 3, -1] = False  # fewer than k somewhere
    order, offsets = routing.sort_by_expert(chosen, n * k)
    lists = [[t for t in range(n) if chosen[t, e]] for e in range(experts)]
    flat = [t for tokens in lists for t in tokens]
    assert order.tolist() == flat + [-1] * (n * k - len(flat))
    assert offsets.tolist() == [sum(map(len, lists[:e])) for e in range(experts + 1)]
    assert order.dtype == offsets.dtype == torch.int32


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any call returned."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        found = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.nbytes = max([self.nbytes, *(t.nbytes for t in found)])
        return out


@pytest.mark.parametrize("backend", ["native", "triton", "torch"])
def test_sorted_holds_nothing_of_every_pair(backend: str) -> None:
    """Rows of x, slots of rank r, partial sums of parameters; no tensor of N k d numbers."""
    case = workload.Case("", (768,), 64, 4, 4, top_k=3, noise=True, plan="sorted")
    inputs = workload.make_inputs(case, torch.float32)
    if backend not in backends(inputs):
        pytest.skip(f"{backend} cannot run here")
    given = inputs | {"plan": "sorted", "backend": backend}
    call = op_module.prepare(bound(op_module.expert_dispatch, **given))[0]
    module = importlib.import_module(f"petal_kernels.ops.expert_dispatch.{backend}_impl")
    need = {name for name, t in call.tensors._asdict().items() if t is not None} - {"noise"}
    with Largest() as largest:
        out, saved = module.forward(call, True)
        module.backward(call, saved, draw(768, 64), None, frozenset(need))
    assert out.shape == (768, 64)
    assert largest.nbytes < 2 * inputs["x"].nbytes  # N k d would be three times x


@pytest.mark.parametrize("name", ["softmax", "topk", "topk-stationary", "topk-odd"])
def test_the_losses_reach_the_router(name: str) -> None:
    """Gradients of out, balance and z loss together, against autograd through the reference."""
    case = BY_NAME[name]
    inputs = workload.make_inputs(case, torch.float64)
    leaves = discovery.require_grad(inputs, ("x", "router"))

    def total(out: Tensor, found: Routing) -> Tensor:
        aux = 0.3 * found.load_balance_loss() + 0.2 * found.z_loss()
        return out.square().sum() / 100 + aux

    found: Any
    for backend in ("torch", *(b for b in backends(workload.make_inputs(case, torch.float32)))):
        dtype = torch.float64 if backend == "torch" else torch.float32
        mine = discovery.map_tensors(leaves, cast(dtype))
        mine = discovery.require_grad(mine, ("x", "router"))
        out, found = pk.expert_dispatch(
            **mine, plan=case.plan, backend=backend, return_routing=True
        )
        got = torch.autograd.grad(total(out, found), (mine["x"], mine["router"]))
        want_out = OP.reference.forward(**leaves)[0]
        logits = leaves["x"] @ leaves["router"].t() + leaves["router_bias"]
        logits = logits + leaves.get("noise", 0.0)
        chosen = routing.choose(logits, case.top_k) if case.top_k else None
        want = torch.autograd.grad(
            total(want_out, Routing(logits, chosen)), (leaves["x"], leaves["router"])
        )
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.logits.double(), logits, rtol=1e-4, atol=1e-4)


def test_balance_and_usage() -> None:
    """Uniform logits give 1; all tokens on one expert give E; usage sums to one."""
    uniform = Routing(torch.zeros(12, 4), routing.choose(torch.eye(4).repeat(3, 1), 1))
    assert uniform.load_balance_loss().item() == pytest.approx(1.0)
    assert uniform.usage().tolist() == [0.25] * 4
    collapsed = torch.full((12, 4), -100.0)
    collapsed[:, 2] = 100.0
    found = Routing(collapsed, routing.choose(collapsed, 1))
    assert found.load_balance_loss().item() == pytest.approx(4.0)
    assert found.usage().tolist() == [0.0, 0.0, 1.0, 0.0]
    assert found.z_loss().item() == pytest.approx(1e4)
    dense = Routing(draw(12, 4), None)
    assert dense.usage().sum().item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="z_loss: want a routing by a router's logits"):
        Routing(None, None).z_loss()


def test_an_unchosen_expert_may_overflow() -> None:
    """Its infinite bottleneck contributes nothing, not 0 times infinity; a chosen one shows."""
    inputs = workload.make_inputs(BY_NAME["indices"], torch.float32)
    inputs["indices"] = inputs["indices"] % 5  # nobody chooses expert 5
    for expert, finite in ((5, True), (1, False)):
        broken = inputs | {"down_bias": inputs["down_bias"].clone()}
        broken["down_bias"][expert] = float("inf")
        for backend in backends(inputs):
            for plan in planner.PLANS:
                options: dict[str, Any] = {"plan": plan, "backend": backend}
                outs, grads = discovery.run(pk.expert_dispatch, broken, ("x", "gates"), **options)
                for t in (outs[0], *(g for _, g in grads)):
                    assert bool(torch.isfinite(t).all()) is finite, f"{backend} {plan}"


@pytest.mark.parametrize(("device", "experts", "rank", "k", "length", "plan"), [
    ("cpu", 6, 64, 0, 1, "stationary"), ("cpu", 8, 64, 2, 1, "sorted"),
    ("cpu", 8, 64, 8, 1, "stationary"), ("cuda", 8, 64, 2, 1, "stationary"),
    ("cuda", 16, 64, 2, 1, "sorted"), ("cuda", 16, 64, 2, 32, "stationary"),
])  # fmt: skip
def test_the_plan_by_shape(
    device: str, experts: int, rank: int, k: int, length: int, plan: str
) -> None:
    assert planner.choose(device, experts, rank, k, length) == plan


def _call(**changes: Any) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        "x": draw(2, 5, 16), "down": draw(3, 4, 16), "up": draw(3, 16, 4),
        "router": draw(3, 16),
    }  # fmt: skip
    return inputs | changes


_GIVEN = {"gate": "given", "router": None}
REFUSALS = [
    ({"top_k": 4}, ValueError, r"top_k: want 1 <= top_k <= 3 experts, got 4"),
    ({"top_k": 0}, ValueError, r"top_k: want 1 <= top_k <= 3 experts, got 0"),
    ({"top_k": 1.5}, TypeError, r"top_k: want an int, got float"),
    ({"router": None}, TypeError, r"router: want a Tensor \[E, D\] with gate='softmax', got None"),
    ({"router": draw(4, 16)}, ValueError, r"router: want shape \[3, 16\], got \[4, 16\]"),
    ({"down": draw(2, 4, 16)}, ValueError, r"up: want shape \[2, O, 4\], got \[3, 16, 4\]"),
    ({"down": draw(3, 5, 16)}, ValueError, r"up: want shape \[3, O, 5\], got \[3, 16, 4\]"),
    ({"down_bias": draw(3, 5)}, ValueError, r"down_bias: want shape \[3, 4\], got \[3, 5\]"),
    ({"up_bias": draw(2, 16)}, ValueError, r"up_bias: want shape \[3, 16\], got \[2, 16\]"),
    ({"gate": "hard"}, ValueError, r"gate: want one of mean, softmax, given, got 'hard'"),
    ({"gate": "mean"}, ValueError, r"router: want None with gate='mean', got a Tensor"),
    (_GIVEN, TypeError, r"gates: want a Tensor \(or indices\) with gate='given', got None"),
    (_GIVEN | {"gates": draw(2, 5, 4)}, ValueError,
     r"gates: want shape \[2, 5, 3\] or \[2, 3\], got \[2, 5, 4\]"),
    (_GIVEN | {"indices": torch.zeros(2, 5, 4, dtype=torch.long)}, ValueError,
     r"indices: want 1 <= k <= 3 experts, got \[2, 5, 4\]"),
    (_GIVEN | {"indices": torch.zeros(2, 5, 1)}, TypeError,
     r"indices: want dtype int64 or int32, got float32"),
    (_GIVEN | {"indices": torch.full((2, 5, 1), 3)}, ValueError,
     r"indices: want 0 <= index < 3 experts, got 3"),
    (_GIVEN | {"indices": torch.full((2, 5, 1), -1)}, ValueError,
     r"indices: want 0 <= index < 3 experts, got -1"),
    (_GIVEN | {"indices": torch.zeros(2, 5, 2, dtype=torch.long), "gates": draw(2, 5, 3)},
     ValueError, r"gates: want shape \[2, 5, 2\], got \[2, 5, 3\]"),
    ({"noise": draw(2, 3)}, ValueError, r"noise: want shape \[2, 5, 3\], got \[2, 3\]"),
    ({"mask": torch.ones(2, 5)}, ValueError, r"mask: want None with router_input='token'"),
    ({"router_input": "pooled", "x": draw(5, 16)}, ValueError,
     r"x: want shape \[B, L, D\] with router_input='pooled', got \[5, 16\]"),
    ({"plan": "sorted"}, ValueError, r"plan: want 'stationary' or 'auto' where every expert is"),
    ({"plan": "fast"}, ValueError, r"plan: want one of auto, stationary, sorted, got 'fast'"),
    ({"base": draw(2, 5, 8)}, ValueError, r"base: want shape \[2, 5, 16\], got \[2, 5, 8\]"),
    ({"up": draw(3, 8, 4)}, ValueError, r"x: want shape \[2, 5, 8\], got \[2, 5, 16\]"),
    ({"x": draw(2, 5, 16).half()}, TypeError, r"down: want dtype|router: want dtype"),
    ({"keep": torch.ones(())}, TypeError, r"keep: want a float, got Tensor"),
    ({"renormalize": 1}, TypeError, r"renormalize: want a bool, got int"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "text"), REFUSALS)
def test_refusals(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    if changes.get("x") is not None and changes["x"].dtype == torch.float16:
        changes = changes | {"down": draw(3, 4, 16).double()}
    with pytest.raises(error, match=text):
        pk.expert_dispatch(**_call(**changes))


def test_an_index_outside_is_ignored_where_looking_would_synchronise() -> None:
    """What a GPU does, on the raw arithmetic: no expert, no error."""
    chosen = torch.tensor([[7], [1], [-2]]).unsqueeze(-1) == torch.arange(3)
    assert chosen.any(-2).tolist() == [[False] * 3, [False, True, False], [False] * 3]


def test_the_bias_gradient_of_many_rows() -> None:
    """A sum over all tokens is as exact as plain torch's, which adds by pairs."""
    shape = dataclasses.replace(workload.SHAPES[0], lead=(4100,), width=64)
    operator = next(op for op in discovery.operators() if op.name == "expert_dispatch")
    assert parity.verify(operator, shape, "torch", torch.float32).faults == []
