"""A and B taken out of the base's weight: what they are, the update without writing the base, and
what that keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petal_kernels._runtime import philox
from petal_kernels.nn import DoRALinear, LoRALinear
from petal_kernels.nn import lora as module
from petal_kernels.nn.lora_init import TAKEN, is_taken, taken
from tests.nn.test_lora import (
    BASES,
    D,
    Doubling,
    N,
    O,
    P,
    R,
    gradients,
    kept,
    matrix,
    one_call,
    rows,
    size,
)

INITS = ("pissa", "pissa_niter_20", "olora")


def built(
    init: str = "pissa", kind: str = "linear", of: torch.dtype = torch.float64, **more: Any
) -> LoRALinear:
    """Of a base in the dtype `of`, with A and B moved since."""
    torch.manual_seed(0)
    base = BASES[kind](D, O).to(of).requires_grad_(False)
    lora = LoRALinear(base, R, alpha=3.0, init=init, **more)
    lora = lora.double() if of == torch.float64 else lora
    with torch.no_grad():
        for parameter in (lora.down, lora.up):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return lora


def formula(lora: LoRALinear, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """PEFT's: the base's weight without what was taken, formed and rounded to no other dtype."""
    first = lora.first_up.to(x) @ lora.first_down.to(x)  # type: ignore[union-attr]
    left = matrix(lora.base).to(x) - lora.scale * first
    inner = x if mask is None else x * mask.reshape(x.shape)
    update = F.linear(F.linear(inner, lora.down.to(x)), lora.up.to(x))
    bias: Any = lora.base.bias
    return F.linear(x, left, None if bias is None else bias.to(x)) + lora.scale * update


# -- what is taken --------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
def test_pissa_takes_the_largest_singular_values_half_on_each_side(scale: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(O, D, dtype=torch.float64)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    best = left[:, :R] @ torch.diag(values[:R]) @ right[:R]
    down, up = taken(weight, R, "pissa", scale)
    assert (down.shape, up.shape) == ((R, D), (O, R))
    torch.testing.assert_close(scale * up @ down, best)
    torch.testing.assert_close(down @ down.mT, torch.diag(values[:R] / scale))
    torch.testing.assert_close(up.mT @ up, torch.diag(values[:R] / scale))
    quick = taken(weight, R, "pissa_niter_400", scale)
    torch.testing.assert_close(scale * quick[1] @ quick[0], best, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, -3.0])
def test_olora_takes_the_first_columns_of_a_qr(scale: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(O, D, dtype=torch.float64)
    down, up = taken(weight, R, "olora", scale)
    torch.testing.assert_close(up.mT @ up, torch.eye(R, dtype=torch.float64))
    # Of the first columns of the weight these are all: R is triangular.
    torch.testing.assert_close((up @ down)[:, :R], weight[:, :R])
    assert not down.tril(-1).abs().gt(1e-12).any()
    torch.testing.assert_close(up.mT @ weight, down)


def test_iterations_are_those_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = torch.svd_lowrank

    def counted(weight: Tensor, q: int, niter: int) -> Any:
        seen.append(niter)
        return real(weight, q=q, niter=niter)

    monkeypatch.setattr(torch, "svd_lowrank", counted)
    for name in ("pissa_niter_0", "pissa_niter_7", "pissa"):
        taken(torch.randn(O, D), R, name, 1.0)
    assert seen == [0, 7]


_NO_NUMBERS = ["pissa_niter_" + end for end in ("", "-1", "1.5", "\u0663", "1" + "0" * 9)]


@pytest.mark.parametrize("name", [*_NO_NUMBERS, "olora ", "PiSSA", "eva"])
def test_other_names_are_refused(name: str) -> None:
    assert not is_taken(name)
    with pytest.raises(ValueError, match=r"^init: want one of \(True, False, 'gaussian', 'pissa',"):
        LoRALinear(nn.Linear(D, O), R, init=name)
    assert "pissa_niter_N" in TAKEN


@pytest.mark.parametrize("cls", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("init", INITS)
def test_step_0_is_the_base_which_nobody_wrote(
    init: str, kind: str, dtype: torch.dtype, cls: type[LoRALinear]
) -> None:
    base = BASES[kind](D, O).to(dtype).requires_grad_(False)
    weight: Any = base.weight
    before, version = weight.clone(), weight._version
    lora, x = cls(base, R, init=init), rows(dtype)
    assert (weight._version, torch.equal(weight, before)) == (version, True)
    assert torch.equal(lora.down, lora.first_down)  # type: ignore[arg-type]
    assert torch.equal(lora.up, lora.first_up)  # type: ignore[arg-type]
    close = 3e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(lora(x), base(x), rtol=close, atol=close)


# -- the update -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, P])
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("init", INITS)
def test_values_and_gradients_are_those_of_a_written_base(
    init: str, kind: str, hooked: bool, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout of what A and B hold alone."""
    lora, x = built(init, kind, dropout=dropout).train(), rows()
    if hooked:
        lora.base.register_forward_hook(lambda *given: None)
    with one_call(monkeypatch) as calls:
        got = lora(x)
    # One call; where a base is called and not read, another takes the frozen half out.
    assert len(calls) == (2 if dropout else 1)
    mask = philox.scaled_masks(calls[-1]["rng"], dropout, 1, N, D, x.dtype)[0] if dropout else None
    want = formula(lora, x, mask)
    leaves = (x, lora.down, lora.up)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(got, *leaves), gradients(want, *leaves))
    torch.testing.assert_close(lora.eval()(x), formula(lora, x))


@pytest.mark.parametrize("dropout", [0.0, P])
def test_a_bias_in_place_of_the_own_one_is_trained(dropout: float) -> None:
    lora, x = built(dropout=dropout).train(), rows()
    bias = torch.randn(O, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    got = lora(x, bias)
    torch.manual_seed(3)
    torch.testing.assert_close(got, lora(x) - lora.base.bias + bias)
    torch.testing.assert_close(gradients(got, bias)[0].shape, bias.shape)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", BASES)
def test_the_compute_dtype_is_xs(kind: str, dtype: torch.dtype, adapter: torch.dtype) -> None:
    lora, x = built("pissa", kind, dtype, dtype=adapter), rows(dtype)
    y = lora(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert (lora.down.grad.dtype, lora.up.grad.dtype) == (adapter, adapter)  # type: ignore[union-attr]
    exact = formula(lora.double(), x.detach().double())
    error = float((y.double() - exact).detach().norm() / exact.detach().norm())
    assert error < (3e-2 if torch.bfloat16 in (dtype, adapter) else 3e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_x_is_kept_with_both_middles(dtype: torch.dtype) -> None:
    lora, x = built("pissa", "linear", dtype).train(), rows(dtype)
    found = kept(lambda: lora(x), *lora.parameters(), *lora.buffers())
    factors = 4 * 2 * R * (D + O)  # in float32, side by side
    assert size(found) == dtype.itemsize * (N * D + N * 2 * R) + factors
    lora.dropout = P
    found = kept(lambda: lora(x), *lora.parameters(), *lora.buffers())
    assert size(found) == dtype.itemsize * (N * D + N * 2 * R) + 16


def test_operands_are_of_twice_the_rank() -> None:
    lora, x = built(of=torch.float32, dropout=P), rows(torch.float32)
    why = lora.train().operands(x.dtype, x.device)
    assert why == "dropout leaves out what was taken from the base"
    found = lora.eval().operands(x.dtype, x.device)
    assert isinstance(found, module.Operands)
    assert found.down is not None
    assert found.up is not None
    assert (found.down.shape, found.up.shape) == ((2 * R, D), (O, 2 * R))
    torch.testing.assert_close(F.linear(x, lora.delta(torch.float32)), lora(x) - lora.base(x))


# -- state ----------------------------------------------------------------------------------------


def test_first_values_are_stored_and_no_parameters() -> None:
    lora = built()
    names = {"down", "up", "first_down", "first_up", "base.weight", "base.bias"}
    assert set(lora.state_dict()) == names
    assert {name for name, _ in lora.named_parameters(recurse=False)} == {"down", "up"}
    other = LoRALinear(lora.base, R, alpha=3.0).double()
    other.reserve_first()
    other.load_state_dict(lora.state_dict())
    x = rows()
    assert torch.equal(other(x), lora(x))
    other.reset_parameters(True)
    assert set(other.state_dict()) == {"down", "up", "base.weight", "base.bias"}
    torch.testing.assert_close(other(x), other.base(x))
    other.reset_parameters("olora")
    torch.testing.assert_close(other(x), other.base(x))


def _empty() -> nn.Module:
    return nn.Linear(D, O, device="meta")


def _quantised() -> nn.Module:
    base = nn.Linear(D, O)
    base.weight = nn.Parameter(torch.ones(O, D, dtype=torch.int8), requires_grad=False)
    return base


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(
    ("kind", "why"), [(_empty, "has no values"), (_quantised, "is int8 of shape")]
)
def test_a_base_that_cannot_be_decomposed_is_refused(
    kind: Callable[[], nn.Module], why: str, init: str
) -> None:
    match = f"^init: want a base whose weight '{init}' can decompose: base weight {why}"
    with pytest.raises(ValueError, match=match):
        LoRALinear(kind(), R, init=init)


def test_ranks_and_scales_that_have_no_roots_are_refused() -> None:
    for init in INITS:
        with pytest.raises(ValueError, match=f"^r: want at most {D}, .* got {D + 1}"):
            LoRALinear(nn.Linear(D, O), D + 1, init=init)
        LoRALinear(nn.Linear(D, O), D, init=init)
    for alpha in (0.0, -1.0):
        with pytest.raises(ValueError, match=r"^alpha: want a number > 0 with init='pissa'"):
            LoRALinear(nn.Linear(D, O), R, alpha=alpha, init="pissa")


def test_another_class_of_linears_is_called() -> None:
    torch.manual_seed(0)
    lora = LoRALinear(Doubling(D, O), R, init="pissa")
    x = rows(torch.float32)
    torch.testing.assert_close(lora(x), lora.base(x), rtol=1e-4, atol=1e-5)
