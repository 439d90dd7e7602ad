"""LoRALinear: the formula, what is kept for backward, dtypes, bases that are called, inits."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petal_kernels._runtime import philox
from petal_kernels.nn import LoRALinear
from petal_kernels.nn import lora as module

N, D, O, R = 24, 20, 28, 5  # noqa: E741
P = 0.25


def conv1d(width: int, out: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    made: nn.Module = Conv1D(out, width)
    nn.init.normal_(made.bias)  # type: ignore[arg-type]
    return made


BASES: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": nn.Linear,
    "no bias": lambda width, out: nn.Linear(width, out, bias=False),
    "conv1d": conv1d,
}


def built(kind: str = "linear", dtype: torch.dtype = torch.float64, **more: Any) -> LoRALinear:
    torch.manual_seed(0)
    base = BASES[kind](D, O).to(dtype).requires_grad_(False)
    lora = LoRALinear(base, R, alpha=3.0, dtype=torch.float32, init=False, **more)
    return lora.double() if dtype == torch.float64 else lora


def rows(dtype: torch.dtype = torch.float64, *lead: int) -> Tensor:
    return torch.randn(*(lead or (2, N // 2)), D).to(dtype).requires_grad_()


def matrix(base: Any) -> Tensor:
    weight: Tensor = base.weight
    return weight if isinstance(base, nn.Linear) else weight.t()


def formula(lora: LoRALinear, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """In plain torch."""
    dropped = x if mask is None else x * mask.reshape(x.shape)
    update = F.linear(F.linear(dropped, lora.down), lora.up)
    return F.linear(x, matrix(lora.base), lora.base.bias) + lora.scale * update  # type: ignore[arg-type]


@contextlib.contextmanager
def one_call(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The calls of the operator, whose masks can be drawn again."""
    calls: list[dict[str, Any]] = []
    real: Any = vars(module)["lowrank_linear"]

    def recorded(*args: Any, **kwargs: Any) -> Any:
        state = torch.tensor([77, len(calls)])
        calls.append({"args": args, "rng": state, **kwargs})
        return real(*args, **kwargs, rng=state)

    with monkeypatch.context() as patch:
        patch.setattr(module, "lowrank_linear", recorded)
        yield calls


def gradients(y: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(9)
    return torch.autograd.grad((y * torch.randn_like(y)).sum(), leaves)


@pytest.mark.parametrize("dropout", [0.0, P])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", BASES)
def test_values_and_gradients_are_the_formulas(
    kind: str, dtype: torch.dtype, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora, x = built(kind, dtype, dropout=dropout).train(), rows(dtype)
    with one_call(monkeypatch) as calls:
        got = lora(x)
    (call,) = calls
    weight: Any = lora.base.weight
    assert call["weights"][0].data_ptr() == weight.data_ptr()
    assert call["dropout_at"] == "input"
    mask = None
    if dropout:
        mask = philox.scaled_masks(call["rng"], dropout, 1, N, D, dtype)[0]
        assert 0 < int((mask == 0).sum()) < mask.numel()
    want = formula(lora, x, mask)
    leaves = (x, lora.down, lora.up)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    close: Any = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(got, want, **close)
    torch.testing.assert_close(gradients(got, *leaves), gradients(want, *leaves), **close)
    torch.testing.assert_close(lora.eval()(x), formula(lora, x), **close)


@pytest.mark.parametrize("lead", [(), (0,), (2, 3, 4)], ids=str)
def test_any_leading_dims(lead: tuple[int, ...]) -> None:
    lora, x = built(), rows(torch.float64, *lead) if lead else torch.randn(D, dtype=torch.float64)
    torch.testing.assert_close(lora(x), formula(lora, x))


@pytest.mark.parametrize("kind", BASES)
def test_a_bias_in_place_of_the_own_one_is_trained(kind: str) -> None:
    lora, x = built(kind), rows()
    if lora.base._parameters["bias"] is None:
        with pytest.raises(ValueError, match="bias: want a base with a bias of its own"):
            lora(x, torch.ones(O))
        return
    bias = torch.randn(O, dtype=torch.float64, requires_grad=True)
    want = formula(lora, x) - lora.base.bias + bias  # type: ignore[operator]
    for hooked in (False, True):
        if hooked:
            lora.base.register_forward_hook(lambda *given: None)
        got = lora(x, bias)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(gradients(got, bias), gradients(want, bias))


# -- what is kept for backward --------------------------------------------------------------------


def kept(forward: Callable[[], object], *parameters: Tensor) -> dict[int, Tensor]:
    """The tensors that a forward keeps for backward, by storage, without the parameters'."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    found: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        found.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return {pointer: t for pointer, t in found.items() if pointer not in own}


def size(found: dict[int, Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in found.values())


@pytest.mark.parametrize("dropout", [0.0, P])
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_x_itself_is_kept_with_the_middle_and_the_seed(
    dtype: torch.dtype, kind: str, dropout: float
) -> None:
    lora, x = built(kind, dtype, dropout=dropout).train(), rows(dtype)
    found = kept(lambda: lora(x), *lora.parameters())
    seed = 16 if dropout else 0
    saved = found[x.untyped_storage().data_ptr()]
    assert (saved.data_ptr(), saved.shape, saved.dtype) == (x.data_ptr(), x.shape, dtype)
    assert size(found) == dtype.itemsize * (N * D + N * R) + seed


@pytest.mark.parametrize("dropout", [0.0, P])
def test_q_k_and_v_of_one_x_keep_it_once(dropout: float) -> None:
    x, loras = rows(torch.bfloat16), [built("linear", torch.bfloat16) for _ in range(3)]
    for lora in loras:
        lora.train().dropout = dropout
    parameters = [p for lora in loras for p in lora.parameters()]
    found = kept(lambda: [lora(x) for lora in loras], *parameters)
    assert size(found) == 2 * (N * D + 3 * N * R) + 3 * (16 if dropout else 0)


def test_under_autocast_one_copy_of_x_is_kept() -> None:
    lora, x = built("linear", torch.float32, dropout=P).train(), rows(torch.float32)

    def forward() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            assert lora(x).dtype == torch.bfloat16

    found = kept(forward, *lora.parameters())
    # And of the base's weight the copy that autocast makes, for the gradient of x.
    assert size(found) == 2 * (N * D + N * R + D * O) + 16


# -- dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_compute_dtype_is_autocasts_or_xs(
    base: torch.dtype, adapter: torch.dtype, autocast: bool
) -> None:
    lora = built("linear", base).to(base)
    for parameter in (lora.down, lora.up):
        parameter.data = parameter.data.to(adapter)
    x = rows(base)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = lora(x)
    want = torch.bfloat16 if autocast and base != torch.float64 else base
    assert y.dtype == want
    y.sum().backward()
    assert (lora.down.grad.dtype, lora.up.grad.dtype) == (adapter, adapter)  # type: ignore[union-attr]
    assert x.grad is not None
    exact = formula(lora.double(), x.detach().double())
    error = float((y.double() - exact).detach().norm() / exact.detach().norm())
    narrow = torch.bfloat16 in (want, adapter)
    assert error < (2e-2 if narrow else 1e-6)


# -- bases that are called ------------------------------------------------------------------------


class Doubling(nn.Linear):
    """A linear of somebody else's."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _hooked() -> nn.Module:
    base = nn.Linear(D, O)
    base.register_forward_hook(lambda m, args, out: 2 * out)
    return base


def _wide() -> nn.Module:
    """Its output has another dtype than its input."""
    base = nn.Linear(D, O)
    base.register_forward_hook(lambda m, args, out: 2 * out.double())
    return base


@pytest.mark.parametrize("dropout", [0.0, P])
@pytest.mark.parametrize(
    "kind", [lambda: Doubling(D, O), _hooked, _wide], ids=["another class", "hooked", "wide"]
)
def test_a_special_base_is_called_and_its_output_updated(
    kind: Callable[[], nn.Module], dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    base = kind().requires_grad_(False)
    lora, x = (
        LoRALinear(base, R, alpha=3.0, init=False, dropout=dropout).train(),
        rows(torch.float32),
    )
    why = lora.operands(x.dtype, x.device)
    assert isinstance(why, str)
    assert why.startswith("base ")
    with one_call(monkeypatch) as calls:
        got = lora(x)
    assert len(calls) == 1
    mask = philox.scaled_masks(calls[0]["rng"], dropout, 1, N, D, x.dtype)[0] if dropout else None
    want = formula(lora, x, mask)
    want = want + F.linear(x, base.weight, base.bias)  # type: ignore[arg-type]
    torch.testing.assert_close(got.float(), want, rtol=2e-5, atol=2e-5)
    leaves = (x, lora.down, lora.up)
    pairs = zip(gradients(got, *leaves), gradients(want.to(got.dtype), *leaves), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_a_trained_base_gets_its_gradient() -> None:
    lora, x = built(), rows()
    weight: Any = lora.base.weight
    weight.requires_grad_(True)
    assert lora.operands(x.dtype, x.device) == "base is trained"
    leaves = (weight, lora.down, x)
    torch.testing.assert_close(
        gradients(lora(x), *leaves),
        gradients(formula(lora, x), *leaves),
    )
    with torch.no_grad():
        assert isinstance(lora.operands(x.dtype, x.device), module.Operands)


def test_operands_are_what_the_call_reads() -> None:
    lora, x = built("conv1d", torch.float32, dropout=P), rows(torch.float32)
    found = lora.train().operands(x.dtype, x.device)
    assert isinstance(found, module.Operands)
    assert found.weight.shape == (O, D)
    assert (found.bias, found.down, found.up) == (lora.base.bias, lora.down, lora.up)
    assert (found.scale, found.dropout) == (3.0 / R, P)
    assert found.gain is None
    evaluated = lora.eval().operands(x.dtype, x.device)
    assert isinstance(evaluated, module.Operands)
    assert evaluated.dropout == 0.0
    assert lora.operands(torch.bfloat16, x.device) == "base is float32, computed in bfloat16"


# -- initialisation, scale, merging ---------------------------------------------------------------


def test_the_scale_is_alpha_by_r_or_by_its_root() -> None:
    base = nn.Linear(D, O)
    assert LoRALinear(base, R).scale == 1.0
    assert LoRALinear(base, R, alpha=3).scale == 3 / R
    assert LoRALinear(base, R, alpha=3, rslora=True).scale == 3 / math.sqrt(R)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_inits_are_pefts(init: bool | str) -> None:
    torch.manual_seed(0)
    r, width, out = 16, 400, 300
    lora = LoRALinear(nn.Linear(width, out), r, init=init)
    down, up = lora.down.detach(), lora.up.detach()
    if init == "gaussian":
        assert float(down.std()) == pytest.approx(1 / r, rel=0.05)
    else:
        bound = 1 / math.sqrt(width)
        assert 0.95 * bound < float(down.abs().max()) <= bound
    if init is False:
        bound = 1 / math.sqrt(r)
        assert 0.95 * bound < float(up.abs().max()) <= bound
    else:
        assert not up.any()
    before = down.clone()
    lora.reset_parameters(init)
    assert not torch.equal(lora.down.detach(), before)


@pytest.mark.parametrize("init", ["eva", 1, 0, None, 1.0])
def test_other_inits_are_refused(init: Any) -> None:
    with pytest.raises(ValueError, match=r"init: want one of \(True, False, 'gaussian', 'pissa"):
        LoRALinear(nn.Linear(D, O), R, init=init)


@pytest.mark.parametrize("kind", BASES)
def test_delta_is_the_update_as_a_weight(kind: str) -> None:
    lora, x = built(kind), rows()
    want = formula(lora, x) - lora.base(x)
    torch.testing.assert_close(F.linear(x, lora.delta(torch.float64)), want)


@pytest.mark.parametrize("own", [True, False])
def test_the_base_is_a_child_if_it_is_wanted_as_one(own: bool) -> None:
    lora = LoRALinear(nn.Linear(D, O), R, own_base=own)
    names = {name.split(".")[0] for name, _ in lora.named_parameters()}
    assert names == ({"base", "down", "up"} if own else {"down", "up"})
    assert repr(lora).count("r=5, scale=1.0, dropout=0.0") == 1
