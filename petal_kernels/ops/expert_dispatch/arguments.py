"""The arguments of ``expert_dispatch``: what backends receive, and the checks of what users give.

The public function reduces its options before a backend sees them: leading dims are flat, indices
have become a dense row of gates with a choice, a pooled router has become gates per sample.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from petal_kernels._runtime import checks
from petal_kernels._runtime.numerics import ACTIVATIONS
from petal_kernels.ops.expert_dispatch import planner

GATES = ("mean", "softmax", "given")
PARAMETERS = ("down", "up", "down_bias", "up_bias", "router", "router_bias", "noise", "gates")


class Given(NamedTuple):
    """The public function's arguments, as they came."""

    x: Any
    down: Any
    up: Any
    down_bias: Any
    up_bias: Any
    base: Any
    keep: Any
    mix: Any
    activation: Any
    gate: Any
    router: Any
    router_bias: Any
    noise: Any
    top_k: Any
    renormalize: Any
    router_input: Any
    mask: Any
    gates: Any
    indices: Any
    return_routing: Any
    plan: Any
    backend: Any


class Tensors(NamedTuple):
    """Every tensor argument, None where it is not given.

    Row tensors (x, base) are [N, width] with unit stride in the last dim in a backend's hands.
    """

    x: Tensor | None  # [N, D]
    down: Tensor  # [E, r, D], or [1, r, D]: one for all experts
    down_bias: Tensor | None  # [E or 1, r]
    up: Tensor  # [E, O, r]
    up_bias: Tensor | None  # [E, O]
    base: Tensor | None  # [N, O]
    router: Tensor | None  # softmax, topk: [E, D]
    router_bias: Tensor | None  # [E]
    noise: Tensor | None  # [N, E], added to the logits
    gates: Tensor | None  # given: [N or samples, E]
    chosen: Tensor | None  # given: bool like gates; None: every expert


class Settings(NamedTuple):
    """Everything that is no tensor, in the order of the raw operators' schemas."""

    activation: str  # of ACTIVATIONS
    gate: str  # "mean", "softmax", "topk" or "given"
    top_k: int  # at most so many experts are chosen by a token; 0: all are used
    renormalize: bool  # topk: the softmax is over the chosen alone
    tokens_per_gate: int  # L where a sample's tokens share a row of gates, else 1
    add_input: bool  # H is x
    keep: float
    mix: float
    plan: str  # of planner.PLANS


class Call(NamedTuple):
    """One call as a backend gets it."""

    tensors: Tensors
    settings: Settings
    first: Tensor  # x, or in a backward without x the output's gradient: rows, dtype and device

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.first.device

    @property
    def is_cuda(self) -> bool:
        """Whether that is a GPU."""
        return self.first.is_cuda

    @property
    def rows(self) -> int:
        """N."""
        return self.first.shape[0]

    @property
    def experts(self) -> int:
        """E."""
        return self.tensors.up.shape[0]

    @property
    def rank(self) -> int:
        """The r of each expert."""
        return self.tensors.up.shape[2]

    @property
    def shared_down(self) -> bool:
        """Whether all experts read one z."""
        return self.tensors.down.shape[0] == 1 and self.experts > 1

    @property
    def routed(self) -> bool:
        """Whether the gates are formed from x inside."""
        return self.tensors.router is not None

    @property
    def slots(self) -> int:
        """Sorted: an upper bound of the (token, expert) pairs, known without looking."""
        return self.rows * self.settings.top_k

    @property
    def z_shape(self) -> tuple[int, int]:
        """Of what is saved of the bottlenecks."""
        if self.settings.plan == "sorted":
            return self.slots, self.rank
        return self.rows, self.tensors.down.shape[0] * self.rank


class Saved(NamedTuple):
    """What a forward leaves for backward besides its inputs; None where there is nothing."""

    z: (
        Tensor | None
    )  # x down^T + down_bias in x's dtype, ``Call.z_shape``; blocks nobody chose are not written
    logits: Tensor | None  # with a router: fp32 (fp64) [N, E]; also without backward
    chosen: Tensor | None  # topk: bool [N, E]; also without backward
    order: Tensor | None  # sorted: int32 [slots], the token of each slot, -1 behind the last
    offsets: Tensor | None  # sorted: int32 [E + 1], where each expert's slots begin


def _absent(reason: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: want None {reason}, got a {type(value).__name__}")


def _shape(name: str, value: Any, want: tuple[Any, ...]) -> Tensor:
    tensor = checks.check_tensor(name, value)
    checks.check_shape(name, tensor, want)
    return tensor


def _check_experts(given: Given) -> None:
    x, down, up, down_bias, up_bias = given[:5]
    checks.check_floating("x", x)
    if x.dim() < 1:
        raise ValueError(f"x: want shape [..., D], got {list(x.shape)}")
    checks.check_floating("down", down)
    checks.check_floating("up", up)
    _shape("down", down, ("E", "r", x.shape[-1]))
    experts, rank, _ = down.shape
    if min(down.shape) < 1:
        raise ValueError(f"down: want E, r and D >= 1, got {list(down.shape)}")
    _shape("up", up, ("E" if experts == 1 else experts, "O", rank))
    if min(up.shape) < 1:
        raise ValueError(f"up: want E and O >= 1, got {list(up.shape)}")
    if down_bias is not None:
        _shape("down_bias", down_bias, (experts, rank))
    if up_bias is not None:
        _shape("up_bias", up_bias, tuple(up.shape[:2]))


def _check_router(given: Given, experts: int) -> None:
    x, noise, mask = given.x, given.noise, given.mask
    if given.router is None:
        raise TypeError("router: want a Tensor [E, D] with gate='softmax', got None")
    _shape("router", given.router, (experts, x.shape[-1]))
    if given.router_bias is not None:
        _shape("router_bias", given.router_bias, (experts,))
    pooled = given.router_input == "pooled"
    if pooled and x.dim() != 3:
        raise ValueError(f"x: want shape [B, L, D] with router_input='pooled', got {list(x.shape)}")
    lead = (x.shape[0],) if pooled else tuple(x.shape[:-1])
    if noise is not None:
        _shape("noise", noise, (*lead, experts))
    if mask is not None:
        if not pooled:
            raise ValueError("mask: want None with router_input='token', got a Tensor")
        checks.check_mask("mask", mask, tuple(x.shape[:-1]))


def _check_gates(given: Given, experts: int) -> None:
    x, gates, indices = given.x, given.gates, given.indices
    if gates is None and indices is None:
        raise TypeError("gates: want a Tensor (or indices) with gate='given', got None")
    leads = [tuple(x.shape[:-1])] + ([(x.shape[0],)] if x.dim() == 3 else [])
    name, value = ("gates", gates) if indices is None else ("indices", indices)
    checks.check_tensor(name, value)
    last = experts if indices is None else "k"
    if tuple(value.shape[:-1]) not in leads or (indices is None and value.shape[-1] != experts):
        wanted = " or ".join(f"[{', '.join(str(w) for w in (*lead, last))}]" for lead in leads)
        raise ValueError(f"{name}: want shape {wanted}, got {list(value.shape)}")
    if indices is not None:
        checks.check_dtype("indices", indices, (torch.int64, torch.int32))
        if not 1 <= indices.shape[-1] <= experts:
            raise ValueError(
                f"indices: want 1 <= k <= {experts} experts, got {list(indices.shape)}"
            )
        if gates is not None:
            _shape("gates", gates, tuple(indices.shape))


def check(given: Given) -> None:
    """Raise TypeError or ValueError, naming the argument, what is wanted and what came."""
    x, up, base, gate, top_k = given.x, given.up, given.base, given.gate, given.top_k
    checks.check_bool("return_routing", given.return_routing)
    checks.check_choice("activation", given.activation, ACTIVATIONS)
    checks.check_choice("gate", gate, GATES)
    checks.check_choice("router_input", given.router_input, ("token", "pooled"))
    checks.check_choice("plan", given.plan, ("auto", *planner.PLANS))
    checks.check_bool("renormalize", given.renormalize)
    _check_experts(given)
    experts, out = up.shape[:2]
    rows = {"x": x}
    if isinstance(base, str):
        checks.check_choice("base", base, ("input",))
        _shape("x", x, (*x.shape[:-1], out))
    elif base is not None:
        rows["base"] = _shape("base", base, (*x.shape[:-1], out))
    _check_gate(given, experts)
    if top_k is not None:
        if isinstance(top_k, bool) or not isinstance(top_k, int):
            raise TypeError(f"top_k: want an int, got {type(top_k).__name__}")
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k: want 1 <= top_k <= {experts} experts, got {top_k}")
    if given.plan == "sorted" and top_k is None and given.indices is None:
        raise ValueError(
            "plan: want 'stationary' or 'auto' where every expert is used, got 'sorted'"
        )
    for name, t in rows.items():
        checks.check_dtype(name, t, (x.dtype,), " like x")
        checks.check_device(name, t, x.device)
    for name in PARAMETERS:
        p = getattr(given, name)
        if p is not None:
            checks.check_dtype(name, p, (x.dtype, torch.float32), " (x's or float32)")
            checks.check_device(name, p, x.device)
    for name, t in (("mask", given.mask), ("indices", given.indices)):
        if t is not None:
            checks.check_device(name, t, x.device)
    checks.check_number("keep", given.keep)
    checks.check_number("mix", given.mix)


def _check_gate(given: Given, experts: int) -> None:
    gate = given.gate
    if gate != "softmax":
        names = ("router", "router_bias", "noise", "top_k", "mask")
        _absent(f"with gate={gate!r}", **{name: getattr(given, name) for name in names})
        if given.router_input != "token":
            raise ValueError(
                f"router_input: want 'token' with gate={gate!r}, got {given.router_input!r}"
            )
    if gate != "given":
        _absent(f"with gate={gate!r}", gates=given.gates, indices=given.indices)
    if gate == "softmax":
        _check_router(given, experts)
    elif gate == "given":
        _check_gates(given, experts)
