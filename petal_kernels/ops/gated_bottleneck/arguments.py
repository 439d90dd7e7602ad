"""The arguments of ``gated_bottleneck``: what backends receive, and the checks of what users give.

The public function reduces its options to few kinds before a backend sees them: every routing
function is ``add``, ``mul`` or a ``product`` with one or two small matrices per sample, and all
leading dims are flat.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from petal_kernels._runtime import checks, philox
from petal_kernels._runtime.numerics import ACTIVATIONS

ROUTES = ("none", "add", "mul", "expand", "gram", "gram_relu")
GATES = ("none", "large", "middleX", "middleY", "small")
VARIANTS = ("paper", "release")


class Given(NamedTuple):
    """The public function's arguments, as they came."""

    x: Any
    down: Any
    up: Any
    down_bias: Any
    up_bias: Any
    base: Any
    bottleneck: Any
    activation: Any
    route: Any
    vision: Any
    gate: Any
    gate_input: Any
    gate_down: Any
    gate_down_bias: Any
    gate_up: Any
    gate_up_bias: Any
    gate_weight: Any
    gate_bias: Any
    mask: Any
    scale: Any
    dropout: Any
    residual: Any
    norm_weight: Any
    norm_bias: Any
    norm_eps: Any
    variant: Any
    update_at: Any
    training: Any
    rng: Any
    backend: Any


class Tensors(NamedTuple):
    """Every tensor argument, None where it is not given.

    Row tensors (``ROWS``) are [N, width] with unit stride in the last dim in a backend's hands.
    """

    x: Tensor | None  # [N, D]
    down: Tensor | None  # [r, D]
    down_bias: Tensor | None  # [r]
    bottleneck: Tensor | None  # [N, r], in place of x, down and down_bias
    up: Tensor  # [O, r]
    up_bias: Tensor | None  # [O]
    base: Tensor | None  # [N, O]
    left: Tensor | None  # [B, V, r]; add and mul: [B, 1, r]
    right: Tensor | None  # [B, V, r]; None: the identity
    gate_input: Tensor | None  # [N, Dg]
    gate_down: Tensor | None  # large: [rg, Dg]
    gate_down_bias: Tensor | None  # large: [rg]
    gate_up: Tensor | None  # large: [O, rg]
    gate_up_bias: Tensor | None  # large: [O]
    gate_weight: Tensor | None  # middleX, middleY: [O]; small: [2 O], gate_input's half first
    gate_bias: Tensor | None  # middleX, small: [1]
    token_weights: Tensor | None  # small: fp32 (fp64) [N], sums to 1 over a sample; None: 1 / L
    residual: Tensor | None  # [N, O]
    norm_weight: Tensor | None  # [O]
    norm_bias: Tensor | None  # [O]


ROWS = ("x", "bottleneck", "base", "gate_input", "residual")
PARAMETERS = (
    "down",
    "down_bias",
    "up",
    "up_bias",
    "gate_down",
    "gate_down_bias",
    "gate_up",
    "gate_up_bias",
    "gate_weight",
    "gate_bias",
    "norm_weight",
    "norm_bias",
)


class Settings(NamedTuple):
    """Everything that is no tensor, in the order of the raw operators' schemas."""

    activation: str  # of ACTIVATIONS; serves the large gate's bottleneck too
    add_input: bool  # H is x
    route: str  # "none", "add", "mul" or "product": q = (f(z) left^T) right
    route_relu: bool  # product: f is relu, else the identity
    gate: str  # of GATES
    gate_sees_output: bool  # middleX, small: the logit reads Y in place of H
    gate_linear: bool  # middleY: 1 + w in place of 1 + sigmoid(w)
    add_gate_input: bool  # the residual is gate_input
    samples: int  # B: N = B * L, tokens of a sample adjacent; 1 where nothing is per sample
    scale: float
    dropout: float
    norm_eps: float


class Call(NamedTuple):
    """One call as a backend gets it."""

    tensors: Tensors
    settings: Settings

    @property
    def first(self) -> Tensor:
        """The tensor whose rows, dtype and device the output has."""
        t = self.tensors.x if self.tensors.x is not None else self.tensors.bottleneck
        assert t is not None
        return t

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.first.device

    @property
    def is_cuda(self) -> bool:
        """Whether that is a GPU."""
        return self.first.is_cuda

    @property
    def has_logits(self) -> bool:
        """Whether the gate is one number per token or sample."""
        return self.settings.gate in ("middleX", "small")


class Saved(NamedTuple):
    """What a forward leaves for backward besides its inputs; None where there is nothing."""

    z: Tensor | None  # [N, r] before the route, in x's dtype; None where the bottleneck was given
    zg: Tensor | None  # large: [N, rg], in x's dtype
    logits: Tensor | None  # middleX, small: fp32 (fp64) [N]
    moments: Tensor | None  # with a norm: fp32 (fp64) [N, 2], mean and 1 / deviation of u


def _size(name: str, value: Any, want: tuple[Any, ...]) -> Tensor:
    checks.check_shape(name, checks.check_tensor(name, value), want)
    return value  # type: ignore[no-any-return]


def _sizes(given: Given, **wanted: int) -> None:
    """Vectors, where they are given."""
    for name, size in wanted.items():
        value = getattr(given, name)
        if value is not None:
            _size(name, value, (size,))


def _absent(reason: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: want None {reason}, got a {type(value).__name__}")


def _check_source(given: Given) -> tuple[Tensor, int, dict[str, Tensor]]:
    """The first tensor, the rank, and the rows found."""
    x, down, down_bias, bottleneck = given.x, given.down, given.down_bias, given.bottleneck
    if bottleneck is not None:
        _absent("when bottleneck is given", down=down, down_bias=down_bias)
        checks.check_floating("bottleneck", bottleneck)
        if bottleneck.dim() < 1 or bottleneck.shape[-1] < 1:
            raise ValueError(
                f"bottleneck: want shape [..., r] with r >= 1, got {list(bottleneck.shape)}"
            )
        return bottleneck, bottleneck.shape[-1], {"bottleneck": bottleneck}
    for name, value in (("x", x), ("down", down)):
        if value is None:
            raise TypeError(
                f"{name}: want a Tensor (or bottleneck instead of x and down), got None"
            )
        checks.check_floating(name, value)
    if x.dim() < 1:
        raise ValueError(f"x: want shape [..., D], got {list(x.shape)}")
    _size("down", down, ("r", x.shape[-1]))
    if down.shape[0] < 1 or down.shape[1] < 1:
        raise ValueError(f"down: want r >= 1 and D >= 1, got {list(down.shape)}")
    if down_bias is not None:
        _size("down_bias", down_bias, (down.shape[0],))
    return x, down.shape[0], {"x": x}


def _check_gate(given: Given, lead: tuple[int, ...], out: int) -> None:
    gate, mask = given.gate, given.mask
    wanted = {
        "none": (),
        "large": ("gate_input", "gate_down", "gate_up"),
        "middleX": ("gate_input", "gate_weight"),
        "middleY": ("gate_weight",),
        "small": ("gate_input", "gate_weight"),
    }[gate]
    for name in wanted:
        if getattr(given, name) is None:
            raise TypeError(f"{name}: want a Tensor with gate={gate!r}, got None")
    others = {"gate_input", "gate_down", "gate_up", "gate_weight"}.difference(wanted)
    others -= {"gate_input"} if isinstance(given.residual, str) else set()
    others |= set() if gate == "large" else {"gate_down_bias", "gate_up_bias"}
    others |= set() if gate in ("middleX", "small") else {"gate_bias"}
    _absent(f"with gate={gate!r}", **{n: getattr(given, n) for n in Given._fields if n in others})
    if mask is not None:
        if gate != "small":
            raise ValueError(f"mask: want None with gate={gate!r}, got a Tensor")
        if given.variant == "release":
            raise ValueError(
                "mask: want None with variant='release', whose mean includes padding, got a Tensor"
            )
        checks.check_mask("mask", mask, lead)
    if given.gate_input is not None:
        width = "Dg" if gate == "large" and not isinstance(given.residual, str) else out
        _size("gate_input", given.gate_input, (*lead, width))
    if gate == "large":
        _size("gate_down", given.gate_down, ("rg", given.gate_input.shape[-1]))
        rank = given.gate_down.shape[0]
        _size("gate_up", given.gate_up, (out, rank))
        if rank < 1:
            raise ValueError(f"gate_down: want rg >= 1, got {list(given.gate_down.shape)}")
        _sizes(given, gate_down_bias=rank, gate_up_bias=out)
    elif gate != "none":
        _size("gate_weight", given.gate_weight, (2 * out if gate == "small" else out,))
        _sizes(given, gate_bias=1)


def _check_route(route: str, first: Tensor, rank: int, vision: Any, variant: str) -> None:
    if route == "none":
        _absent("with route='none'", vision=vision)
        return
    if vision is None:
        raise TypeError(
            f"vision: want a Tensor [B, V, r], the vision features' projection, with "
            f"route={route!r}, got None"
        )
    checks.check_tensor("vision", vision)
    if first.dim() != 3:
        raise ValueError(f"x: want shape [B, L, D] with route={route!r}, got {list(first.shape)}")
    _size("vision", vision, (first.shape[0], "V", rank))
    if vision.shape[1] < 1:
        raise ValueError(f"vision: want V >= 1, got {list(vision.shape)}")
    if variant == "release" and route in ("add", "mul", "expand") and vision.shape[1] > 1:
        raise ValueError(
            f"vision: want V = 1 with route={route!r} and variant='release', whose code averages "
            f"none (add and mul of V = L tokens: nn.GatedAdapter), got {list(vision.shape)}"
        )


def columns_to_update(given: Given) -> Tensor:
    """The columns of base that ``update_at`` names; raises unless the call is a plain sum."""
    first, base = given.update_at, given.base
    if not isinstance(first, int) or isinstance(first, bool):
        raise TypeError(f"update_at: want an int, got {type(first).__name__}")
    up = checks.check_tensor("up", given.up)
    if not isinstance(base, Tensor):
        raise TypeError(f"base: want a Tensor with update_at, got {type(base).__name__}")
    checks.check_tensor("base", base)
    if base.dim() < 1 or up.dim() < 1:
        name = "up" if base.dim() else "base"
        raise ValueError(f"{name}: want shape [{'O, r' if name == 'up' else '..., W'}], got []")
    if not base.is_contiguous() or (base.is_leaf and base.requires_grad):
        got = "a leaf that requires grad" if base.is_contiguous() else f"strides {base.stride()}"
        raise ValueError(
            f"base: want a contiguous tensor that is no leaf with update_at, got {got}"
        )
    if not 0 <= first <= base.shape[-1] - up.shape[0]:
        raise ValueError(
            f"update_at: want 0 <= update_at <= {base.shape[-1] - up.shape[0]}, got {first}"
        )
    plain = {"gate": "none", "scale": 1.0, "dropout": 0.0, "residual": None, "norm_weight": None}
    for name, value in plain.items():
        got = getattr(given, name)
        if value is None and got is not None:
            raise ValueError(f"{name}: want None with update_at, got a {type(got).__name__}")
        # What is no number or name is the check's to refuse, by its type.
        if isinstance(got, (str, int, float)) and got != value:
            raise ValueError(f"{name}: want {value!r} with update_at, got {got!r}")
    return base[..., first : first + up.shape[0]]


def check(given: Given) -> None:
    """Raise TypeError or ValueError, naming the argument, what is wanted and what came."""
    checks.check_choice("activation", given.activation, ACTIVATIONS)
    checks.check_choice("route", given.route, ROUTES)
    checks.check_choice("gate", given.gate, GATES)
    checks.check_choice("variant", given.variant, VARIANTS)
    first, rank, rows = _check_source(given)
    lead = tuple(first.shape[:-1])
    _size("up", given.up, ("O", rank))
    out = given.up.shape[0]
    if out < 1:
        raise ValueError(f"up: want O >= 1, got {list(given.up.shape)}")
    _sizes(given, up_bias=out)
    rows |= _check_base(given, lead, out)
    _check_gate(given, lead, out)
    if given.gate == "small" and first.dim() != 3:
        raise ValueError(f"x: want shape [B, L, D] with gate='small', got {list(first.shape)}")
    _check_route(given.route, first, rank, given.vision, given.variant)
    if (given.norm_weight is None) != (given.norm_bias is None):
        missing = "norm_bias" if given.norm_bias is None else "norm_weight"
        raise TypeError(f"{missing}: want norm_weight and norm_bias together, got None")
    _sizes(given, norm_weight=out, norm_bias=out)
    rows |= {n: t for n in ("gate_input", "vision") if (t := getattr(given, n)) is not None}
    for name, t in rows.items():
        checks.check_dtype(name, t, (first.dtype,), " like the activations")
        checks.check_device(name, t, first.device)
    allowed = (first.dtype, torch.float32)
    for name in PARAMETERS:
        p = getattr(given, name)
        if p is not None:
            checks.check_dtype(name, p, allowed, " (the activations' or float32)")
            checks.check_device(name, p, first.device)
    if given.mask is not None:
        checks.check_device("mask", given.mask, first.device)
    checks.check_number("scale", given.scale)
    philox.check_probability(given.dropout)
    if checks.check_number("norm_eps", given.norm_eps) < 0:
        raise ValueError(f"norm_eps: want a number >= 0, got {given.norm_eps}")
    checks.check_bool("training", given.training)
    if given.rng is not None:
        checks.check_rng("rng", given.rng, first.device)


def _check_base(given: Given, lead: tuple[int, ...], out: int) -> dict[str, Tensor]:
    """H and the residual; the rows found."""
    x, base, residual, rows = given.x, given.base, given.residual, {}
    if isinstance(base, str):
        checks.check_choice("base", base, ("input",))
        if x is None:
            raise TypeError("x: want a Tensor with base='input', got None")
        if given.bottleneck is not None:
            checks.check_floating("x", x)
            rows["x"] = x
        _size("x", x, (*lead, out))
    else:
        if given.bottleneck is not None:
            _absent("when bottleneck is given and base is not 'input'", x=x)
        if base is not None:
            rows["base"] = _size("base", base, (*lead, out))
    if isinstance(residual, str):
        checks.check_choice("residual", residual, ("gate_input",))
        if given.gate_input is None:
            raise TypeError("gate_input: want a Tensor with residual='gate_input', got None")
    elif residual is not None:
        rows["residual"] = _size("residual", residual, (*lead, out))
    return rows
