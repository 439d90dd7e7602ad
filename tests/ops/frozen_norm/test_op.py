"""``frozen_norm`` beyond the common grid: the bits of the modules it stands for, what its readers
keep in its result's place, when they may not, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import petal_kernels as pk
from petal_kernels._runtime import device
from petal_kernels.ops.frozen_norm.arguments import KINDS

N, D, R, OUT = 24, 32, 4, 40
NATIVE = [] if device.cpu_library_reason() else ["native"]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed + 31 * len(shape) + sum(shape))
    return torch.randn(shape, generator=g).to(dtype)


class Llama(nn.Module):
    """The order of roundings that Llama's module has."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        rows = x.float()
        rows = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * rows.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_torch_backend_has_llamas_bits(dtype: torch.dtype) -> None:
    x, weight = draw(50, D, dtype=dtype), draw(D, dtype=dtype)
    assert torch.equal(pk.frozen_norm(x, weight, backend="torch"), Llama(weight)(x))


@pytest.mark.parametrize("backend", ["torch", *NATIVE])
def test_where_each_kind_rounds(backend: str) -> None:
    """In bfloat16 a second rounding, or a weight rounded with its 1, moves a share of the bits."""
    x, weight = draw(400, D, dtype=torch.bfloat16), draw(D, dtype=torch.bfloat16)
    exact = {kind: pk.frozen_norm(x.double(), weight.double(), kind=kind) for kind in KINDS}
    xhat = pk.frozen_norm(x.double()).to(torch.bfloat16).float()
    want = {
        "rms": (xhat * weight.float()).to(torch.bfloat16),
        "rms_once": exact["rms_once"].to(torch.bfloat16),
        "rms_plus_one": exact["rms_plus_one"].to(torch.bfloat16),
        "layer": exact["layer"].to(torch.bfloat16),
    }
    for kind, right in want.items():
        got = pk.frozen_norm(x, weight, kind=kind, backend=backend)
        assert float((got == right).float().mean()) > 0.995, kind
    assert float((want["rms"] == want["rms_once"]).float().mean()) < 0.9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["torch", *NATIVE])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(kind: str, backend: str, value: float) -> None:
    x = draw(6, D)
    x[2, 3] = value
    y = pk.frozen_norm(x, draw(D), kind=kind, backend=backend)
    assert bool(torch.isnan(y[2]).any())
    assert bool(torch.isfinite(y[[0, 1, 3, 4, 5]]).all())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros(kind: str) -> None:
    """The deviation is that of eps alone."""
    x = torch.zeros(3, D, requires_grad=True)
    y = pk.frozen_norm(x, draw(D), kind=kind, eps=1e-4)
    assert torch.equal(y, torch.zeros(3, D))
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert bool(torch.isfinite(dx).all())
    assert dx.abs().max() > 50


# -- what its readers keep ------------------------------------------------------------------------


def linear(y: Tensor, factors: list[Tensor], **more: Any) -> Tensor:
    weight = more.pop("weight", None)
    weight = draw(OUT, D, seed=3) if weight is None else weight
    out: Tensor = pk.lowrank_linear(y, factors[0], [factors[1]], [weight], **more)[0]
    return out


def mlp(y: Tensor, factors: list[Tensor], **more: Any) -> Tensor:
    weights = [draw(OUT, D, seed=3), draw(OUT, D, seed=4), draw(D, OUT, seed=5)]
    down, up, other_down, other_up = factors
    downs, ups = [down, None, other_down], [up, None, other_up]
    return pk.gated_mlp(y, weights, downs=downs, ups=ups, **more)


def factors_of(reader: Callable[..., Tensor]) -> list[Tensor]:
    found = [draw(R, D, seed=6), draw(OUT, R, seed=7)]
    if reader is mlp:
        found += [draw(R, OUT, seed=8), draw(D, R, seed=9)]
    return [t.requires_grad_() for t in found]


READERS = [
    pytest.param(linear, {}, id="linear"),
    pytest.param(linear, {"dropout": 0.25, "dropout_at": "input"}, id="dropout"),
    pytest.param(mlp, {"dropout": 0.25}, id="mlp"),
    pytest.param(mlp, {"recompute": True}, id="mlp-recompute"),
]


def kept(call: Callable[[], Tensor]) -> tuple[Tensor, dict[int, int]]:
    """What a call gives, and bytes by storage of what it keeps."""
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call()
    return out, seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("reader", "options"), READERS)
def test_a_reader_keeps_x_and_gives_the_same_bits(
    reader: Callable[..., Tensor], options: dict[str, Any], kind: str
) -> None:
    x, weight, factors = draw(N, D).requires_grad_(), draw(D), factors_of(reader)
    bias = draw(D, seed=2) if kind == "layer" else None
    found, sizes = [], []
    for recompute in (False, True):

        def call(recompute: bool = recompute) -> Tensor:
            torch.manual_seed(0)
            y = pk.frozen_norm(x * 1, weight, bias, kind=kind, eps=0.1, recompute=recompute)
            return reader(y, factors, **options)

        out, seen = kept(call)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), [x, *factors])])
        sizes.append(sum(seen.values()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    vectors = (2 if bias is not None else 1) * D * 4  # the bias is kept in order to form y again
    assert sizes[0] - sizes[1] == N * D * 4 - (vectors - D * 4)


def _written(y: Tensor) -> Tensor:
    with torch.no_grad():
        y.mul_(2)
    return y


def _in_place(y: Tensor) -> Tensor:
    return y.mul_(2)


def _viewed(y: Tensor) -> Tensor:
    return y.view(2, -1, D).flatten(0, 1)


def _cut(y: Tensor) -> Tensor:
    return y.detach().requires_grad_()


@pytest.mark.parametrize("backend", ["torch", *NATIVE])
def test_the_result_may_be_written_in_place(backend: str) -> None:
    """As that of the module that it stands for."""
    for shape in ((N, D), (2, 3, D)):
        x, weight = draw(*shape).requires_grad_(), draw(D)
        (want,) = torch.autograd.grad((2 * pk.frozen_norm(x, weight)).square().sum(), x)
        y = pk.frozen_norm(x, weight, backend=backend).mul_(2)
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], want)


@pytest.mark.parametrize("change", [_written, _in_place, _viewed, _cut])
@pytest.mark.parametrize(("reader", "options"), READERS)
def test_another_tensor_is_kept_as_it_is(
    reader: Callable[..., Tensor], options: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> None:
    """A result that was written, or that is not the norm's own, is not formed again."""
    x, weight, factors = draw(N, D).requires_grad_(), draw(D), factors_of(reader)
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        y = change(pk.frozen_norm(x * 1, weight, recompute=recompute))
        out = reader(y, factors, **options)
        found.append(torch.autograd.grad(out.square().sum(), factors))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("when", ["before", "after"])
def test_x_may_not_be_written(when: str) -> None:
    """Before it is read: y is kept, and the norm's own backward refuses. After: torch refuses."""
    x, factors = draw(N, D).requires_grad_(), factors_of(linear)
    rows = x * 1
    y = pk.frozen_norm(rows, draw(D), recompute=True)
    if when == "before":
        with torch.no_grad():
            rows.mul_(2)
        want = torch.autograd.grad(linear(y.detach(), factors).sum(), factors)
        got = torch.autograd.grad(linear(y, factors).sum(), factors)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        return
    out = linear(y, factors)
    with torch.no_grad():
        rows.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), factors)


def test_a_weight_may_not_be_written_after() -> None:
    x, factors, weight = draw(N, D).requires_grad_(), factors_of(linear), draw(D)
    out = linear(pk.frozen_norm(x, weight, recompute=True), factors)
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), factors)


def test_gradients_of_the_result_itself_and_hooks_on_it() -> None:
    """Readers change what is kept; the gradient takes its way through the result."""
    x, factors = draw(N, D).requires_grad_(), factors_of(linear)
    seen = []
    for recompute in (False, True):
        y = pk.frozen_norm(x, draw(D), recompute=recompute)
        y.retain_grad()
        y.register_hook(lambda g: 2 * g)
        (linear(y, factors).sum() + y.square().sum()).backward()
        assert y.grad is not None
        assert x.grad is not None
        seen.append((y.grad.clone(), x.grad.clone()))
        x.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("alive", [False, True])
def test_under_checkpointing(reentrant: bool, alive: bool) -> None:
    """Where the norm's input lives on, and where it is a value on the way that nobody holds."""
    x, weight = draw(N, D).requires_grad_(), draw(D)
    factors = factors_of(linear)
    found = []

    def block(x: Tensor, recompute: bool) -> Tensor:
        rows = x * 2
        y = pk.frozen_norm(rows if alive else x * 2, weight, recompute=recompute)
        return rows + linear(y, factors, weight=draw(D, D, seed=3))

    def attach(recompute: bool, again: bool) -> list[Tensor]:
        if again:
            out = checkpoint(block, x, recompute, use_reentrant=reentrant)
        else:
            out = block(x, recompute)
        for leaf in (x, *factors):
            leaf.grad = None
        out.square().sum().backward()
        return [leaf.grad.clone() for leaf in (x, *factors) if leaf.grad is not None]

    factors[1] = draw(D, R, seed=7).requires_grad_()
    for recompute, again in ((False, False), (True, False), (True, True)):
        found.append(attach(recompute, again))
    for other in found[1:]:
        assert len(other) == 3
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_node_keeps_no_input_alive() -> None:
    """Under hooks that take saved tensors away nothing of size N D is left but the result."""
    x, weight = draw(4096, 256).requires_grad_(), draw(256)
    places: list[Tensor] = []

    def pack(t: Tensor) -> int:
        places.append(t.detach().clone())
        return len(places) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda k: places[k]):
        rows = x * 1
        gone = torch.utils.weak.TensorWeakRef(rows)
        y = pk.frozen_norm(rows, weight, recompute=True)
        del rows
        assert gone() is None
        out = linear(y, [draw(R, 256).requires_grad_(), draw(OUT, R)], weight=draw(OUT, 256))
        del y
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert bool(torch.isfinite(dx).all())


def test_backward_twice_and_second_derivatives() -> None:
    x, factors = draw(N, D).requires_grad_(), factors_of(linear)
    out = linear(pk.frozen_norm(x, draw(D), recompute=True), factors)
    one = torch.autograd.grad(out.sum(), [x, *factors], retain_graph=True)
    two = torch.autograd.grad(out.sum(), [x, *factors], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(
            torch.autograd.grad(out.sum(), x, create_graph=True)[0].sum(), factors[0]
        )


def test_compiled_calls_keep_what_the_compiler_decides() -> None:
    x, weight, factors = draw(N, D).requires_grad_(), draw(D), factors_of(linear)
    base = draw(OUT, D, seed=3)

    def call(x: Tensor) -> Tensor:
        return linear(pk.frozen_norm(x, weight, recompute=True), factors, weight=base)

    want = torch.autograd.grad(call(x).sum(), [x, *factors])
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x).sum(), [x, *factors])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


# -- what it refuses ------------------------------------------------------------------------------


def test_a_trained_weight_is_refused_by_name() -> None:
    x = draw(N, D)
    for name in ("weight", "bias"):
        given: dict[str, Any] = {"weight": draw(D), "bias": draw(D)}
        given[name] = nn.Parameter(draw(D))
        with pytest.raises(ValueError, match=f"{name}: want a frozen tensor"):
            pk.frozen_norm(x, kind="layer", **given)
        with torch.no_grad():
            pk.frozen_norm(x, kind="layer", **given)


def test_a_bias_goes_with_layer_alone() -> None:
    with pytest.raises(ValueError, match="bias: want None with kind='rms'"):
        pk.frozen_norm(draw(N, D), draw(D), draw(D))


def test_a_deep_copy_of_what_was_read_is_no_result() -> None:
    x = draw(N, D).requires_grad_()
    y = pk.frozen_norm(x, draw(D), recompute=True)
    other = copy.deepcopy(y.detach()).requires_grad_()
    _, seen = kept(lambda: linear(other, factors_of(linear)))
    assert other.untyped_storage().data_ptr() in seen
