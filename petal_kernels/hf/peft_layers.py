"""PEFT's LoRA layers as they stand, run by our operators: a mixin in front of a layer's class.

Nothing is added to the layer: all that a call needs, PEFT keeps there, and it is read in each call.
Which adapter is active, merged or disabled may change in between; where a call is none of ours the
layer's own forward runs. PEFT itself is not imported.

Dtypes: the update is computed in autocast's dtype, else in x's, and added in it, with fp32 sums.
PEFT does the same under autocast and where adapter and base have one dtype. Adapters of fp32 on a
16-bit base without autocast differ: PEFT keeps and multiplies an fp32 copy of x; here x A^T and its
gradient are rounded to 16 bits, as under autocast. The gradients of A and B are fp32 all the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from petal_kernels._runtime import checks
from petal_kernels._runtime.autocast import autocast_off
from petal_kernels._runtime.first_order import transforms_active
from petal_kernels.hf.methods.lora_parts import FusedMlp, Joins, OneInput, taken
from petal_kernels.hf.parts import Adapted, Both, Part, adapted_class, own_class
from petal_kernels.nn.frozen_linear import compute_dtype, near, why_not_readable
from petal_kernels.nn.lora import Operands, frozen_operands
from petal_kernels.nn.lora_fused import lora_linears, watched
from petal_kernels.ops.lowrank_linear import lowrank_linear

# The forwards that are known: base and update, added. By the names of their functions, since a
# class may inherit one of them and bring its own merging.
_FORWARDS = {
    ("peft.tuners.lora.layer", "Linear.forward"),
    ("peft.tuners.lora.bnb", "Linear4bit.forward"),
    ("peft.tuners.lora.bnb", "Linear8bitLt.forward"),
}
# What a call reads of a layer.
_READ = (
    *("base_layer", "in_features", "out_features", "lora_A", "lora_B", "lora_dropout", "scaling"),
    *("lora_variant", "merged_adapters", "active_adapters", "disable_adapters"),
)


@dataclass(frozen=True)
class Update:
    """A layer's one active adapter, and the base that it updates."""

    base: nn.Module
    in_features: int
    down: Tensor
    up: Tensor
    scale: float
    dropout: float  # 0 in evaluation
    bias: Tensor | None  # of lora_B

    def operands(self, dtype: torch.dtype, device: torch.device) -> Operands | str:
        """What a call in `dtype` reads, or why the base must be called."""
        if self.down.device != device or self.up.device != device:
            return f"the adapter is on {self.down.device}"
        found = frozen_operands(self.base, dtype, device, self._bias())
        if isinstance(found, str):
            return found
        if found.weight.device != device:
            return f"base is on {found.weight.device}"
        down, up = (near(each, dtype, device) for each in (self.down, self.up))
        return found._replace(down=down, up=up, scale=self.scale, dropout=self.dropout)

    def _bias(self) -> Tensor | None:
        """What stands in place of the base's bias: that itself where it is trained."""
        own = self.base._parameters.get("bias")
        if self.bias is None:
            return own if own is not None and own.requires_grad else None
        added = self.scale * self.bias
        return added if own is None else own + added

    def run(self, x: Tensor) -> Tensor:
        """base(x) with the update, in one call."""
        ys = lora_linears(x, [self])
        return self._called(x) if isinstance(ys, str) else ys[0]

    def _called(self, x: Tensor) -> Tensor:
        """The same where the base must be called: its output goes into the call."""
        y: Tensor = self.base(x)
        if self.bias is not None:
            y = y + (self.scale * self.bias).to(y.dtype)
        dtype = compute_dtype(x)
        down, up = (near(each, dtype, x.device) for each in (self.down, self.up))
        settings: dict[str, Any] = {"scale": self.scale, "dropout": self.dropout}
        fits = y.dtype == dtype and y.shape[:-1] == x.shape[:-1]
        with autocast_off(x):
            rows, base = x.to(dtype), [y] if fits else None
            (found,) = lowrank_linear(rows, down, [up], base=base, dropout_at="input", **settings)
        return found if fits else y + found.to(y.dtype)


class FusedLora(Joins):
    """Mixin put in front of a LoRA layer's own class."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        # Other arguments are PEFT's: adapters by sample, what variants read.
        update = "" if args or kwargs or not _is_rows(x) else self.member()
        if isinstance(update, str) or update.down.device != x.device:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        y = taken(self, x)  # type: ignore[arg-type]
        return update.run(x) if y is None else y

    def member(self) -> Update | str:
        """The update as PEFT's state has it now, or why PEFT's own forward must run."""
        layer: Any = self
        if transforms_active():
            return "a transform of torch.func, or forward mode, is at work"
        if layer.disable_adapters:
            return "its adapters are disabled"
        if layer.merged_adapters:
            return "an adapter is merged"
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        if len(names) != 1:
            return f"adapters that are active at once: {len(names)}"
        (name,) = names
        scale = layer.scaling[name]
        if name in layer.lora_variant:
            return f"a {type(layer.lora_variant[name]).__name__} of PEFT's"
        if not isinstance(scale, (int, float)) or not math.isfinite(scale):
            return "its scaling is no finite number"
        if not getattr(layer, "cast_input_dtype_enabled", True):
            return "casting of its input is off"
        factors = layer.lora_A[name], layer.lora_B[name]
        for kind, factor in zip(("lora_A", "lora_B"), factors, strict=True):
            why = why_not_readable(factor)
            if why:
                return why.replace("base", kind, 1)
        dropout = _probability(layer.lora_dropout[name])
        if dropout is None:
            return "its dropout is another module, drops all or is watched"
        down, up = factors
        return Update(
            layer.base_layer,
            layer.in_features,
            down.weight,
            up.weight,
            scale,
            dropout,
            up.bias,
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: pickle and deepcopy make it again from PEFT's.
        return _remade, (plain_class(self),), self.__dict__


class Around(Adapted):
    """Mixin of a module around fused layers, some of whose linears run in one call. Where one of
    them is replaced, as by PEFT's `merge_and_unload`, the module has its own class again."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        joined = parts_of(self.__dict__.get("_petal"))
        if any(part.members.get(name, value) is not value for part in joined):
            leave(self)  # type: ignore[arg-type]


def parts_of(part: Part | None) -> list[OneInput | FusedMlp]:
    """The joined calls of one module."""
    if isinstance(part, Both):
        return parts_of(part.outer) + parts_of(part.inner)
    return [part] if isinstance(part, (OneInput, FusedMlp)) else []


def leave(module: nn.Module) -> None:
    """Gives a module its own class back, unless somebody has put another one in front."""
    own = own_class(module)
    if type(module) is adapted_class(own, Around):
        module.__class__ = own
        del module.__dict__["_petal"]


def _remade(cls: type) -> Any:
    return object.__new__(fused_class(cls))


def _is_rows(x: object) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0 and x.dtype in checks.FLOATING


def _probability(dropout: Any) -> float | None:
    """What a call drops; None where the module is another kind of dropout, or somebody sees it."""
    if type(dropout) not in (nn.Identity, nn.Dropout) or watched(dropout):
        return None
    if isinstance(dropout, nn.Identity) or not dropout.training:
        return 0.0
    return float(dropout.p) if dropout.p < 1.0 else None


def is_peft_layer(module: nn.Module) -> bool:
    """Whether it is a layer of one of PEFT's methods."""
    return any(
        cls.__name__ == "BaseTunerLayer" and cls.__module__.startswith("peft.")
        for cls in type(module).__mro__
    )


def why_not_fused(module: nn.Module) -> str:
    """Why a layer of PEFT's cannot take part, whatever its state; empty where it can."""
    own = plain_class(module)
    forward = getattr(own, "forward", None)
    name = getattr(forward, "__module__", ""), getattr(forward, "__qualname__", "")
    if name not in _FORWARDS:
        return f"a {own.__name__} of {own.__module__}, whose forward is not known"
    if "forward" in module.__dict__:
        return "its forward is replaced"
    if "_petal" in module.__dict__:
        return "an attachment adapts it"
    missing = [each for each in _READ if not hasattr(module, each)]
    return f"its PEFT has no {missing[0]}" if missing else ""


def fused_class(cls: type) -> type:
    """The subclass of a layer's class, by the same name, that our operators run."""
    return adapted_class(cls, FusedLora)


def plain_class(module: object) -> type:
    """PEFT's class of a layer, fused or not."""
    mro: Sequence[type] = type(module).__mro__
    return mro[mro.index(Joins) + 1] if Joins in mro else mro[0]
