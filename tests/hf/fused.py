"""Models that PEFT has adapted, steps of them, and what ran."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.hf.method_families import FAMILIES
from tests.hf.methods import read

Values = dict[str, Tensor]


def adapted(model: nn.Module, **config: Any) -> Any:
    """`model` with PEFT's LoRA, whose updates are not zero and whose scale is no power of two."""
    peft = pytest.importorskip("peft")
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 5, "init_lora_weights": False}
    settings |= {"target_modules": "all-linear"} | config
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(model, peft.LoraConfig(**settings)).train()


def family(name: str, dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    """A tiny model of a family, adapted."""
    return adapted(FAMILIES[name].build().to(dtype), **config)


def batch(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    given = FAMILIES[name].batch(2, 0, 9)
    return {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in given.items()
    }


def step(model: Any, given: Mapping[str, Any], seed: int = 3) -> Values:
    """Loss, and the gradient of everything that is trained."""
    model.zero_grad()
    torch.manual_seed(seed)
    _, loss = read(model, dict(given))
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


class Block(nn.Module):
    """Two linears of one tensor and a third behind them; called with one tensor."""

    def __init__(self, width: int = 6, bias: bool = True) -> None:
        super().__init__()
        self.a = nn.Linear(width, 5, bias=bias)
        self.b = nn.Linear(width, 5, bias=bias)
        self.c = nn.Linear(5, 4, bias=bias)

    def forward(self, x: Tensor) -> Any:
        left = self.a(x)
        right = self.b(x)
        return self.c(torch.tanh(left) + right)


class Scaled(nn.Linear):
    """A linear by its base class, and more."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


def block(dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    """An adapted block."""
    torch.manual_seed(0)
    return adapted(Block().to(dtype), **{"target_modules": ["a", "b", "c"]} | config)


def rows(dtype: torch.dtype = torch.float64, *lead: int, width: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randn(*(lead or (3, 7)), width, generator=generator, dtype=torch.float64)
    return drawn.to(dtype).requires_grad_()


def run(model: Any, x: Tensor, seed: int = 3, **keywords: Any) -> Values:
    """Output, and every gradient, that of x among them."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)
    y = model(x, **keywords)
    weight = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    (y * weight).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **found}


def relative(got: Tensor, want: Tensor) -> float:
    norm = float(want.double().norm())
    return float((got.double() - want.double()).norm()) / norm if norm else float(got.norm())


def same(got: Values, want: Values, tolerance: float = 1e-12) -> None:
    assert got.keys() == want.keys()
    far = {n: error for n, value in want.items() if (error := relative(got[n], value)) > tolerance}
    assert not far, far
    assert all(got[name].dtype == value.dtype for name, value in want.items())


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = str(func).partition(".")
        if namespace == "petal":
            name = name.partition(".")[0]
            self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def operators() -> Iterator[dict[str, int]]:
    """How often each of the package's raw operators runs in this block."""
    mode = _Operators()
    with mode:
        yield mode.calls


def forwards(calls: Mapping[str, int]) -> dict[str, int]:
    """Of those the forwards, by operator."""
    return {name.removesuffix("_fwd"): n for name, n in calls.items() if name.endswith("_fwd")}
