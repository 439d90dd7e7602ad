"""DoRALinear: the formula, its norms without a second weight, what is kept, bases that lend their
weight and bases that cannot."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from petal_kernels.nn import DoRALinear, base_weight, dora
from tests.nn.test_lora import BASES, D, N, O, P, R, gradients, kept, matrix, rows, size


def built(kind: str = "linear", dtype: torch.dtype = torch.float64, **more: Any) -> DoRALinear:
    torch.manual_seed(0)
    base = BASES[kind](D, O).to(dtype).requires_grad_(False)
    settings: dict[str, Any] = {"alpha": 3.0, "init": False, "dtype": torch.float32}
    lora = DoRALinear(base, R, **(settings | more))
    lora = lora.double() if dtype == torch.float64 else lora
    with torch.no_grad():
        for parameter in (lora.down, lora.up, lora.magnitude):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return lora


def formula(lora: DoRALinear, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """In plain torch with W + s B A formed; masks are drawn as torch's dropout draws them."""
    weight, own = matrix(lora.base).to(x), lora.base.bias if bias is None else bias
    down, up, magnitude = (p.to(x) for p in (lora.down, lora.up, lora.magnitude))
    whole = weight + lora.scale * up @ down
    gain = magnitude / whole.detach().norm(dim=1)
    inner = F.dropout(x, lora.dropout, lora.training)
    y = F.linear(x, weight) - F.linear(inner, weight) + gain * F.linear(inner, whole)
    return y if own is None else y + own.to(x)


@pytest.mark.parametrize("dropout", [0.0, P])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", BASES)
def test_values_and_gradients_are_the_formulas(
    kind: str, dtype: torch.dtype, dropout: float
) -> None:
    lora, x = built(kind, dtype, dropout=dropout).train(), rows(dtype)
    torch.manual_seed(4)
    got = lora(x)
    torch.manual_seed(4)
    want = formula(lora, x)
    leaves = (x, lora.down, lora.up, lora.magnitude)
    tolerance = 1e-12 if dtype == torch.float64 else 5e-5
    close: Any = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(got, want, **close)
    torch.testing.assert_close(gradients(got, *leaves), gradients(want, *leaves), **close)
    torch.testing.assert_close(lora.eval()(x), formula(lora, x), **close)


@pytest.mark.parametrize("dropout", [0.0, P])
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("kind", BASES)
def test_a_trained_bias_stays_out_of_the_gain(kind: str, hooked: bool, dropout: float) -> None:
    lora, x = built(kind, dropout=dropout).train(), rows()
    bias = torch.randn(O, dtype=torch.float64, requires_grad=True)
    if hooked:
        lora.base.register_forward_hook(lambda *given: None)
    if lora.base._parameters["bias"] is None:
        with pytest.raises(ValueError, match="bias: want a base with a bias of its own"):
            lora(x, bias)
        return
    torch.manual_seed(4)
    got = lora(x, bias)
    torch.manual_seed(4)
    want = formula(lora, x, bias)
    torch.testing.assert_close(got, want)
    leaves = (x, bias, lora.magnitude)
    torch.testing.assert_close(gradients(got, *leaves), gradients(want, *leaves))


def test_only_some_of_the_leaves_are_trained() -> None:
    lora, x = built(), rows()
    want = gradients(formula(lora, x), x, lora.magnitude)
    lora.down.requires_grad_(False), lora.up.requires_grad_(False)
    torch.testing.assert_close(gradients(lora(x), x, lora.magnitude), want)
    lora.magnitude.requires_grad_(False)
    torch.testing.assert_close(gradients(lora(x), x), want[:1])
    assert not lora(x.detach()).requires_grad
    bias = torch.randn(O, dtype=torch.float64, requires_grad=True)
    got, wanted = (
        gradients(form(x.detach(), bias), bias) for form in (lora, partial(formula, lora))
    )
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("lead", [(), (0,), (2, 3, 4)], ids=str)
def test_any_leading_dims(lead: tuple[int, ...]) -> None:
    lora, x = built(), torch.randn(*lead, D, dtype=torch.float64, requires_grad=True)
    got, want = lora(x), formula(lora, x)
    torch.testing.assert_close(got, want)
    leaves = (x, lora.magnitude)
    torch.testing.assert_close(gradients(got, *leaves), gradients(want, *leaves))


def test_gradcheck_and_a_second_derivative() -> None:
    lora, x = built(), rows(torch.float64, 3)
    lora.down.requires_grad_(False), lora.up.requires_grad_(False)  # the norm is constant to them

    def run(x: Tensor, magnitude: Tensor) -> Tensor:
        return torch.func.functional_call(lora, {"magnitude": magnitude}, (x,))

    assert torch.autograd.gradcheck(run, (x, lora.magnitude))
    loss = lora(x).square().sum()
    (dm,) = torch.autograd.grad(loss, lora.magnitude, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"once_differentiable.*second derivative"):
        torch.autograd.grad(dm.sum(), x)


def test_backward_twice_gives_the_same_bits() -> None:
    lora, x = built(dtype=torch.float32), rows(torch.float32)
    y = lora(x).sum()
    first, second = (
        torch.autograd.grad(y, [x, lora.magnitude, lora.down, lora.up], retain_graph=True)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_is_not_finite_reaches_the_output() -> None:
    lora, x = built(), rows().detach()
    with torch.no_grad():
        lora.magnitude[3] = float("nan")
        lora.up[5, 0] = float("inf")
    bad = ~torch.isfinite(lora(x)).all(dim=(0, 1))
    assert bad.nonzero().flatten().tolist() == [3, 5]


@pytest.mark.parametrize("dropout", [0.0, P])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_errors_are_at_most_those_of_plain_torch(dtype: torch.dtype, dropout: float) -> None:
    lora, x = built("linear", dtype, dropout=dropout).train(), rows(dtype)
    leaves = (x, lora.magnitude, lora.down, lora.up)

    def run(form: Callable[[], Tensor]) -> list[Tensor]:
        torch.manual_seed(4)
        y = form()
        return [y, *gradients(y, *leaves)]

    exact = copy.deepcopy(lora).double()
    wide = [
        t.detach().double().requires_grad_() for t in (x, exact.magnitude, exact.down, exact.up)
    ]
    with torch.no_grad():
        for parameter, value in zip((exact.magnitude, exact.down, exact.up), wide[1:], strict=True):
            parameter.copy_(value)
    torch.manual_seed(4)
    mask = F.dropout(torch.ones_like(x), dropout, True).double()
    exact.dropout = 0.0
    weight, base = matrix(exact.base), exact.base
    whole = weight + exact.scale * exact.up @ exact.down
    gain = exact.magnitude / whole.detach().norm(dim=1)
    inner = wide[0] * mask
    y = F.linear(wide[0] - inner, weight, base.bias) + gain * F.linear(inner, whole)  # type: ignore[arg-type]
    want = [y, *gradients(y, wide[0], exact.magnitude, exact.down, exact.up)]
    ours, plain = run(lambda: lora(x)), run(lambda: formula(lora, x))
    for number, (a, b, c) in enumerate(zip(ours, plain, want, strict=True)):
        ours_off, plain_off = (float((t.double() - c).detach().norm()) for t in (a, b))
        assert ours_off <= (3 if number else 2) * plain_off + 1e-6, number


# -- norms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1 << 22, 3 * D + 1, 1])
@pytest.mark.parametrize("init", [False, "pissa"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", BASES)
def test_norms_are_those_of_the_sum(
    kind: str, dtype: torch.dtype, init: Any, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_weight, "BLOCK", block)
    lora = built(kind, dtype, init=init)
    update = lora.up.double() @ lora.down.double()
    if init:
        update = update - lora.first_up.double() @ lora.first_down.double()  # type: ignore[union-attr]
    want = (matrix(lora.base).double() + lora.scale * update).norm(dim=1)
    got = lora.norms()
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not got.requires_grad
    close = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(got.double(), want, rtol=close, atol=close)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lora.norms(), got)


def test_a_sum_of_products_in_blocks_is_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    lora, x = built(), rows()
    want = gradients(lora(x), lora.magnitude)
    monkeypatch.setattr(dora, "BLOCK", 5 * O)
    torch.testing.assert_close(gradients(lora(x), lora.magnitude), want)


def test_the_magnitude_begins_as_the_norms() -> None:
    for init in (True, False, "gaussian", "pissa", "olora"):
        lora = DoRALinear(nn.Linear(D, O), R, init=init)
        torch.testing.assert_close(lora.magnitude.detach(), lora.norms())
        x = rows(torch.float32)
        plain = lora.base(x) + F.linear(x, lora.scale * lora.up @ lora.down)
        if lora.first_down is not None and lora.first_up is not None:
            plain = plain - F.linear(x, lora.scale * lora.first_up @ lora.first_down)
        torch.testing.assert_close(lora(x), plain, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        lora.magnitude.zero_()
    lora.reset_parameters(False)
    torch.testing.assert_close(lora.magnitude.detach(), lora.norms())
    assert set(lora.state_dict()) == {"down", "up", "magnitude", "base.weight", "base.bias"}


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    seen: list[Tensor] = []
    real = dora._row_squares

    def counted(weight: Tensor, dtype: torch.dtype) -> Tensor:
        seen.append(weight)
        return real(weight, dtype)

    monkeypatch.setattr(dora, "_row_squares", counted)
    return seen


def test_the_weights_own_norms_are_kept_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    lora, x, seen = built(), rows(), _counted(monkeypatch)
    base: Any = lora.base
    before = len(seen)

    def calls() -> int:
        torch.testing.assert_close(lora(x), formula(lora, x))
        return len(seen) - before

    first = calls()
    assert first <= 1
    assert calls() == first
    with torch.no_grad():
        base.weight.mul_(1.5)
    assert calls() == first + 1
    base.weight.data = base.weight.data * 0.5
    assert calls() == first + 2
    base.load_state_dict({name: t + 0.1 for name, t in base.state_dict().items()})
    assert calls() == first + 3
    with torch.no_grad():
        lora.down.mul_(2.0), lora.up.data.mul_(0.5)
    assert calls() == first + 3
    lora.float(), lora.double()
    assert calls() == first + 4
    lora.reset_parameters(False)
    assert calls() == first + 4
    # Of another tensor nobody knows who writes it, and how: nothing is kept.
    base.weight = nn.Parameter(base.weight.detach() + 0.1, requires_grad=False)
    assert calls() == first + 5
    base.weight.data.mul_(2.0)
    assert calls() == first + 6


def test_norms_are_not_those_of_another_memory_at_the_same_address() -> None:
    """An allocator gives an address again at once: nothing but the values tells the two apart."""
    lora, x = built(), rows()
    base: Any = lora.base
    addresses = []
    for _ in range(20):
        torch.testing.assert_close(lora(x), formula(lora, x))
        addresses.append(base.weight.data_ptr())
        values = (base.weight.data * 1.5).tolist()
        base.weight.data = torch.empty(0, dtype=torch.float64)
        base.weight.data = torch.tensor(values, dtype=torch.float64)
    assert len(set(addresses)) < len(addresses), "no address came back: this tests nothing"


def test_norms_are_of_the_weight_as_its_strides_are_now() -> None:
    lora, x = built(), rows()
    base: Any = lora.base
    lora(x)
    base.weight.data = base.weight.data.as_strided((O, D), (1, O))
    torch.testing.assert_close(lora(x), formula(lora, x))


def test_the_memory_that_was_there_is_not_held() -> None:
    lora = built()
    lora(rows())
    base: Any = lora.base
    gone = StorageWeakRef(base.weight.untyped_storage())
    base.weight.data = base.weight.data * 2.0
    assert gone.expired()


def test_the_weight_that_was_there_is_not_held() -> None:
    lora = built()
    lora(rows())
    gone = weakref.ref(lora.base.weight)
    lora.base.weight = nn.Parameter(torch.ones(O, D, dtype=torch.float64), requires_grad=False)
    assert gone() is None


def test_what_is_kept_is_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in a state dict, nor in a copy or a pickle, nor bound to the mode of a call."""
    lora, x = built(), rows()
    with torch.inference_mode():
        want = lora(x).clone()
    y = lora(x)
    torch.testing.assert_close(y, want)
    y.sum().backward()
    assert "_held" in lora.__dict__
    copies: list[Any] = [copy.deepcopy(lora), pickle.loads(pickle.dumps(lora))]
    for other in copies:
        assert "_held" not in other.__dict__
        other(x)
        assert "_held" in other.__dict__
        with torch.no_grad():
            other.base.weight.mul_(2.0)
        torch.testing.assert_close(other(x), formula(other, x))
    assert not any("held" in name for name in lora.state_dict())
    # A weight that was made in inference mode has no version: nothing can be kept of it.
    with torch.inference_mode():
        base: Any = nn.Linear(D, O).double().requires_grad_(False)
        made = DoRALinear(base, R)
        base.weight.mul_(2.0)
        torch.testing.assert_close(made.norms(), base.weight.norm(dim=1))


def test_a_row_without_its_update_is_as_exact_as_the_docstring_says() -> None:
    """Roundings grow with what cancels: here a thousandth of the row is left."""
    base = nn.Linear(D, O, bias=False).requires_grad_(False)
    lora = DoRALinear(base, D, alpha=float(D), init=False)
    with torch.no_grad():
        lora.down.copy_(torch.eye(D)), lora.up.copy_(-0.999 * base.weight)
        want = (base.weight.double() + lora.up.double()).norm(dim=1)
        off = (lora.norms().double() / want - 1).abs().max()
    assert float(off) < 4 * torch.finfo(torch.float32).eps * 2e6


# -- what is allocated and kept -------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """The sizes of all that operations give."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for each in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in given:
                self.sizes.append((each.untyped_storage().nbytes(), str(func)))
        return out


@pytest.mark.parametrize("dropout", [0.0, P])
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_the_weights_size_is_made(
    dtype: torch.dtype, kind: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    width, out, r, n = 160, 192, 4, 8
    monkeypatch.setattr(base_weight, "BLOCK", width * 8)
    base = BASES[kind](width, out).to(dtype).requires_grad_(False)
    lora = DoRALinear(base, r, dropout=dropout, init=False)
    x = torch.randn(n, width).to(dtype).requires_grad_()
    lora.__dict__.pop("_held")
    with Watch() as watch:
        lora(x).float().square().sum().backward()
    assert watch.sizes
    largest, name = max(watch.sizes)
    # Of the widest what there is: rows of x and y, and B with its gradient, all in fp32.
    assert largest <= 4 * max(n * width, n * out, r * width, r * out, 8 * width), name
    assert largest < width * out * dtype.itemsize / 2


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_x_the_middle_and_the_product_are_kept(dtype: torch.dtype, kind: str) -> None:
    lora, x = built(kind, dtype).train(), rows(dtype)
    found = kept(lambda: lora(x), *lora.parameters())
    # And the gain's two factors, [O] in fp32: it itself, and the norms.
    assert size(found) == dtype.itemsize * (N * D + N * R + N * O) + 2 * 4 * O
    assert x.untyped_storage().data_ptr() in found


def test_with_dropout_what_is_left_of_x_is_kept_and_its_mask() -> None:
    lora, x = built("linear", torch.float32, dropout=P).train(), rows(torch.float32)
    found = kept(lambda: lora(x), *lora.parameters())
    assert size(found) == 4 * (2 * N * D + N * R + N * O) + 2 * 4 * O
    assert x.untyped_storage().data_ptr() not in found
