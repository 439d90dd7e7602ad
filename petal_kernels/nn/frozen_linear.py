"""Frozen linears with a low-rank update: the wrapper and the one call that serves a whole group.

`FrozenLinear` stands where an `nn.Linear` (or anything called like one) stood. It shares the base's
own parameter, buffer and child dictionaries, so that state_dict keys, `.to()`, sharding and
optimizers see the very objects they saw before, and it keeps the base itself, untouched, to call it
or to give it back.

`frozen_lowrank` computes y_k = base_k(x) + drop(h) P_k^T for all members of a group. It reads a
base's weight only when that is plainly there (`weight_is_plain`): a quantised, sharded, hooked,
parametrised or otherwise special base is called, and only the update is fused.

Dtypes: the compute dtype is autocast's where autocast is on, else x's; the update is computed and
added in it, whatever the adapter's own dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petal_kernels._runtime import checks
from petal_kernels._runtime.autocast import autocast_off, autocast_on
from petal_kernels.nn.arguments import check_module, check_values
from petal_kernels.ops.lowrank_linear import lowrank_linear

if TYPE_CHECKING:
    from typing_extensions import TypeIs

MERGED_TRAINING = (
    "the adapter is merged into the base weights and cannot be trained; call unmerge() first"
)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear of `x` would run here: autocast's if it is on, else x's."""
    device = x.device.type
    if x.dtype != torch.float64 and autocast_on(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def weight_is_plain(base: nn.Module) -> bool:
    """Whether `base.weight` may be read: exactly nn.Linear, not hooked, sharded or overridden."""
    return not why_not_plain(base)


def why_not_plain(base: nn.Module) -> str:
    """Why `base.weight` must not be read; empty when it may be."""
    if type(base) is not nn.Linear:
        return f"base is a {type(base).__name__}, not exactly nn.Linear"
    return why_not_readable(base)


def why_not_readable(base: nn.Module) -> str:
    """The same for a linear of a kind that the caller knows (nn.Linear or transformers' Conv1D)."""
    kind = type(base)
    if kind is not nn.Linear and not is_conv1d(base):
        return f"base is a {kind.__name__}, not a plain linear"
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks:
        return "base has hooks"
    if base._backward_pre_hooks:
        return "base has hooks"
    if "forward" in base.__dict__ or "_hf_hook" in base.__dict__:
        return "base has its forward replaced"
    weight = base._parameters.get("weight")
    if type(weight) is not nn.Parameter and type(weight).__name__ != "FakeTensor":
        return f"base weight is a {type(weight).__name__}"
    if hasattr(weight, "ds_id"):
        return "base weight is partitioned by DeepSpeed"
    return ""


def is_conv1d(base: nn.Module) -> bool:
    """Whether it is transformers' Conv1D: a class made from it, or by the same name, has a forward
    of its own."""
    kind = type(base)
    named = kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
    return named and kind.__base__ is nn.Module


def check_input(x: Tensor, base: nn.Module) -> None:
    """TypeError where a base that may be read would refuse x: its own words name no argument."""
    if autocast_on(x.device.type) or why_not_readable(base):
        return
    weight = base._parameters["weight"]
    if weight is not None and weight.dtype != x.dtype:
        want = checks.dtype_name(weight.dtype)
        raise TypeError(f"x: want dtype {want} like the base, got {checks.dtype_name(x.dtype)}")


def check_bias(bias: Tensor | None, base: nn.Module, width: int, parameter: Tensor) -> None:
    """Raise unless `bias` [width] can stand in place of the base's own."""
    if bias is None:
        return
    checks.check_floating("bias", bias)
    checks.check_shape("bias", bias, (width,))
    check_values("bias", bias, parameter)
    if base._parameters.get("bias") is None:
        raise ValueError("bias: want a base with a bias of its own, got one without")


def with_bias(y: Tensor, base: nn.Module, bias: Tensor | None) -> Tensor:
    """`y`, which `base` computed with its own bias, with `bias` in its place."""
    own = base._parameters.get("bias")
    return y if bias is None or own is None else y + (bias - own.to(bias)).to(y.dtype)


class FrozenLinear(nn.Module):
    """A base layer seen through its own dictionaries; subclasses say what is added to it."""

    base: nn.Module

    def __init__(self, base: nn.Module) -> None:
        check_module("base", base)
        super().__init__()
        # Not a child: a child would change the state_dict keys and hide the shared dictionaries.
        self.__dict__["base"] = base
        self._parameters = base._parameters
        self._buffers = base._buffers
        self._non_persistent_buffers_set = base._non_persistent_buffers_set
        self._modules = base._modules
        self.training = base.training

    @property
    def in_features(self) -> int:
        return int(self.base.in_features)  # type: ignore[arg-type]

    @property
    def out_features(self) -> int:
        return int(self.base.out_features)  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> FrozenLinear:
        super().train(mode)
        self.base.training = mode
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.base._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.base._load_from_state_dict(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y

    def extra_repr(self) -> str:
        return f"base={type(self.base).__name__}({self.in_features}, {self.out_features})"


def frozen_lowrank(
    x: Tensor,
    bases: Sequence[nn.Module],
    down: Tensor,
    ups: Sequence[Tensor],
    *,
    hidden: Tensor | None = None,
    dropout: float = 0.0,
    training: bool = False,
) -> tuple[Tensor, ...]:
    """y_k = bases[k](x) + drop(x down^T) ups[k]^T in one operator call.

    `hidden` replaces x down^T where the caller has it already (shared by several groups); `down` is
    then not used.
    """
    checks.check_floating("x", x)
    _check_group(x, bases, down, ups, hidden, training)
    dtype = compute_dtype(x)
    x_c = x if x.dtype == dtype else x.to(dtype)
    plain = [base if _is_plain_linear(base) else None for base in bases]
    frozen = [base for base in plain if base is not None and _is_frozen(base, dtype)]
    if len(frozen) == len(bases):
        weights = [base.weight for base in frozen]
        biases = [base.bias for base in frozen]
        return _update(x_c, down, ups, hidden, dropout, training, weights=weights, biases=biases)
    # A special base gets x as the model hands it over; a plain one the copy that is kept anyway.
    for base in bases:
        check_input(x, base)
    outs: list[Tensor] = [
        base(x) if linear is None else F.linear(x_c, linear.weight, linear.bias)
        for base, linear in zip(bases, plain, strict=True)
    ]
    if all(out.dtype == dtype and out.shape[:-1] == x.shape[:-1] for out in outs):
        return _update(x_c, down, ups, hidden, dropout, training, base=outs)
    updates = _update(x_c, down, ups, hidden, dropout, training)
    return tuple(out + update.to(out.dtype) for out, update in zip(outs, updates, strict=True))


def _check_group(
    x: Tensor,
    bases: Sequence[nn.Module],
    down: Tensor,
    ups: Sequence[Tensor],
    hidden: Tensor | None,
    training: bool,
) -> None:
    """What the operator cannot check: it runs after the bases."""
    if not isinstance(bases, (list, tuple)) or not bases:
        got = "none" if isinstance(bases, (list, tuple)) else type(bases).__name__
        raise TypeError(f"bases: want a sequence of modules, got {got}")
    for k, base in enumerate(bases):
        check_module(f"bases[{k}]", base)
    if not isinstance(ups, (list, tuple)):
        raise TypeError(f"ups: want a sequence of tensors, got {type(ups).__name__}")
    if len(ups) != len(bases):
        raise ValueError(f"ups: want {len(bases)} tensors, one for each base, got {len(ups)}")
    if hidden is None and checks.check_floating("down", down).dim() != 2:
        raise ValueError(f"down: want shape [R, {x.shape[-1]}], got {list(down.shape)}")
    parts = [(f"ups[{k}]", up) for k, up in enumerate(ups)]
    parts.append(("down", down) if hidden is None else ("hidden", hidden))
    for name, part in parts:
        if checks.check_floating(name, part).is_meta != x.is_meta:
            name = "x" if x.is_meta else name
            raise ValueError(f"{name}: want a tensor with values like the others, got one on meta")
    for k, (base, up) in enumerate(zip(bases, ups, strict=True)):
        out = getattr(base, "out_features", None)
        if up.dim() != 2 or (isinstance(out, int) and up.shape[0] != out):
            raise ValueError(f"ups[{k}]: want shape [{out or 'O'}, R], got {list(up.shape)}")


def _is_plain_linear(base: nn.Module) -> TypeIs[nn.Linear]:
    return weight_is_plain(base)


def _is_frozen(base: nn.Linear, dtype: torch.dtype) -> bool:
    parts = [base.weight] if base.bias is None else [base.weight, base.bias]
    return all(part.dtype == dtype and not part.requires_grad for part in parts)


def _update(
    x: Tensor,
    down: Tensor,
    ups: Sequence[Tensor],
    hidden: Tensor | None,
    dropout: float,
    training: bool,
    **base: Any,
) -> tuple[Tensor, ...]:
    dtype = x.dtype
    down = near(down, dtype, x.device)
    ups = [near(up, dtype, x.device) for up in ups]
    if hidden is not None:
        hidden = hidden.to(device=x.device, dtype=dtype)
    kwargs = dict(base, hidden=hidden, dropout=dropout, training=training)
    needs_x = hidden is None or "weights" in base
    down_arg = None if hidden is not None else down
    # The dtypes are settled above: inside, a product that autocast re-rounds would be a fault.
    with autocast_off(x):
        return lowrank_linear(x if needs_x else None, down_arg, ups, **kwargs)


def near(t: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A parameter on a device and in a dtype that the operator takes beside rows of `dtype`: theirs
    or float32."""
    if t.dtype != torch.float32 or dtype == torch.float64:
        t = t.to(dtype)
    return t if t.device == device else t.to(device)
