"""Calls whose forward and node are compiled, for the tests of both ways."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import petal_kernels as pk

# Every operator that has a compiled call: the module where its known calls lie.
OPS = {
    name: importlib.import_module(f"petal_kernels.ops.{name}.op")
    for name in ("gated_mlp", "lowrank_linear")
}

D, F, R = 24, 40, 5


class Call:
    """One call of an operator: its tensors by name, and what else it is given."""

    def __init__(self, op: str, tensors: dict[str, Any], **settings: Any) -> None:
        self.op, self.tensors, self.settings = op, tensors, settings

    def named(self) -> dict[str, Tensor]:
        """Every tensor that can be trained."""
        found: dict[str, Tensor] = {}
        for name, value in self.tensors.items():
            if name == "weights":
                continue
            for k, each in enumerate(value if isinstance(value, list) else [value]):
                if each is not None:
                    found[f"{name}[{k}]"] = each
        return found

    def __call__(self) -> tuple[Tensor, ...]:
        ys = getattr(pk, self.op)(**self.tensors, **self.settings)
        return ys if isinstance(ys, tuple) else (ys,)

    def train(self, names: Sequence[str]) -> None:
        for name, each in self.named().items():
            each.requires_grad_(name in names)

    def short(self) -> bool:
        """Whether the newest known call is a compiled one."""
        *_, found = OPS[self.op]._KNOWN.values()
        return found.short is not None


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def linear(
    outs: Sequence[int] = (F,),
    *,
    own: bool = True,
    lead: tuple[int, ...] = (2, 3),
    dtype: torch.dtype = torch.float32,
    biases: bool = True,
    weights: bool = True,
    **settings: Any,
) -> Call:
    torch.manual_seed(1)
    ranks = [R + k if own else R for k in range(len(outs))]
    downs = [drawn(r, D) for r in ranks]
    tensors: dict[str, Any] = {"x": drawn(*lead, D, dtype=dtype)}
    tensors["down"] = downs if own else downs[0]
    tensors["ups"] = [drawn(o, r) for o, r in zip(outs, ranks, strict=True)]
    if weights:
        tensors["weights"] = [drawn(o, D, dtype=dtype) for o in outs]
        if biases:
            tensors["biases"] = [
                drawn(o, dtype=dtype) if k != 1 else None for k, o in enumerate(outs)
            ]
    settings = {"dropout": 0.25, "dropout_at": "input"} | settings
    scale = [0.5 + k for k in range(len(outs))]
    return Call("lowrank_linear", tensors, scale=scale, **settings)


def mlp(
    linears: int = 3,
    *,
    lead: tuple[int, ...] = (2, 3),
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Call:
    torch.manual_seed(2)
    sizes = [(D, F)] * (linears - 1) + [(F, D + 1)]
    tensors: dict[str, Any] = {
        "x": drawn(*lead, D, dtype=dtype),
        "weights": [drawn(o, i, dtype=dtype) / i**0.5 for i, o in sizes],
        "biases": [drawn(o, dtype=dtype) if k != 1 else None for k, (_, o) in enumerate(sizes)],
        "downs": [drawn(R + k, i) for k, (i, _) in enumerate(sizes)],
        "ups": [drawn(o, R + k) for k, (_, o) in enumerate(sizes)],
    }
    scale = [0.5 + k for k in range(linears)]
    return Call("gated_mlp", tensors, scale=scale, **({"dropout": 0.25} | settings))


CALLS: dict[str, Callable[[], Call]] = {
    "linear": linear,
    "linear, no dropout": lambda: linear(dropout=0.0),
    "linear, evaluated": lambda: linear(training=False),
    "linear, bf16": lambda: linear(dtype=torch.bfloat16),
    "linear, fp16": lambda: linear(dtype=torch.float16),
    "linear, one row": lambda: linear(lead=()),
    "linear, a matrix": lambda: linear(lead=(7,)),
    "linear, no bias": lambda: linear(biases=False),
    "update alone": lambda: linear(weights=False),
    "linears, own downs": lambda: linear((F, 8, 8)),
    "linears, own downs, no dropout": lambda: linear((F, 8, 8), dropout=0.0),
    "linears, one down": lambda: linear((F, 8, 8), own=False, dropout_at="bottleneck"),
    "linears, one down, bf16": lambda: linear((F, 8), own=False, dtype=torch.bfloat16),
    "linears, extended": lambda: linear((F, 8), dropout=0.0, plan="extend"),
    "gated MLP": mlp,
    "gated MLP, no dropout": lambda: mlp(dropout=0.0),
    "gated MLP, bf16": lambda: mlp(dtype=torch.bfloat16, activation="gelu_tanh"),
    "MLP": lambda: mlp(2, activation="relu"),
    "MLP, a matrix": lambda: mlp(2, lead=(5,), activation="gelu"),
}


def trained_sets(call: Call) -> list[tuple[str, ...]]:
    """Everything, each tensor alone, and everything but x."""
    names = tuple(call.named())
    return [names, *((name,) for name in names), names[1:]]


def run(call: Call, names: Sequence[str], weight: float = 1.0) -> list[Tensor | None]:
    """Outputs, gradients and the state that the generator is left in."""
    call.train(names)
    torch.manual_seed(3)
    ys = call()
    inputs = [each for name, each in call.named().items() if name in names]
    torch.manual_seed(4)
    dys = [torch.randn(y.shape).to(y.dtype) * weight for y in ys]
    grads = torch.autograd.grad(ys, inputs, dys)
    return [*(y.detach() for y in ys), *grads, torch.get_rng_state()]


def same(got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()


def call_of(name: str) -> Call:
    """One of an operator's, with everything that can be trained."""
    return linear() if name == "lowrank_linear" else mlp()
