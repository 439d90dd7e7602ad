"""Compacter's adapters: a bottleneck whose two projections are sums of Kronecker products.

    h + act(h down^T + down_bias) up^T + up_bias,   down = sum_i kron(A_i, B_i),   up likewise

Both are formed once in each forward (`kronecker.py`), r x features numbers each, and then run as
any other adapter's; autograd takes their gradients on to A and B. Between forward and backward the
formed matrices stay in memory, 2 r features float32 numbers for each adapter. Source: Compacter
arXiv 2106.04647; on VL-BART, arXiv 2112.06825.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from petal_kernels.nn.gated_adapter import GatedAdapter
from petal_kernels.nn.kronecker import PHMRule, PHMWeight, check_divided, check_rule
from petal_kernels.nn.value_adapter import ValueAdapter


class CompacterAdapter(GatedAdapter):
    """One insertion: GatedAdapter with projections of PHM. Parameters are kept in `dtype`.

    features, r, gate, gate_r, activation, scale, variant   as GatedAdapter's
    division   n: how many products are summed; it divides features and r
    factor_r   rank of each B_i; None: whole
    rule       a PHMRule of that division that several adapters read; None: each projection has
               its own
    init       "normal": factors Glorot-uniform, rules N(0, 0.01^2), the gate as GatedAdapter's;
               "zero" and "identity": the up-projection starts at zero
    """

    division: int
    factor_r: int | None
    shared_rule: PHMRule | None
    phm_down: PHMWeight
    phm_up: PHMWeight

    def __init__(
        self,
        features: int,
        r: int,
        *,
        division: int = 2,
        factor_r: int | None = None,
        rule: PHMRule | None = None,
        gate: str = "none",
        gate_r: int | None = None,
        activation: str = "gelu_tanh",
        scale: float = 1.0,
        init: str = "normal",
        variant: str = "paper",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_divided("features", features, division)
        check_divided("r", r, division)
        check_rule(rule, division)
        # `_make` reads them while the base's __init__ runs. The rule stays a reference: a child
        # would be stored once for each adapter that reads it.
        self.__dict__.update(division=division, factor_r=factor_r, shared_rule=rule)
        super().__init__(
            features,
            r,
            gate=gate,
            gate_r=gate_r,
            activation=activation,
            scale=scale,
            init=init,
            variant=variant,
            device=device,
            dtype=dtype,
        )

    def _make(
        self, name: str, parameter: Callable[..., nn.Parameter], rows: int, columns: int
    ) -> None:
        like = parameter(0)
        weight = PHMWeight(
            rows,
            columns,
            self.division,
            factor_r=self.factor_r,
            rule=self.shared_rule,
            device=like.device,
            dtype=like.dtype,
        )
        self.add_module(f"phm_{name}", weight)

    def projections(self) -> tuple[Tensor, Tensor]:
        """down [r, features] and up [features, r], formed; float32 or wider."""
        return self.phm_down.formed(), self.phm_up.formed()

    def _reset_projections(self) -> None:
        draw(self.phm_down, self.phm_up, self.init)

    def extra_repr(self) -> str:
        return with_form(super().extra_repr(), self.division, self.factor_r)


class CompacterValueAdapter(ValueAdapter):
    """ValueAdapter with projections of PHM, a rule and factors for each layer.

    in_features, out_features, r, layers, activation, scale   as ValueAdapter's
    division, factor_r, rule, init                     as CompacterAdapter's; division divides all
                                                       three sizes, a given rule serves all layers
    """

    division: int
    factor_r: int | None
    shared_rule: PHMRule | None
    phm_down: PHMWeight
    phm_up: PHMWeight

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        layers: int = 1,
        *,
        division: int = 2,
        factor_r: int | None = None,
        rule: PHMRule | None = None,
        activation: str = "gelu_tanh",
        scale: float = 1.0,
        init: str = "normal",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        for name, size in (("in_features", in_features), ("out_features", out_features), ("r", r)):
            check_divided(name, size, division)
        check_rule(rule, division)
        self.__dict__.update(division=division, factor_r=factor_r, shared_rule=rule)  # as above
        super().__init__(
            in_features,
            out_features,
            r,
            layers,
            activation=activation,
            scale=scale,
            init=init,
            device=device,
            dtype=dtype,
        )

    def _make(self, name: str, parameter: Callable[..., nn.Parameter], *shape: int) -> None:
        like, rows = parameter(0), self.r if name == "down" else self.out_features
        weight = PHMWeight(
            rows,
            shape[-1],
            self.division,
            factor_r=self.factor_r,
            rule=self.shared_rule,
            count=self.layers,
            device=like.device,
            dtype=like.dtype,
        )
        self.add_module(f"phm_{name}", weight)

    def _downs(self, layer: int | None = None) -> Tensor:
        """As ValueAdapter's, formed; float32 or wider."""
        formed: Tensor = self.phm_down.formed(layer)
        return formed.reshape(-1, self.in_features)

    def _up_of(self, layer: int) -> Tensor:
        """As ValueAdapter's, formed; float32 or wider."""
        formed: Tensor = self.phm_up.formed(layer)
        return formed

    def _reset_projections(self) -> None:
        draw(self.phm_down, self.phm_up, self.init)

    def extra_repr(self) -> str:
        return with_form(super().extra_repr(), self.division, self.factor_r)


def draw(down: PHMWeight, up: PHMWeight, init: str) -> None:
    """Both projections' first values."""
    down.reset_parameters()
    up.reset_parameters()
    if init != "normal":
        up.zero()


def with_form(text: str, division: int, factor_r: int | None) -> str:
    """What a module says of itself, and how its projections are formed."""
    factor = "" if factor_r is None else f", factor_r={factor_r}"
    return f"{text}, division={division}{factor}"
