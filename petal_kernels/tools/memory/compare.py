"""LoRA on one layer: what each way of writing it keeps for backward.

`lora-qkv` is q, k and v of one attention layer, `lora-layer` (`compare_layer.py`) a whole decoder
layer, by the linears that are adapted. PEFT's own layers where PEFT is installed, else a
restatement of what its forward does; ours as `pk.attach` puts them into a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels import memory
from petal_kernels._runtime.columns import columns, rounded
from petal_kernels.memory.records import mib
from petal_kernels.tools.memory.lora_forms import installed, peft_lora, restated_lora

NAMES = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Layer:
    """The sizes: x is [batch, length, width], three frozen linears of width x width."""

    batch: int = 4
    length: int = 1024
    width: int = 1024
    rank: int = 16
    dropout: float = 0.05
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.batch} x {self.length} x {self.width} {dtype}, r={self.rank}"


@dataclass(frozen=True)
class Kept:
    """One form: bytes kept for backward without parameters, and in units of x's own bytes."""

    label: str
    bytes: int
    times_x: float
    profile: memory.Profile | None = None
    targets: str = ""

    @property
    def name(self) -> str:
        """Beside what is adapted, where that differs."""
        return f"{self.targets}: {self.label}" if self.targets else self.label


class Attention(nn.Module):
    """Three projections of one input, by the names that adapters look for."""

    def __init__(self, projections: Sequence[nn.Module]) -> None:
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


def _bases(layer: Layer) -> list[nn.Linear]:
    kind = {"bias": False, "dtype": layer.dtype}
    bases = [nn.Linear(layer.width, layer.width, **kind) for _ in NAMES]  # type: ignore[arg-type]
    return [base.requires_grad_(False) for base in bases]


def _ours(layer: Layer, dropout: float) -> nn.Module:
    model = Attention(_bases(layer))
    rank, targets = layer.rank, list(NAMES)
    config = pk.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=targets)
    pk.attach(model, config)
    return model


def forms(layer: Layer, peft: bool) -> dict[str, Callable[[], nn.Module]]:
    """What is compared, by label."""
    inject = peft_lora if peft else restated_lora

    def theirs(dropout: float, dtype: torch.dtype) -> nn.Module:
        return inject(Attention(_bases(layer)), NAMES, layer.rank, dropout, dtype)

    half = str(layer.dtype).removeprefix("torch.")
    p = layer.dropout
    return {
        "PEFT LoRA, float32 adapters (its default)": lambda: theirs(0.0, torch.float32),
        f"PEFT LoRA, float32 adapters, dropout {p}": lambda: theirs(p, torch.float32),
        f"PEFT LoRA, {half} adapters": lambda: theirs(0.0, layer.dtype),
        f"PEFT LoRA, {half} adapters, dropout {p}": lambda: theirs(p, layer.dtype),
        "LoraConfig": lambda: _ours(layer, 0.0),
        f"LoraConfig, dropout {p}": lambda: _ours(layer, p),
        "one down-projection": lambda: SharedDown(_bases(layer), layer, 0.0),
        f"one down-projection, dropout {p}": lambda: SharedDown(_bases(layer), layer, p),
    }


def compare(layer: Layer, peft: bool | None = None) -> list[Kept]:
    """Every form on the same input, in the order of `forms`."""
    x = torch.randn(layer.batch, layer.length, layer.width, dtype=layer.dtype)
    found = []
    for label, build in forms(layer, installed() if peft is None else peft).items():
        model = build().train()
        profile = memory.profile(model, (x.requires_grad_(),), backward=False, cuda_rules=True)
        kept = profile.saved_bytes
        found.append(Kept(label, kept, kept / x.untyped_storage().nbytes(), profile))
    return found


def title(layer: Layer) -> str:
    """What is compared, in a line."""
    theirs = "PEFT's own layers" if installed() else "PEFT not installed: restated"
    return f"LoRA on q, k and v of one layer, {layer} ({theirs})"


def table(kept: Sequence[Kept]) -> str:
    """The figures, and how they count."""
    rows = [[k.label, mib(k.bytes), f"{rounded(k.times_x, 2)}x"] for k in kept]
    shown = columns(("form", "kept for backward", "of x's bytes"), rows, right=(1, 2))
    said = "Parameters are not counted; x is, once. Dropout keeps its mask as on CUDA, in bytes."
    return f"{shown}\n\n{said}"
