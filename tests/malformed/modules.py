"""Calls of the modules that are right: every constructor, and every method that takes arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels.nn import mutual_information
from tests.malformed.corruptions import Case

B, L, D, R, OUT, E = 2, 3, 4, 5, 6, 3


def t(*shape: int) -> Tensor:
    return torch.full(shape, 0.5)


def labels() -> Tensor:
    return torch.tensor([[1, 2, -100], [3, 4, 5]])


# -- constructors ---------------------------------------------------------------------------------

_KIND: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
_ROUTER: dict[str, Any] = {"top_k": 2, "router_noise": 0.5}

CONSTRUCTORS: dict[type[nn.Module], Callable[[], dict[str, Any]]] = {
    pk.nn.ModeApproximation: lambda: (
        {"in_features": D, "out_features": OUT, "r": R, "n_modes": 2, "dropout": 0.1} | _KIND
    ),
    pk.nn.GatedAdapter: lambda: (
        {"features": D, "r": R, "gate": "large", "gate_r": 2, "gate_features": 7} | _KIND
    ),
    pk.nn.CompacterAdapter: lambda: (
        {"features": 2 * D, "r": 2 * R, "division": 2, "factor_r": 1, "gate": "large", "gate_r": 2}
        | _KIND
    ),
    pk.nn.CompacterValueAdapter: lambda: (
        {"in_features": 2 * D, "out_features": 4, "r": 2 * R, "layers": 2, "factor_r": 1} | _KIND
    ),
    pk.nn.PHMRule: lambda: {"division": 2, "count": 3} | _KIND,
    pk.nn.VLAdapter: lambda: {"features": D, "r": R} | _KIND,
    pk.nn.RoutedAdapter: lambda: {"features": D, "r": R, "route": "gram"} | _KIND,
    pk.nn.RoutedLoRALinear: lambda: {
        "base": nn.Linear(D, OUT),
        "r": R,
        "parts": 2,
        "targets": [0, 1],
        "alpha": 4.0,
        "dropout": 0.1,
        "dtype": torch.float32,
    },
    pk.nn.LoRALinear: lambda: {
        "base": nn.Linear(D, OUT),
        "r": R,
        "alpha": 4.0,
        "rslora": True,
        "dropout": 0.1,
        "init": "gaussian",
        "dtype": torch.float32,
    },
    pk.nn.DoRALinear: lambda: {
        "base": nn.Linear(D, OUT),
        "r": R - 1,
        "alpha": 4.0,
        "rslora": True,
        "dropout": 0.1,
        "init": "olora",
        "dtype": torch.float32,
    },
    pk.nn.ValueAdapter: lambda: (
        {"in_features": D, "out_features": OUT, "r": R, "layers": 2} | _KIND
    ),
    pk.nn.InstructionExperts: lambda: (
        {"features": D, "experts": E, "r": R, "keep": 0.5, "tokens": "text"} | _ROUTER | _KIND
    ),
    pk.nn.ExpertAdapter: lambda: {"features": D, "experts": E, "r": R} | _ROUTER | _KIND,
    pk.nn.ExpertLoRALinear: lambda: {
        "base": nn.Linear(D, OUT),
        "experts": E,
        "r": R,
        "alpha": 4.0,
        **_ROUTER,
        "dtype": torch.float32,
    },
    pk.nn.FrozenLinear: lambda: {"base": nn.Linear(D, OUT)},
    pk.nn.ScaleShift: lambda: {"features": D} | _KIND,
    pk.nn.MutualInformationLoss: lambda: {
        "image_features": D,
        "features": R,
        "vocabulary": 9,
        "weight": 0.1,
        "device": torch.device("cpu"),
    },
    mutual_information.ClubBound: lambda: {
        "features": D,
        "outputs": 9,
        "hidden": 4,
        "device": torch.device("cpu"),
    },
    mutual_information.MineBound: lambda: {
        "x_features": D,
        "z_features": R,
        "hidden": 4,
        "device": torch.device("cpu"),
    },
}

# -- methods: (module, method, a call that is right, what else is right) ---------------------------

Method = tuple[Callable[[], nn.Module], str, Callable[[], dict[str, Any]], tuple[str, ...]]


def _modes() -> nn.Module:
    return pk.nn.ModeApproximation(D, OUT, R, 2)


def _gated(gate: str = "middleX", route: str = "none") -> nn.Module:
    return pk.nn.GatedAdapter(D, R, gate=gate, route=route)


def _lora(**more: Any) -> nn.Module:
    return pk.nn.RoutedLoRALinear(nn.Linear(D, OUT), R, **more)


def _plain_lora() -> nn.Module:
    return pk.nn.LoRALinear(nn.Linear(D, OUT).requires_grad_(False), R, dropout=0.1)


def _magnitude() -> nn.Module:
    return pk.nn.DoRALinear(nn.Linear(D, OUT).requires_grad_(False), R, dropout=0.1)


def _instruction(**more: Any) -> nn.Module:
    return pk.nn.InstructionExperts(D, E, R, **more)


def _domain() -> Tensor:
    return torch.ones(B, L, dtype=torch.int64)


ROWS = ("size*@-3", "size*@-2", "rank?1")


def rows(*names: str) -> tuple[str, ...]:
    """Leading dims are free."""
    return tuple(f"{name}: {row}" for name in names for row in ROWS)


METHODS: list[Method] = [
    (_modes, "forward", lambda: {"x": t(B, L, D), "base": [t(B, L, OUT), t(B, L, OUT)]}, ()),
    (_modes, "forward", lambda: {"x": t(B, L, D), "index": [1]}, rows("x")),
    (_modes, "contract", lambda: {"index": [0, 1], "dtype": torch.float32}, ()),
    (
        _gated,
        "forward",
        lambda: {
            "h": t(B, L, D),
            "x": t(B, L, D),
            "dropout": 0.1,
            "residual": t(B, L, D),
            "norm": nn.LayerNorm(D),
            "training": False,
        },
        (),
    ),
    (
        lambda: _gated("small", "gram"),
        "forward",
        lambda: {"h": t(B, L, D), "x": t(B, L, D), "mask": t(B, L), "vision": t(B, 2, R)},
        (),
    ),
    (_gated, "project", lambda: {"vision": t(B, 2, D)}, ()),
    (_lora, "forward", lambda: {"x": t(B, L, D)}, rows("x")),
    (lambda: _lora(route="gram"), "forward", lambda: {"x": t(B, L, D), "vision": t(B, 2, R)}, ()),
    (_lora, "project", lambda: {"vision": t(B, 2, D)}, ()),
    (_lora, "adapted", lambda: {"base": nn.Linear(D, OUT), "x": t(B, L, D)}, rows("x")),
    (_lora, "update", lambda: {"y": t(B, L, OUT), "x": t(B, L, D)}, ()),
    (_lora, "delta", lambda: {"dtype": torch.float32}, ()),
    (
        _plain_lora,
        "forward",
        lambda: {"x": t(B, L, D), "bias": t(OUT)},
        rows("x"),
    ),
    (
        _plain_lora,
        "operands",
        lambda: {"dtype": torch.float32, "device": torch.device("cpu"), "bias": t(OUT)},
        (),
    ),
    (_plain_lora, "reset_parameters", lambda: {"init": "gaussian"}, ()),
    (_plain_lora, "delta", lambda: {"dtype": torch.float32}, ()),
    (_magnitude, "forward", lambda: {"x": t(B, L, D), "bias": t(OUT)}, rows("x")),
    (
        _magnitude,
        "operands",
        lambda: {"dtype": torch.float32, "device": torch.device("cpu"), "bias": t(OUT)},
        (),
    ),
    (_magnitude, "reset_parameters", lambda: {"init": "gaussian"}, ()),
    (_magnitude, "delta", lambda: {"dtype": torch.float32}, ()),
    (
        lambda: pk.nn.ValueAdapter(D, OUT, R, 2),
        "forward",
        lambda: {"values": t(B, L, OUT), "middle": t(B, L, R), "layer": 1},
        (),
    ),
    (
        lambda: pk.nn.ValueAdapter(D, OUT, R, 2),
        "project",
        lambda: {"encoded": t(B, L, D), "layer": 1},
        rows("encoded"),
    ),
    (
        lambda: _instruction(router_input="pooled"),
        "forward",
        lambda: {"embeddings": t(B, L, D), "queries": 1, "mask": t(B, L)},
        (),
    ),
    (
        lambda: pk.nn.ExpertAdapter(D, E, R, router_input="pooled"),
        "forward",
        lambda: {"h": t(B, L, D), "mask": t(B, L)},
        (),
    ),
    (
        lambda: pk.nn.ExpertAdapter(D, E, R, gate="domain"),
        "forward",
        lambda: {"h": t(B, L, D), "domain": _domain()},
        (),
    ),
    (
        lambda: pk.nn.ExpertLoRALinear(nn.Linear(D, OUT), E, R),
        "forward",
        lambda: {"x": t(B, L, D)},
        rows("x"),
    ),
    (
        lambda: pk.nn.ExpertLoRALinear(nn.Linear(D, OUT), E, R, gate="domain"),
        "adapted",
        lambda: {"base": nn.Linear(D, OUT), "x": t(B, L, D), "domain": _domain()},
        (),
    ),
    (
        lambda: pk.nn.ExpertAdapter(D, E, R, router_input="pooled"),
        "combine",
        lambda: {
            "x": t(B, L, D),
            "base": t(B, L, D),
            "keep": 1.0,
            "mix": 0.5,
            "mask": t(B, L),
            "training": False,
        },
        (),
    ),
    (lambda: pk.nn.ScaleShift(D), "forward", lambda: {"y": t(B, L, D), "a": t(B, L, D)}, ()),
    (
        lambda: pk.nn.MutualInformationLoss(D, R, 9),
        "forward",
        lambda: {"image": t(B, 4, D), "queries": t(B, 2, R), "labels": labels()},
        (),
    ),
    (
        lambda: pk.nn.MutualInformationLoss(D, R, 9),
        "likelihood",
        lambda: {"queries": t(B, 2, R), "labels": labels()},
        (),
    ),
]

FUNCTIONS: list[tuple[Callable[..., Any], Callable[[], dict[str, Any]], tuple[str, ...]]] = [
    (pk.nn.batch_context, lambda: {"c": t(B, L, D), "a": t(B, L, D)}, ()),
    (
        pk.nn.frozen_lowrank,
        lambda: {
            "x": t(B, L, D),
            "bases": [nn.Linear(D, OUT).requires_grad_(False)],
            "down": t(R, D),
            "ups": [t(OUT, R)],
            "dropout": 0.1,
            "training": False,
        },
        (),
    ),
]

# Where a number may be any: zero, one, negative.
NUMBERS = ("scale", "alpha", "keep", "mix", "weight", "beta")
# An operand of another floating dtype is converted, one for a pooled router is ignored elsewhere,
# and a number of tokens is free.
MASK = tuple(f"mask: {kind}" for kind in ("int64", "bool dtype", "float8", "half"))
LEGAL: dict[str, tuple[str, ...]] = {
    "RoutedLoRALinear.__init__": ("targets: one less", "targets: first zero"),
    "ModeApproximation.forward": ("x: half", "index: one more", "index: first zero"),
    "ModeApproximation.contract": ("index: one *", "index: first zero"),
    "GatedAdapter.forward": (
        *("h: half", "h: meta", "x: half", "residual: half", "training: bool"),
        *("vision: half", "vision: size+1@-2", *MASK),
    ),
    "GatedAdapter.project": ("vision: half", *rows("vision")),
    "RoutedLoRALinear.forward": (
        "vision: half",
        "vision: size+1@-2",
        "x: size=0@-3",
        "x: size*@-2",
    ),
    "RoutedLoRALinear.project": ("vision: half", *rows("vision")),
    "RoutedLoRALinear.update": ("y: half", "x: half"),
    "LoRALinear.forward": ("bias: half",),
    "LoRALinear.operands": ("bias: half", "device: None"),
    "DoRALinear.forward": ("bias: half",),
    "DoRALinear.operands": ("bias: half", "device: None"),
    "ValueAdapter.forward": ("values: half", "values: meta", "middle: half", "layer: zero"),
    "ValueAdapter.project": ("encoded: half", "layer: zero"),
    "InstructionExperts.forward": ("embeddings: half", "queries: zero", *MASK),
    "ExpertAdapter.forward": ("h: half", "mask: tensor", *MASK),
    "ExpertLoRALinear.forward": ("mask: tensor",),
    "ExpertLoRALinear.adapted": ("mask: tensor",),
    "ExpertAdapter.combine": ("x: half", "base: half", "base: None", *MASK),
    "ScaleShift.forward": ("y: half", "a: half"),
    "MutualInformationLoss.forward": (
        *("image: half", "image: size+1@-2", "queries: half", "queries: size+1@-2"),
        "labels: size*@-1",
    ),
    "MutualInformationLoss.likelihood": ("queries: half", "queries: size+1@-2", "labels: size*@-1"),
    "batch_context": ("c: half", "c: size*@-3", "c: size*@-2", "a: half", "a: size+1@-[23]"),
    "frozen_lowrank": ("down: half", "ups: first half", *rows("x")),
}
MORE: dict[str, dict[str, Any]] = {
    "dropout": {"above 1": 1.5},
    "top_k": {"beyond": E + 1},
    "targets": {"beyond": [0, 2], "descending": [1, 0], "twice": [0, 0]},
    "index": {"beyond": [2]},
    "layer": {"beyond": 2},
    "queries": {"beyond": L + 1},
    "domain": {"beyond": torch.full((B, L), E)},
    "labels": {"beyond": torch.full((B, 3), 9), "below": torch.full((B, 3), -1)},
}


def cases() -> list[Case]:
    """Every call of this file."""
    always = tuple(f"{name}: {what}" for name in NUMBERS for what in ("one", "negative"))
    always += ("dtype: None", "router_noise: one")
    found = []

    def add(
        name: str, call: Callable[..., Any], valid: Any, legal: tuple[str, ...], **more: Any
    ) -> None:
        legal = (*always, *legal, *LEGAL.get(name.split("-")[0], ()))
        found.append(Case(name=name, call=call, valid=valid, legal=legal, more=MORE, **more))

    for cls, form in CONSTRUCTORS.items():
        add(f"{cls.__name__}.__init__", cls, form, ())
    for number, (build, method, form, legal) in enumerate(METHODS):
        module = build()
        name = f"{type(module).__name__}.{method}-{number}"
        add(name, getattr(module, method), form, legal, watched=lambda m=module: m)
    for function, form, legal in FUNCTIONS:
        add(function.__name__, function, form, legal)
    return found
