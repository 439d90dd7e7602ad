"""The C++ CPU kernels of ``expert_dispatch`` beyond the common grid: many ragged blocks, chunks and
strips, every instruction set, any number of threads, routings made to break a sort, memory that
nobody wrote, traffic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import petal_kernels as pk
from petal_kernels._runtime import device
from petal_kernels._runtime.backends import bound
from petal_kernels.ops.expert_dispatch import native_impl, op, routing, torch_impl, workload
from petal_kernels.ops.expert_dispatch.arguments import Call, Saved
from tests.ops import discovery

pytestmark = [
    pytest.mark.skipif(device.cpu_library_reason() is not None, reason="no CPU library"),
    pytest.mark.usefixtures("poisoned"),
]

OPERATOR = discovery.OPERATORS["expert_dispatch"]
N, D, R = 1505, 70, 20  # eight blocks of rows, twelve chunks of a sum, three strips or more
Case = workload.Case
DENSE = Case("dense", (N,), D, 6, R, activation="gelu", noise=True)
SORTED = workload._topk("sorted", (N,), D, 5, R, plan="sorted", activation="silu", skew="zipf")
PICKED: dict[str, Any] = {"gate": "given", "choice": "indices", "top_k": 2, "pooled": True}
CASES = (
    DENSE,
    replace(DENSE, name="mean", gate="mean", noise=False, base="none", out=45, frozen=("x",)),
    replace(DENSE, name="shared", shared_down=True, base="given", out=45),
    replace(DENSE, name="many-experts", experts=37, rank=3),
    replace(DENSE, name="given", lead=(5, 301), gate="given", pooled=True, noise=False),
    SORTED,
    replace(SORTED, name="stationary", plan="stationary", renormalize=False),
    replace(SORTED, name="all-to-one", top_k=1, skew="one", renormalize=False),
    replace(SORTED, name="many-experts-sorted", experts=37, top_k=5, rank=3),
    replace(SORTED, name="shared-sorted", shared_down=True),
    replace(SORTED, name="lora", base="given", out=45, bias=False),
    Case("samples", (5, 301), D, 5, R, plan="sorted", activation="gelu_tanh", **PICKED),
    Case("samples-stationary", (5, 301), D, 5, R, plan="stationary", **PICKED),
)
CHOSEN = tuple(case for case in CASES if case.top_k)


def by_name(case: Case) -> str:
    return case.name


def prepare(case: Case, dtype: torch.dtype = torch.float32, **changes: Any) -> Call:
    """What the backend receives for a case."""
    inputs = workload.options(case) | workload.make_inputs(case, dtype) | changes
    call: Call = op.prepare(bound(op.expert_dispatch, **inputs))[0]
    return call


def needs(call: Call) -> frozenset[str]:
    """Every gradient there is to ask for."""
    found = {name for name, t in call.tensors._asdict().items() if t is not None}
    return frozenset(found - {"base", "chosen"})


def draw(like: Tensor, *shape: int) -> Tensor:
    values = torch.randn(shape or like.shape, generator=torch.Generator().manual_seed(1))
    return values.to(like.dtype)


def run(case: Case, exact: bool = False) -> list[tuple[str, Tensor]]:
    """Outputs and gradients, of the kernels or of the reference in fp64."""
    inputs = workload.make_inputs(case, torch.float32)
    names = discovery.trainable(OPERATOR, case)
    douts = [torch.randn(*case.lead, case.outs, generator=torch.Generator().manual_seed(1))]
    if exact:
        inputs = discovery.map_tensors(inputs, lambda _, t: t.double())
        outs, grads = discovery.run(OPERATOR.reference.forward, inputs, names, douts)
    else:
        options = {"plan": case.plan, "backend": "native"}
        outs, grads = discovery.run(OPERATOR.public, inputs, names, douts, **options)
    return [("output", outs[0]), *grads]


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_many_blocks_agree_with_fp64(case: Case, every_isa: list[str]) -> None:
    exact = run(case, exact=True)
    for name in every_isa:
        assert torch.ops.petal_native.cpu_isa(name) == name
        for (label, want), (_, got) in zip(exact, run(case), strict=True):
            apart = (got.double() - want).abs().max() / want.abs().max()
            assert apart < 1e-5, f"{name}: {label}: {apart:.1e}"


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_threads_do_not_change_bits(case: Case) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(case)
        torch.set_num_threads(3)
        three = run(case)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(one, three, strict=True))


@pytest.mark.parametrize("skew", ["uniform", "zipf", "one"])
@pytest.mark.parametrize(("n", "experts", "k"), [(N, 5, 2), (N, 37, 3), (5, 8, 2), (1, 8, 8)])
def test_the_sort(n: int, experts: int, k: int, skew: str) -> None:
    """Stable, by expert, -1 behind the last; z lies where it says."""
    call = prepare(replace(SORTED, lead=(n,), experts=experts, top_k=k, skew=skew))
    saved: Any = native_impl.forward(call, True)[1]
    assert torch.equal(saved.chosen, routing.choose(saved.logits, k))
    order, offsets = routing.sort_by_expert(saved.chosen, call.slots)
    assert torch.equal(saved.order, order)
    assert torch.equal(saved.offsets, offsets)
    _, want = torch_impl.forward(call, True)
    torch.testing.assert_close(saved.z, want.z, rtol=1e-5, atol=1e-5)


def test_the_sort_with_fewer_than_k() -> None:
    """An expert that is named twice is chosen once: slots are left over."""
    case = Case("twice", (N,), D, 5, R, gate="given", choice="indices", top_k=3, plan="sorted")
    indices = workload.make_inputs(case, torch.float32)["indices"]
    indices[::2, 1] = indices[::2, 0]
    call = prepare(case, indices=indices)
    saved: Any = native_impl.forward(call, True)[1]
    assert call.tensors.chosen is not None
    order, offsets = routing.sort_by_expert(call.tensors.chosen, call.slots)
    assert order[-1] == -1
    assert torch.equal(saved.order, order)
    assert torch.equal(saved.offsets, offsets)


def test_choice_and_softmax_of_odd_logits() -> None:
    """NaN above all, of equal ones the first, infinities as in torch."""
    nan, inf = float("nan"), float("inf")
    rows = [[0, 1, 1, 1, 0], [nan, 5, 5, nan, 9], [-inf, -inf, -inf, -inf, -inf],
            [inf, 0, inf, 0, inf], [-inf, 3, -inf, -inf, -inf]]  # fmt: skip
    noise = torch.tensor(rows, dtype=torch.float32)
    case = replace(SORTED, lead=(5,), skew="uniform")
    for renormalize in (True, False):
        call = prepare(
            case,
            noise=noise,
            router=torch.zeros(5, D),
            router_bias=torch.zeros(5),
            renormalize=renormalize,
        )
        out, saved = native_impl.forward(call, True)
        want, found = torch_impl.forward(call, True)
        assert saved.chosen is not None
        assert found.chosen is not None
        assert torch.equal(saved.chosen, found.chosen)
        torch.testing.assert_close(saved.logits, noise, equal_nan=True)
        torch.testing.assert_close(out, want, equal_nan=True, rtol=1e-5, atol=1e-5)


def _poisoned(call: Call, saved: Saved) -> Saved:
    """z with NaN wherever forward need not have written."""
    assert saved.z is not None
    z = saved.z.clone()
    if call.settings.plan == "sorted":
        assert saved.offsets is not None
        z[int(saved.offsets[-1]) :] = float("nan")
    elif not call.shared_down:
        chosen = call.tensors.chosen if saved.chosen is None else saved.chosen
        assert chosen is not None
        seen = torch_impl._per_token(chosen, call.settings)
        z.view(call.rows, call.experts, call.rank)[~seen] = float("nan")
    return saved._replace(z=z)


@pytest.mark.parametrize("case", CHOSEN, ids=by_name)
def test_backward_reads_what_was_written(case: Case) -> None:
    """Alone, and after another backend's forward."""
    call = prepare(case)
    out, saved = native_impl.forward(call, True)
    dout, need = draw(out), needs(call)
    want = native_impl.backward(call, saved, dout, None, need)
    got = native_impl.backward(call, _poisoned(call, saved), dout, None, need)
    assert all(torch.equal(got[name], want[name]) for name in need)
    _, other = torch_impl.forward(call, True)
    found = native_impl.backward(call, _poisoned(call, other), dout, None, need)
    for name in need:
        torch.testing.assert_close(found[name], want[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_a_gradient_alone_is_the_same(case: Case) -> None:
    """Whatever else is wanted; with a gradient from the losses where there is a router."""
    call = prepare(case)
    out, saved = native_impl.forward(call, True)
    dlogits = draw(out, *saved.logits.shape) if saved.logits is not None else None
    want = native_impl.backward(call, saved, draw(out), dlogits, needs(call))
    for name in needs(call):
        got = native_impl.backward(call, saved, draw(out), dlogits, frozenset({name}))
        assert got.keys() == {name}
        assert torch.equal(got[name], want[name]), name


class _Operands(TorchDispatchMode):
    """The bytes of the tensors an operator is given, operator by operator; views are free."""

    def __init__(self, parameters: tuple[Tensor | None, ...]) -> None:
        super().__init__()
        self.parameters = {t.data_ptr() for t in parameters if t is not None}
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
        moved = {t.data_ptr(): t.nbytes for t in given if t.data_ptr() not in self.parameters}
        if "empty" not in func._schema.name:
            self.bytes[func._schema.name] = sum(moved.values())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", [DENSE, SORTED, replace(SORTED, base="given", out=45)])
def test_traffic(case: Case) -> None:
    """Forward is one kernel; it is given x, the base, the result and z, and N x E numbers. So is
    backward, with the weight gradients it writes."""
    call = prepare(case)
    t = call.tensors
    assert t.noise is not None
    weights = (t.down, t.down_bias, t.up, t.up_bias, t.router, t.router_bias)
    with _Operands(weights) as forward:
        out, saved = native_impl.forward(call, True)
    wide, backward_wide = workload.bytes_moved(case, torch.float32)
    pairs = [t.noise, saved.logits, saved.chosen, saved.order, saved.offsets]
    pairs_bytes = sum(p.nbytes for p in pairs if p is not None)
    assert forward.bytes == {"petal_native::expert_dispatch_fwd": wide + pairs_bytes}
    dout = draw(out)
    with _Operands(weights) as backward:
        native_impl.backward(call, saved, dout, None, needs(call))
    name = "petal_native::expert_dispatch_bwd"
    flat_up = t.up.nbytes if case.plan != "sorted" else 0
    base = t.base.nbytes if t.base is not None else 0  # passed on, not read
    grads = sum(w.nbytes for w in weights if w is not None) + t.noise.nbytes
    want = backward_wide + pairs_bytes + grads + flat_up + base
    assert backward.bytes.pop(name) == want
    assert set(backward.bytes) <= {
        "aten::permute",
        "aten::view",
        "aten::clone",
        "aten::_unsafe_view",
    }


def test_refusals() -> None:
    call = prepare(DENSE, torch.float64)
    assert native_impl.unsupported(call) == ["has no kernels for torch.float64"]
    inputs = workload.make_inputs(DENSE, torch.float64)
    with pytest.raises(RuntimeError, match=r"native.*float64"):
        pk.expert_dispatch(**inputs, backend="native")


@pytest.mark.parametrize(("rank", "plan", "want"), [
    (64, "stationary", "torch"), (64, "sorted", "native"), (8, "stationary", "native"),
])  # fmt: skip
def test_wide_16_bit_products_are_the_library_s(
    rank: int, plan: str, want: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the processor multiplies bf16 itself; a named backend is obeyed."""
    monkeypatch.setattr(device, "native_16bit", lambda dtype: dtype == torch.bfloat16)
    case = replace(SORTED, rank=rank, plan=plan)
    for dtype, name in ((torch.bfloat16, want), (torch.float32, "native")):
        inputs = workload.make_inputs(case, dtype)
        assert pk.explain(pk.expert_dispatch, **inputs, plan=plan).backend == name
        named = pk.explain(pk.expert_dispatch, **inputs, plan=plan, backend="native")
        assert named.backend == "native"
