"""The wrapper around a frozen linear: what it shares, when it reads a weight, and dtypes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from petal_kernels.nn import FrozenLinear, frozen_linear, frozen_lowrank
from petal_kernels.nn.frozen_linear import weight_is_plain, why_not_plain, why_not_readable
from petal_kernels.ops.lowrank_linear import lowrank_linear


class Quantised(nn.Module):
    """Stands for a base without a readable weight."""

    def __init__(self, linear: nn.Linear, out_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.codes = nn.Buffer(linear.weight.detach().clone())
        self.out_dtype = out_dtype

    @property
    def weight(self) -> Tensor:
        raise AssertionError("the weight of a special base was read")

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.codes.T.to(x.dtype)
        return y if self.out_dtype is None else y.to(self.out_dtype)


def _special(kind: str) -> nn.Module:
    torch.manual_seed(0)
    base: nn.Module = nn.Linear(6, 5).requires_grad_(False)
    if kind == "quantised":
        assert isinstance(base, nn.Linear)
        base = Quantised(base)
    elif kind == "hooked":
        base.register_forward_hook(lambda module, args, output: output * 2)
    elif kind == "forward replaced":
        base.forward = lambda x, f=base.forward: f(x) + 1
    elif kind == "parametrised":
        nn.utils.parametrizations.weight_norm(base)
        base.requires_grad_(False)
    elif kind == "subclass":
        base.__class__ = type("Special", (nn.Linear,), {})
    elif kind == "partitioned":
        base.weight.ds_id = 1  # type: ignore[union-attr]
    return base


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """What the operator was given, call by call."""
    calls: list[set[str]] = []
    operator = lowrank_linear

    def watching(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        calls.append({k for k in ("weights", "base", "hidden") if kwargs.get(k) is not None})
        return operator(*args, **kwargs)

    monkeypatch.setattr(frozen_linear, "lowrank_linear", watching)
    return calls


def _parts(outputs: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    down = torch.randn(3, 6, generator=generator).to(dtype)
    ups = [torch.randn(5, 3, generator=generator).to(dtype) for _ in range(outputs)]
    return down.requires_grad_(), [up.requires_grad_() for up in ups]


KINDS = ["quantised", "hooked", "forward replaced", "parametrised", "subclass", "partitioned"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_special_base_is_called_and_never_read(kind: str, given: list[set[str]]) -> None:
    special, plain = _special(kind), _special("plain")
    assert not weight_is_plain(special)
    assert weight_is_plain(plain)
    assert why_not_plain(special).startswith("base")
    down, ups = _parts()
    x = torch.randn(4, 2, 6)
    outs = frozen_lowrank(x, [special, plain], down, ups)
    assert given == [{"base"}]
    for out, base, up in zip(outs, (special, plain), ups, strict=True):
        torch.testing.assert_close(out, base(x) + x @ down.T @ up.T)


def test_a_special_base_with_another_output_dtype(given: list[set[str]]) -> None:
    base = Quantised(nn.Linear(6, 5), out_dtype=torch.bfloat16)
    down, ups = _parts(1)
    x = torch.randn(4, 6)
    (out,) = frozen_lowrank(x, [base], down, ups)
    assert out.dtype == torch.bfloat16
    assert given == [set()]
    torch.testing.assert_close(out, base(x) + (x @ down.T @ ups[0].T).bfloat16())


def test_a_plain_base_is_fused_and_gets_no_gradient(given: list[set[str]]) -> None:
    bases = [_special("plain") for _ in range(2)]
    down, ups = _parts()
    x = torch.randn(4, 6, requires_grad=True)
    outs = frozen_lowrank(x, bases, down, ups)
    assert given == [{"weights"}]
    loss: Any = sum(out.sum() for out in outs)
    loss.backward()
    assert x.grad is not None
    assert down.grad is not None
    assert bases[0].weight.grad is None


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_a_base_that_is_trained_gets_its_gradient(which: str, given: list[set[str]]) -> None:
    base = _special("plain")
    getattr(base, which).requires_grad_(True)
    down, ups = _parts(1)
    x = torch.randn(4, 6)
    (out,) = frozen_lowrank(x, [base], down, ups)
    out.sum().backward()
    want = torch.full((5,), 4.0) if which == "bias" else x.sum(0).expand(5, 6)
    torch.testing.assert_close(getattr(base, which).grad, want)
    assert given == [{"base"}]


def test_a_shared_projection_replaces_the_down_projection(given: list[set[str]]) -> None:
    bases = [_special("plain"), _special("plain")]
    down, ups = _parts()
    x = torch.randn(4, 6)
    hidden = (x @ down.T).detach().requires_grad_()
    outs = frozen_lowrank(x, bases, down, ups, hidden=hidden)
    for out, want in zip(outs, frozen_lowrank(x, bases, down, ups), strict=True):
        torch.testing.assert_close(out, want)
    assert given[0] == {"weights", "hidden"}
    loss: Any = sum(out.sum() for out in outs)
    loss.backward()
    assert hidden.grad is not None
    assert down.grad is None
    frozen_lowrank(x, [_special("quantised"), bases[0]], down, ups, hidden=hidden)
    assert given[-1] == {"base", "hidden"}


@pytest.mark.parametrize("shape", [(6,), (0, 6), (2, 0, 6), (3, 6), (2, 2, 2, 6)], ids=str)
def test_any_leading_dims(shape: tuple[int, ...]) -> None:
    base = _special("plain")
    down, ups = _parts(1)
    x = torch.randn(shape)
    (out,) = frozen_lowrank(x, [base], down, ups)
    torch.testing.assert_close(out, base(x) + x @ down.T @ ups[0].T)


def test_a_slice_of_the_sequence() -> None:
    base = _special("plain")
    down, ups = _parts(1)
    x = torch.randn(3, 8, 6)[:, 2:5]
    (out,) = frozen_lowrank(x, [base], down, ups)
    torch.testing.assert_close(out, base(x) + x @ down.T @ ups[0].T)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_decides_the_dtype(base_dtype: torch.dtype, autocast: torch.dtype) -> None:
    base = _special("plain").to(base_dtype)
    down, ups = _parts(1)
    x = torch.randn(4, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=autocast):
        (out,) = frozen_lowrank(x, [base], down, ups)
    assert out.dtype == autocast
    out.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert down.grad is not None
    assert down.grad.dtype == torch.float32
    exact = x @ base.weight.float().T + base.bias.float() + x @ down.T @ ups[0].T  # type: ignore[operator]
    torch.testing.assert_close(out.float(), exact, rtol=3e-2, atol=6e-2)


def test_only_one_narrow_copy_of_x_is_saved_under_autocast() -> None:
    bases = [_special("plain").to(torch.bfloat16) for _ in range(3)]
    down, ups = _parts(3)
    x = torch.randn(64, 6, requires_grad=True)
    saved: dict[int, Tensor] = {}
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        ),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        frozen_lowrank(x, bases, down, ups, dropout=0.1, training=True)
    rows = [t for t in saved.values() if t.dim() == 2 and t.shape[0] == 64]
    assert sorted((t.shape[1], t.dtype) for t in rows) == [(3, torch.bfloat16), (6, torch.bfloat16)]


def test_the_wrapper_shares_everything_with_its_base() -> None:
    base: Any = _special("plain")
    wrapper = FrozenLinear(base)
    assert wrapper.weight is base.weight
    assert list(wrapper.state_dict()) == ["weight", "bias"]
    wrapper.double()
    assert base.weight.dtype == torch.float64
    assert wrapper.weight is base.weight
    wrapper.load_state_dict({"weight": torch.ones(5, 6), "bias": torch.zeros(5)})
    assert torch.equal(base.weight, torch.ones(5, 6, dtype=torch.float64))
    wrapper.eval()
    assert not base.training
    assert (wrapper.in_features, wrapper.out_features) == (6, 5)
    other = copy.deepcopy(wrapper)
    assert other.weight is other.base.weight
    assert other.weight is not base.weight


def test_a_special_base_keeps_its_state_dict_form() -> None:
    base = Quantised(nn.Linear(6, 5))
    calls = []
    save = base._save_to_state_dict
    base._save_to_state_dict = lambda *a: (calls.append("save"), save(*a))  # type: ignore[method-assign, assignment, func-returns-value]
    wrapper = FrozenLinear(base)
    assert list(wrapper.state_dict()) == ["codes"]
    assert calls == ["save"]


def test_a_class_of_the_same_name_is_not_plain() -> None:
    """The kind: a library's own Linear, whose forward is another one."""
    plain = nn.Linear(4, 5)
    plain.__class__ = type("Linear", (nn.Linear,), {"forward": lambda self, x: 2 * x})
    assert not weight_is_plain(plain)
    assert "not a plain linear" in why_not_readable(plain)
