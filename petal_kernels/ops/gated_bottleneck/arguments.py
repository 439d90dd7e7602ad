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
    gate_weight: Tensor | None  # middleX, middleY: [O]; small: [2 O], X's half first
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


def _absent(reason: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: want None {reason}, got a {type(value).__name__}")


def _check_source(
    x: Any, down: Any, down_bias: Any, bottleneck: Any
) -> tuple[Tensor, int, dict[str, Tensor]]:
    """The first tensor, the rank, and the rows found."""
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


def _check_gate(
    gate: str, lead: tuple[int, ...], out: int, given: dict[str, Any], variant: str
) -> None:
    names = ("gate_input", "gate_down", "gate_up", "gate_weight")
    wanted = {
        "none": (),
        "large": ("gate_input", "gate_down", "gate_up"),
        "middleX": ("gate_input", "gate_weight"),
        "middleY": ("gate_weight",),
        "small": ("gate_input", "gate_weight"),
    }[gate]
    for name in wanted:
        if given[name] is None:
            raise TypeError(f"{name}: want a Tensor with gate={gate!r}, got None")
    for name in names:
        if name not in wanted and not (name == "gate_input" and isinstance(given["residual"], str)):
            _absent(f"with gate={gate!r}", **{name: given[name]})
    if gate != "large":
        _absent(
            f"with gate={gate!r}",
            gate_down_bias=given["gate_down_bias"],
            gate_up_bias=given["gate_up_bias"],
        )
    if gate not in ("middleX", "small"):
        _absent(f"with gate={gate!r}", gate_bias=given["gate_bias"])
    if given["mask"] is not None:
        if gate != "small":
            raise ValueError(f"mask: want None with gate={gate!r}, got a Tensor")
        if variant == "release":
            raise ValueError(
                "mask: want None with variant='release', whose mean includes padding, got a Tensor"
            )
        checks.check_mask("mask", given["mask"], lead)
    if given["gate_input"] is not None:
        width = "Dg" if gate == "large" and not isinstance(given["residual"], str) else out
        _size("gate_input", given["gate_input"], (*lead, width))
    if gate == "large":
        _size("gate_down", given["gate_down"], ("rg", given["gate_input"].shape[-1]))
        rank = given["gate_down"].shape[0]
        _size("gate_up", given["gate_up"], (out, rank))
        if rank < 1:
            raise ValueError(f"gate_down: want rg >= 1, got {list(given['gate_down'].shape)}")
        for name, size in (("gate_down_bias", rank), ("gate_up_bias", out)):
            if given[name] is not None:
                _size(name, given[name], (size,))
    elif gate != "none":
        _size("gate_weight", given["gate_weight"], (2 * out if gate == "small" else out,))
        if given["gate_bias"] is not None:
            _size("gate_bias", given["gate_bias"], (1,))


def _check_route(route: str, first: Tensor, rank: int, vision: Any) -> None:
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


def _check_sums(
    x: Any, bottleneck: Any, base: Any, residual: Any, gate_input: Any, shape: tuple[int, ...]
) -> dict[str, Tensor]:
    """What the update and the output are added to; the rows found."""
    rows: dict[str, Tensor] = {}
    if isinstance(base, str):
        checks.check_choice("base", base, ("input",))
        if x is None:
            raise TypeError("x: want a Tensor with base='input', got None")
        if bottleneck is not None:
            checks.check_floating("x", x)
            rows["x"] = x
        _size("x", x, shape)
    else:
        if bottleneck is not None:
            _absent("when bottleneck is given and base is not 'input'", x=x)
        if base is not None:
            rows["base"] = _size("base", base, shape)
    if isinstance(residual, str):
        checks.check_choice("residual", residual, ("gate_input",))
        if gate_input is None:
            raise TypeError("gate_input: want a Tensor with residual='gate_input', got None")
    elif residual is not None:
        rows["residual"] = _size("residual", residual, shape)
    return rows


def _check_alike(first: Tensor, rows: dict[str, Tensor], parameters: dict[str, Any]) -> None:
    for name, t in rows.items():
        checks.check_dtype(name, t, (first.dtype,), " like the activations")
        checks.check_device(name, t, first.device)
    for name, p in parameters.items():
        if p is not None:
            checks.check_dtype(
                name, p, (first.dtype, torch.float32), " (the activations' or float32)"
            )
            checks.check_device(name, p, first.device)


def columns_to_update(first: Any, given: dict[str, Any]) -> Tensor:
    """The columns of base that ``update_at`` names; raises unless the call is a plain sum."""
    if not isinstance(first, int) or isinstance(first, bool):
        raise TypeError(f"update_at: want an int, got {type(first).__name__}")
    base, up = given["base"], checks.check_tensor("up", given["up"])
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
        got = given[name]
        if value is None and got is not None:
            raise ValueError(f"{name}: want None with update_at, got a {type(got).__name__}")
        # What is no number or name is the check's to refuse, by its type.
        if isinstance(got, (str, int, float)) and got != value:
            raise ValueError(f"{name}: want {value!r} with update_at, got {got!r}")
    return base[..., first : first + up.shape[0]]


def check(
    x: Any,
    down: Any,
    up: Any,
    down_bias: Any,
    up_bias: Any,
    base: Any,
    bottleneck: Any,
    activation: Any,
    route: Any,
    vision: Any,
    gate: Any,
    gate_input: Any,
    gate_down: Any,
    gate_down_bias: Any,
    gate_up: Any,
    gate_up_bias: Any,
    gate_weight: Any,
    gate_bias: Any,
    mask: Any,
    scale: Any,
    dropout: Any,
    residual: Any,
    norm_weight: Any,
    norm_bias: Any,
    norm_eps: Any,
    variant: Any,
    training: Any,
    rng: Any,
) -> None:
    """Raise TypeError or ValueError, naming the argument, what is wanted and what came."""
    checks.check_choice("activation", activation, ACTIVATIONS)
    checks.check_choice("route", route, ROUTES)
    checks.check_choice("gate", gate, GATES)
    checks.check_choice("variant", variant, VARIANTS)
    first, rank, rows = _check_source(x, down, down_bias, bottleneck)
    lead = tuple(first.shape[:-1])
    _size("up", up, ("O", rank))
    out = up.shape[0]
    if out < 1:
        raise ValueError(f"up: want O >= 1, got {list(up.shape)}")
    if up_bias is not None:
        _size("up_bias", up_bias, (out,))
    rows |= _check_sums(x, bottleneck, base, residual, gate_input, (*lead, out))
    given = {
        "gate_input": gate_input,
        "gate_down": gate_down,
        "gate_down_bias": gate_down_bias,
        "gate_up": gate_up,
        "gate_up_bias": gate_up_bias,
        "gate_weight": gate_weight,
        "gate_bias": gate_bias,
        "mask": mask,
        "residual": residual,
    }
    _check_gate(gate, lead, out, given, variant)
    if gate == "small" and first.dim() != 3:
        raise ValueError(f"x: want shape [B, L, D] with gate='small', got {list(first.shape)}")
    if gate_input is not None:
        rows["gate_input"] = gate_input
    _check_route(route, first, rank, vision)
    if vision is not None:
        rows["vision"] = vision
    if (norm_weight is None) != (norm_bias is None):
        missing = "norm_bias" if norm_bias is None else "norm_weight"
        raise TypeError(f"{missing}: want norm_weight and norm_bias together, got None")
    for name, t in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if t is not None:
            _size(name, t, (out,))
    parameters = {
        "down": down,
        "down_bias": down_bias,
        "up": up,
        "up_bias": up_bias,
        **{k: v for k, v in given.items() if k not in ("gate_input", "mask", "residual")},
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
    }
    _check_alike(first, rows, parameters)
    if mask is not None:
        checks.check_device("mask", mask, first.device)
    checks.check_number("scale", scale)
    philox.check_probability(dropout)
    if checks.check_number("norm_eps", norm_eps) < 0:
        raise ValueError(f"norm_eps: want a number >= 0, got {norm_eps}")
    checks.check_bool("training", training)
    if rng is not None:
        checks.check_rng("rng", rng, first.device)
