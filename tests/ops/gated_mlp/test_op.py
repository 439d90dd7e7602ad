"""``gated_mlp`` beyond the common grid: which masks its linears draw, what it keeps, what runs
where, and what it refuses."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import petal_kernels as pk
from petal_kernels._runtime import philox
from petal_kernels.ops.gated_mlp import workload
from tests.ops import discovery
from tests.ops.record_backends import record_backends

OPERATOR = discovery.OPERATORS["gated_mlp"]
CASES = {case.name: case for case in workload.CASES}


def identities(count: int, n: int) -> dict[str, Any]:
    """Linears that are nothing but their updates, and those the identity."""
    eye = [torch.eye(n)] * count
    return {"weights": [torch.zeros(n, n)] * count, "downs": eye, "ups": eye}


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("offset", [0, 2**32 - 1, 2**63 - 1])
def test_every_linear_has_its_own_stream(backend: str, offset: int) -> None:
    """Gate 0, up 1, down 2; without a gate up 0, down 1; whichever of them have updates."""
    rows, n, p = 23, 16, 0.3
    rng, x = torch.tensor([77, offset]), torch.ones(rows, n)
    m = [philox.scaled_mask(rng, p, k, rows, n, torch.float32) for k in range(3)]
    options: dict[str, Any] = {"activation": "identity", "dropout": p, "rng": rng}
    options["backend"] = backend
    gated = pk.gated_mlp(x, **identities(3, n), **options)
    torch.testing.assert_close(gated, m[0] * m[1] * m[2])
    torch.testing.assert_close(pk.gated_mlp(x, **identities(2, n), **options), m[0] * m[1])
    for some in itertools.product((True, False), repeat=3):
        given = identities(3, n)
        given["weights"] = [torch.zeros(n, n) if own else torch.eye(n) for own in some]
        for name in ("downs", "ups"):
            given[name] = [t if own else None for t, own in zip(given[name], some, strict=True)]
        want = torch.ones(rows, n)
        for mask in itertools.compress(m, some):
            want = want * mask
        torch.testing.assert_close(pk.gated_mlp(x, **given, **options), want)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("name", ["odd", "plain-odd", "gate-alone", "down-alone", "rank-1"])
def test_recompute_gives_the_same(name: str, backend: str) -> None:
    """The outputs to the bit."""
    case = CASES[name]
    inputs = workload.make_inputs(case, torch.float32)
    names = discovery.trainable(OPERATOR, case)
    kept, again = (
        discovery.run(OPERATOR.public, inputs, names, backend=backend, recompute=recompute)
        for recompute in (False, True)
    )
    assert torch.equal(kept[0][0], again[0][0])
    for (label, a), (_, b) in zip(kept[1], again[1], strict=True):
        assert (a - b).abs().max() <= 3e-6 * a.abs().max(), label


def saved(case: workload.Case, **options: Any) -> list[tuple[int, ...]]:
    """Shapes of what is kept beside x and the parameters."""
    inputs = workload.make_inputs(case, torch.float32)
    inputs = discovery.require_grad(inputs, discovery.trainable(OPERATOR, case))
    own = {t.data_ptr() for _, t in discovery.leaves(inputs, tuple(inputs))}
    shapes: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in own and t.is_floating_point():
            shapes.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        pk.gated_mlp(**inputs, **options)
    return shapes


def test_what_is_kept() -> None:
    """x is the very tensor; of the rows between the linears g and u, and nothing of a mask."""
    case = CASES["llama-dropout"]
    n, f = case.rows, case.inner
    middles = [(n, 16), (n, 8)]
    assert sorted(saved(case)) == sorted([*middles, (n, f), (n, f)])
    assert sorted(saved(case, recompute=True)) == sorted(middles)
    plain = CASES["plain"]
    assert sorted(saved(plain)) == sorted([(150, 8), (150, 8), (150, 72)])
    last = replace(CASES["last-alone"], recompute=False)
    assert sorted(saved(last)) == sorted([(70, 8), (70, 72), (70, 72)])
    assert saved(CASES["last-up-alone"]) == [(70, 8)]


@pytest.mark.parametrize("backend", ["auto", "torch", "native"])
def test_the_products_are_lowrank_linears(backend: str) -> None:
    """With its backend's choice, or torch where that is named; a linear without an update is the
    library's."""
    asked = {"llama": [2, 1], "gate-alone": [1], "down-alone": [1], "no-update": []}
    for name, updated in asked.items():
        inputs = workload.make_inputs(CASES[name], torch.float32)
        told = pk.explain(pk.gated_mlp, **inputs, backend=backend)
        with record_backends() as used:
            pk.gated_mlp(**inputs, backend=backend)
        mine = [each for each in used if each.operator == "gated_mlp"]
        others = [each for each in used if each.operator == "lowrank_linear"]
        assert len(mine) == 1
        assert len(mine) + len(others) == len(used)
        assert mine[0].backend == told.backend
        assert len(others) == len(updated) == len(told.notes)
        for each, note in zip(others, told.notes, strict=True):
            assert note.endswith(f"lowrank_linear runs on {each.backend}, plan {each.plan}")
        if backend == "torch":
            assert {each.backend for each in used} == {"torch"}


def test_explain_says_what_is_missing() -> None:
    inputs = workload.make_inputs(CASES["llama"], torch.float32)
    said = dict(pk.explain(pk.gated_mlp, **inputs).rows)
    assert said["torch"] == ()
    wide = discovery.map_tensors(inputs, lambda _, t: t.double())
    told = pk.explain(pk.gated_mlp, **wide)
    assert dict(told.rows)["native"]
    assert told.backend == "torch"


def test_it_is_the_mlp_of_two_linears() -> None:
    """GPT-2's, of Conv1D weights, and what an update of zeros adds."""
    x, first, second = torch.randn(3, 5, 12), torch.randn(12, 20), torch.randn(20, 12)
    biases = [torch.randn(20), torch.randn(12)]
    want = F.gelu(x @ first + biases[0], approximate="tanh") @ second + biases[1]
    given: dict[str, Any] = {"activation": "gelu_tanh", "biases": biases}
    weights = [first.t(), second.t()]
    torch.testing.assert_close(pk.gated_mlp(x, weights, **given), want)
    downs, ups = [torch.randn(4, 12), None], [torch.zeros(20, 4), None]
    torch.testing.assert_close(pk.gated_mlp(x, weights, downs=downs, ups=ups, **given), want)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_dg_is_where_dp_was(backend: str) -> None:
    """Whatever the strides: the raw operator writes what its schema marks."""
    g, u, dp = (torch.randn(4, 9, 12) for _ in range(3))
    run, dense = torch.ops.petal.gated_mlp_act_bwd.default, dp.clone()
    rest = (None, None, None, 0.0, "silu", backend)
    want, _ = run(dense, g, u, *rest)
    exact = torch.autograd.functional.vjp(F.silu, g.double(), (u * dp).double())[1]
    torch.testing.assert_close(dense.double(), exact, rtol=1e-5, atol=1e-6)
    for given in (
        dp.transpose(0, 2).contiguous().transpose(0, 2),
        torch.cat((dp, dp), 2)[..., :12],
    ):
        assert not given.is_contiguous()
        du, _ = run(given, g, u, *rest)
        torch.testing.assert_close(given, dense)
        torch.testing.assert_close(du, want)


def test_a_trained_weight_is_refused_by_name() -> None:
    for k in range(3):
        inputs = workload.make_inputs(CASES["llama"], torch.float32)
        inputs["weights"][k].requires_grad_()
        with pytest.raises(ValueError, match=rf"^weights\[{k}\]: want a frozen weight"):
            pk.gated_mlp(**inputs)
        with torch.no_grad():
            pk.gated_mlp(**inputs)


def test_a_half_given_update_is_refused_by_name() -> None:
    inputs = workload.make_inputs(CASES["llama"], torch.float32)
    for here, other in (("downs", "ups"), ("ups", "downs")):
        for given in (None, [None, *inputs[here][1:]]):
            name = rf"^{here}(\[0\])?: want a (sequence|Tensor), as {other}"
            with pytest.raises(TypeError, match=name):
                pk.gated_mlp(**(inputs | {here: given}))


def test_no_mask_is_drawn_outside_of_training() -> None:
    inputs = workload.make_inputs(CASES["llama-dropout"], torch.float32)
    quiet = pk.gated_mlp(**inputs, training=False)
    assert torch.equal(quiet, pk.gated_mlp(**(inputs | {"dropout": 0.0})))
    assert not torch.allclose(quiet, pk.gated_mlp(**inputs))


def test_nothing_is_drawn_without_an_update() -> None:
    inputs = workload.make_inputs(CASES["no-update"], torch.float32)
    state = torch.get_rng_state()
    y = pk.gated_mlp(**(inputs | {"dropout": 0.5}))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(y, pk.gated_mlp(**inputs))
