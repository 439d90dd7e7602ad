"""Several LoRA linears in one call: those that read one tensor, and a whole MLP.

Both give what the linears give one by one, each with a mask of its own; the masks are drawn in one
step, so that a seed gives other ones than one by one. What is kept for backward: of linears that
read one x, x once; of an MLP x and the outputs of gate and up, or x alone (`recompute`), never the
activation, the product or a mask.

Neither can run where a base may not be read (`LoRALinear.operands` says why): then the linears are
called one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from petal_kernels._runtime.autocast import autocast_off
from petal_kernels.nn.arguments import check_rows
from petal_kernels.nn.dora import gained
from petal_kernels.nn.frozen_linear import compute_dtype
from petal_kernels.nn.lora import LoRALinear, Operands, frozen_operands
from petal_kernels.ops.gated_mlp import gated_mlp
from petal_kernels.ops.lowrank_linear import lowrank_linear


class Reads(Protocol):
    """A linear with an update that is no `LoRALinear`, as a joined call asks it."""

    @property
    def in_features(self) -> int: ...

    def operands(self, dtype: torch.dtype, device: torch.device) -> Operands | str:
        """What a call in `dtype` reads, or why the linear must be called itself."""


# With the bias that is trained in place of the base's.
Member = tuple[LoRALinear, Tensor | None] | Reads


def lora_linears(x: Tensor, members: Sequence[Member]) -> tuple[Tensor, ...] | str:
    """What each of several LoRA linears gives for one x [..., in]; or why they must be called one
    by one."""
    leader = members[0][0] if isinstance(members[0], tuple) else members[0]
    check_rows("x", x, leader.in_features)
    dtype = compute_dtype(x)
    found = [_operands(member, dtype, x.device) for member in members]
    why = next((each for each in found if isinstance(each, str)), None)
    if why is not None:
        return why
    given = [each for each in found if isinstance(each, Operands)]
    (first, *others) = given
    if any(each.dropout != first.dropout for each in others):
        return "their dropouts differ"
    with autocast_off(x):
        ys = lowrank_linear(
            x if x.dtype == dtype else x.to(dtype),
            [each.down for each in given if each.down is not None],
            [each.up for each in given if each.up is not None],
            [each.weight for each in given],
            [each.bias if each.gain is None else None for each in given],
            scale=[each.scale for each in given],
            dropout=first.dropout,
            dropout_at="input",
        )
    return tuple(
        y if each.gain is None else gained(y, each.gain, each.bias)
        for y, each in zip(ys, given, strict=True)
    )


def lora_mlp(
    x: Tensor,
    members: Sequence[Member | nn.Module],
    activation: str,
    *,
    recompute: bool = False,
) -> Tensor | str:
    """down(act(gate(x)) * up(x)), or down(act(up(x))) of two members; a member without an update is
    the frozen linear itself. Or why they must be called one by one."""
    dtype = compute_dtype(x)
    found = [
        frozen_operands(member, dtype, x.device)
        if isinstance(member, nn.Module)
        else _operands(member, dtype, x.device)
        for member in members
    ]
    why = next((each for each in found if isinstance(each, str)), None)
    if why is not None:
        return why
    given = [each for each in found if not isinstance(each, str)]
    if any(each.gain is not None for each in given):
        return "a magnitude stands between a linear and the activation"
    drops = {each.dropout for each in given if each.down is not None}
    if len(drops) > 1:
        return "their dropouts differ"
    with autocast_off(x):
        return gated_mlp(
            x if x.dtype == dtype else x.to(dtype),
            [each.weight for each in given],
            [each.bias for each in given],
            downs=[each.down for each in given],
            ups=[each.up for each in given],
            scale=[each.scale for each in given],
            activation=activation,
            dropout=drops.pop() if drops else 0.0,
            recompute=recompute,
        )


def watched(module: nn.Module) -> bool:
    """Whether somebody is to see this module's own call: its hooks, a forward put in its place."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _operands(member: Member, dtype: torch.dtype, device: torch.device) -> Operands | str:
    """Not of a module whose call others await, as an engine that loads its parameters then."""
    if not isinstance(member, tuple):
        return member.operands(dtype, device)
    lora, bias = member
    if watched(lora):
        return "the update's own call is watched"
    return lora.operands(dtype, device, bias)
