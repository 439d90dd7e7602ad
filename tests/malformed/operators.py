"""Calls of the operators that are right: each form of each, with as many arguments as it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import petal_kernels as pk
from tests.malformed.corruptions import Case

B, L, D, R, OUT, E = 2, 3, 4, 5, 6, 3


def t(*shape: int) -> Tensor:
    return torch.full(shape, 0.5)


def rng() -> Tensor:
    return torch.tensor([1, 2])


def contract() -> dict[str, Any]:
    return {"core": t(R, R, R), "modes": t(2, R), "up": t(OUT, R)}


def contract_cp() -> dict[str, Any]:
    return {"core": t(R), "modes": t(2, R), "up": t(OUT, R), "dtype": torch.float32}


def linear() -> dict[str, Any]:
    return {
        "x": t(B, L, D),
        "down": t(R, D),
        "ups": [t(OUT, R), t(2, R)],
        "weights": [t(OUT, D), t(2, D)],
        "biases": [t(OUT), None],
        "dropout": 0.1,
        "rng": rng(),
    }


def linear_own() -> dict[str, Any]:
    values = {"x": t(B, L, D), "down": [t(R, D), t(3, D)], "ups": [t(OUT, R), t(2, 3)]}
    return values | {"scale": [1.0, 2.0], "dropout": 0.1, "dropout_at": "input", "rng": rng()}


def linear_base() -> dict[str, Any]:
    values = {"x": t(B, L, D), "down": t(R, D), "ups": [t(OUT, R), t(2, R)]}
    return values | {"base": [t(B, L, OUT), t(B, L, 2)]}


def linear_hidden() -> dict[str, Any]:
    values = {"x": None, "down": None, "ups": [t(OUT, R), t(2, R)], "hidden": t(B, L, R)}
    return values | {"core": t(2, R, R), "dropout_at": "mode"}


def linear_shared() -> dict[str, Any]:
    values = {"x": t(B, L, D), "down": None, "ups": [t(OUT, R)], "hidden": t(B, L, R)}
    return values | {"weights": [t(OUT, D)]}


def gated() -> dict[str, Any]:
    return {
        "x": t(B, L, D),
        "down": t(R, D),
        "up": t(OUT, R),
        "down_bias": t(R),
        "up_bias": t(OUT),
        "base": t(B, L, OUT),
        "gate": "large",
        "gate_input": t(B, L, 7),
        "gate_down": t(2, 7),
        "gate_down_bias": t(2),
        "gate_up": t(OUT, 2),
        "gate_up_bias": t(OUT),
        "dropout": 0.1,
        "residual": t(B, L, OUT),
        "norm_weight": t(OUT),
        "norm_bias": t(OUT),
        "rng": rng(),
    }


def gated_token() -> dict[str, Any]:
    values = {"x": t(B, L, D), "down": t(R, D), "up": t(D, R), "base": "input", "gate": "middleX"}
    more = {"gate_input": t(B, L, D), "gate_weight": t(D), "gate_bias": t(1)}
    return values | more | {"residual": "gate_input"}


def gated_column() -> dict[str, Any]:
    values = {"x": t(B, L, D), "down": t(R, D), "up": t(D, R), "gate": "middleY"}
    return values | {"gate_weight": t(D)}


def gated_small() -> dict[str, Any]:
    values = {"x": t(B, L, D), "down": t(R, D), "up": t(D, R), "gate": "small"}
    more = {"gate_input": t(B, L, D), "gate_weight": t(2 * D), "gate_bias": t(1)}
    return values | more | {"mask": t(B, L)}


def gated_routed() -> dict[str, Any]:
    values = {"x": t(B, L, D), "down": t(R, D), "up": t(D, R), "route": "gram"}
    return values | {"vision": t(B, 2, R)}


def gated_given() -> dict[str, Any]:
    values = {"x": None, "down": None, "up": t(OUT, R), "bottleneck": t(B, L, R)}
    return values | {"base": t(B, L, OUT)}


def gated_columns() -> dict[str, Any]:
    values = {"x": None, "down": None, "up": t(OUT, R), "bottleneck": t(B, L, R)}
    return values | {"base": t(B, L, 2 * OUT), "update_at": OUT}


def mlp() -> dict[str, Any]:
    """Widths that tell the linears apart, whichever is left out."""
    return {
        "x": t(B, L, D),
        "weights": [t(7, D), t(7, D), t(OUT, 7)],
        "biases": [t(7), None, t(OUT)],
        "downs": [t(R, D), t(3, D), t(2, 7)],
        "ups": [t(7, R), t(7, 3), t(OUT, 2)],
        "scale": [1.0, 2.0, 3.0],
        "dropout": 0.1,
        "rng": rng(),
    }


def mlp_plain() -> dict[str, Any]:
    values = {"x": t(B, L, D), "weights": [t(7, D), t(OUT, 7)], "activation": "gelu"}
    return values | {"downs": [None, t(2, 7)], "ups": [None, t(OUT, 2)], "recompute": True}


def mlp_frozen() -> dict[str, Any]:
    return {"x": t(B, L, D), "weights": [t(7, D), t(7, D), t(OUT, 7)], "scale": 2.0}


def norm() -> dict[str, Any]:
    values = {"x": t(B, L, D), "weight": t(D), "bias": t(D), "kind": "layer"}
    return values | {"eps": 1e-5, "recompute": True}


def norm_rms() -> dict[str, Any]:
    return {"x": t(B, L, D), "weight": t(D)}


def experts() -> dict[str, Any]:
    return {
        "x": t(B, L, D),
        "down": t(E, R, D),
        "up": t(E, OUT, R),
        "down_bias": t(E, R),
        "up_bias": t(E, OUT),
        "base": t(B, L, OUT),
        "router": t(E, D),
        "router_bias": t(E),
        "noise": t(B, L, E),
        "top_k": 2,
    }


def experts_pooled() -> dict[str, Any]:
    values = {"x": t(B, L, D), "down": t(1, R, D), "up": t(E, D, R), "router_input": "pooled"}
    return values | {"router": t(E, D), "router_bias": t(E), "noise": t(B, E), "mask": t(B, L)}


def experts_gates() -> dict[str, Any]:
    values = {"x": t(B, L, D), "down": t(E, R, D), "up": t(E, D, R), "gate": "given"}
    return values | {"gates": t(B, E)}


def experts_indices() -> dict[str, Any]:
    values = {"x": t(B, L, D), "down": t(E, R, D), "up": t(E, D, R), "gate": "given"}
    return values | {"gates": t(B, L, 2), "indices": torch.ones(B, L, 2, dtype=torch.int64)}


def experts_mean() -> dict[str, Any]:
    return {"x": t(B, L, D), "down": t(E, R, D), "up": t(E, D, R), "gate": "mean"}


FORMS: list[tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = [
    (pk.mode_contract, contract),
    (pk.mode_contract, contract_cp),
    *(
        (pk.lowrank_linear, f)
        for f in (linear, linear_own, linear_base, linear_hidden, linear_shared)
    ),
    *((pk.gated_bottleneck, f) for f in (gated, gated_token, gated_column, gated_small)),
    *((pk.gated_bottleneck, f) for f in (gated_routed, gated_given, gated_columns)),
    *((pk.gated_mlp, f) for f in (mlp, mlp_plain, mlp_frozen)),
    *((pk.frozen_norm, f) for f in (norm, norm_rms)),
    *((pk.expert_dispatch, f) for f in (experts, experts_pooled, experts_gates)),
    *((pk.expert_dispatch, f) for f in (experts_indices, experts_mean)),
]

# Calls that are right although an argument was changed: leading dims are free, a number may be
# negative, an optional operand may be left out.
ANY_ROWS = ("x: rank?1", "x: size*@-3", "x: size*@-2")
NUMBERS = ("scale", "keep", "mix")
ALWAYS = (
    *(f"{n}: {what}" for n in NUMBERS for what in ("one", "negative")),
    "norm_eps: one",
    "eps: one",
)
MASK = tuple(f"mask: {kind}" for kind in ("int64", "half", "float8", "bool dtype"))
TWO_SCALES = "scale: list"  # one for each of two outputs
LEGAL: dict[str, tuple[str, ...]] = {
    "contract": ("modes: size*@-2", "up: size*@-2"),
    "contract_cp": ("modes: size*@-2", "up: size*@-2"),
    "linear": (*ANY_ROWS, TWO_SCALES),
    "linear_own": (
        *ANY_ROWS,
        "x: half",
        "ups: first size+1@-2",
        TWO_SCALES,
        *(f"scale: {what}" for what in ("number", "first negative", "first one")),
    ),
    "linear_base": (TWO_SCALES,),
    "linear_hidden": (
        TWO_SCALES,
        "ups: first size*@-2",
        "hidden: half",
        *(row.replace("x:", "hidden:") for row in ANY_ROWS),
    ),
    "gated": ("base: None", "residual: beside columns"),
    "gated_token": ("base: [nN]one",),
    "gated_column": (*ANY_ROWS, "x: half", "base: [nN]one"),
    "gated_small": (*MASK, "base: [nN]one"),
    "gated_routed": ("x: size*@-2", "vision: size+1@-2", "base: [nN]one"),
    "gated_given": ("base: None", "residual: beside columns"),
    "gated_columns": ("update_at: zero", "base: size+1@-1"),
    "mlp": (*ANY_ROWS, *(f"scale: {what}" for what in ("number", "first negative", "first one"))),
    "mlp_plain": (*ANY_ROWS, TWO_SCALES),
    "mlp_frozen": (*ANY_ROWS, "dropout: *"),
    "norm": ANY_ROWS,
    "norm_rms": ANY_ROWS,
    "experts": ("base: None",),
    "experts_pooled": (
        *MASK,
        *("x: half", "base: [nN]one"),
    ),
    "experts_gates": ("x: half", "x: size*@-2", "base: [nN]one"),
    "experts_indices": ("x: half", "base: [nN]one"),
    "experts_mean": (*ANY_ROWS, "x: half", "base: [nN]one"),
}
MORE: dict[str, dict[str, Any]] = {
    "dropout": {"above 1": 1.5},
    "norm_eps": {"below 0": -1e-5},
    "eps": {"below 0": -1e-5, "beyond float32": 1e39},
    "indices": {
        "beyond": torch.full((B, L, 2), E),
        "below": torch.full((B, L, 2), -1),
        "too many": torch.zeros(B, L, E + 1, dtype=torch.int64),
    },
    "top_k": {"beyond": E + 1},
    "update_at": {"beyond": OUT + 1},
    "base": {"not contiguous": torch.zeros(B, 2 * OUT, L).transpose(1, 2)},
    "residual": {"beside columns": t(B, L, OUT)},
    "weights": {"trained": [torch.zeros(OUT, D, requires_grad=True), torch.zeros(2, D)]},
}


def explained(operator: Callable[..., Any]) -> Callable[..., Any]:
    def explain(**arguments: Any) -> Any:
        return pk.explain(operator, **arguments)

    return explain


def cases() -> list[Case]:
    """Every form, called and explained."""
    found = []
    for operator, form in FORMS:
        legal = (*ALWAYS, *LEGAL.get(form.__name__, ()))
        name = f"{operator.__name__}-{form.__name__}"
        for label, call in ((name, operator), (f"explain-{name}", explained(operator))):
            found.append(
                Case(
                    name=label, call=call, valid=form, legal=legal, more=MORE, signature_of=operator
                )
            )
    return found
