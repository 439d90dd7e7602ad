"""LoRA on q, k and v of one attention layer: what each way of writing it keeps for backward.

PEFT's own layers where PEFT is installed, else `LoRALayer`, a restatement of what its forward does;
ours are the layers that `pk.RoutingConfig` attaches, which are LoRA exactly, and one call of
`lowrank_linear` with a down-projection that the three share, as in mode approximation.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels import memory
from petal_kernels.nn import RoutedLoRALinear


@dataclass(frozen=True)
class Layer:
    """The sizes: x is [batch, length, width], three frozen linears of width x width."""

    batch: int = 4
    length: int = 1024
    width: int = 1024
    rank: int = 16
    dropout: float = 0.05
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Kept:
    """One form: bytes kept for backward without parameters, and in units of x's own bytes."""

    label: str
    bytes: int
    times_x: float
    profile: memory.Profile


class LoRALayer(nn.Module):
    """A frozen linear with LoRA as PEFT computes it: x is converted to the adapter's dtype, dropped
    out and multiplied by A and B in that dtype, and the sum is converted back.
    """

    def __init__(self, base: nn.Linear, rank: int, dropout: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = base
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        kind = {"bias": False, "device": base.weight.device, "dtype": dtype}
        self.lora_A = nn.Linear(base.in_features, rank, **kind)  # type: ignore[arg-type]
        self.lora_B = nn.Linear(rank, base.out_features, **kind)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """base(x) + B(A(drop(x)))."""
        y: Tensor = self.base(x)
        x = x.to(self.lora_A.weight.dtype)
        y = y + self.lora_B(self.lora_A(self.dropout(x)))
        return y.to(self.base.weight.dtype)


class Attention(nn.Module):
    """Three projections of one input, by the names that adapters look for."""

    def __init__(self, projections: list[nn.Module]) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = projections

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k and v."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class SharedDown(nn.Module):
    """Three updates with one down-projection, as in mode approximation: one operator call."""

    def __init__(self, bases: list[nn.Linear], layer: Layer, dropout: float) -> None:
        super().__init__()
        self.weights = nn.ParameterList(base.weight for base in bases)
        self.dropout = dropout
        self.down = nn.Parameter(torch.randn(layer.rank, layer.width) / layer.width**0.5)
        self.ups = nn.ParameterList(torch.zeros(layer.width, layer.rank) for _ in bases)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """y_k = x W_k^T + drop(x) A^T B_k^T; float32 parameters beside any x."""
        out: tuple[Tensor, ...] = pk.lowrank_linear(
            x,
            self.down,
            list(self.ups),
            list(self.weights),
            dropout=self.dropout,
            dropout_at="input",
            training=self.training,
        )
        return out


def peft_installed() -> bool:
    """Whether PEFT's own layers can be measured."""
    return importlib.util.find_spec("peft") is not None


def _peft(layer: Layer, dropout: float, dtype: torch.dtype) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=layer.rank,
        lora_alpha=layer.rank,
        lora_dropout=dropout,
        target_modules=["q_proj", "k_proj", "v_proj"],
    )
    # The default turns 16-bit adapters into float32 ones; so does get_peft_model().
    model = inject_adapter_in_model(config, Attention([*_bases(layer)]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    adapted: nn.Module = model
    return adapted


def _restated(layer: Layer, dropout: float, dtype: torch.dtype) -> nn.Module:
    return Attention([LoRALayer(base, layer.rank, dropout, dtype) for base in _bases(layer)])


def _bases(layer: Layer) -> list[nn.Linear]:
    kind = {"bias": False, "dtype": layer.dtype}
    bases = [nn.Linear(layer.width, layer.width, **kind) for _ in range(3)]  # type: ignore[arg-type]
    return [base.requires_grad_(False) for base in bases]


def forms(layer: Layer, peft: bool) -> dict[str, Callable[[], nn.Module]]:
    """What is compared, by label."""
    theirs = _peft if peft else _restated
    half = str(layer.dtype).removeprefix("torch.")
    p = layer.dropout
    return {
        "PEFT LoRA, float32 adapters (its default)": lambda: theirs(layer, 0.0, torch.float32),
        f"PEFT LoRA, float32 adapters, dropout {p}": lambda: theirs(layer, p, torch.float32),
        f"PEFT LoRA, {half} adapters": lambda: theirs(layer, 0.0, layer.dtype),
        f"PEFT LoRA, {half} adapters, dropout {p}": lambda: theirs(layer, p, layer.dtype),
        "fused LoRA (RoutingConfig's layers)": lambda: Attention(
            [RoutedLoRALinear(base, layer.rank) for base in _bases(layer)]
        ),
        "fused, one down-projection": lambda: SharedDown(_bases(layer), layer, 0.0),
        f"fused, one down-projection, dropout {p}": lambda: SharedDown(_bases(layer), layer, p),
    }


def compare(layer: Layer, peft: bool | None = None) -> list[Kept]:
    """Every form on the same input, in the order of `forms`."""
    x = torch.randn(layer.batch, layer.length, layer.width, dtype=layer.dtype)
    found = []
    for label, build in forms(layer, peft_installed() if peft is None else peft).items():
        model = build().train()
        profile = memory.profile(model, (x.requires_grad_(),), backward=False, cuda_rules=True)
        kept = profile.saved_bytes
        found.append(Kept(label, kept, kept / x.untyped_storage().nbytes(), profile))
    return found
