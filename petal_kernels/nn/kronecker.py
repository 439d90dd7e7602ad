"""Matrices that are sums of Kronecker products: Compacter's projections.

    W [O, D] = sum_i kron(A_i, B_i),   A_i [n, n],   B_i [O / n, D / n],   i = 0 .. n - 1

n is the division; A, the rule, belongs to one matrix or to many. B is whole, or a product
B_i = left_i [O / n, K] right_i [K, D / n]. Entry [a O/n + c, b D/n + d] of W is
sum_i A_i[a, b] B_i[c, d], so the whole of W is one product [n n, n] [n, O D / (n n)] and one copy
that brings its dims in order. Autograd differentiates it: dW is as small as W.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from petal_kernels._runtime.autocast import autocast_off
from petal_kernels.nn.arguments import check_size, check_storage

RULE_STD = 0.01


class PHMRule(nn.Module):
    """The rule A [n, n, n] of a parameterised hypercomplex multiplication (PHM), drawn from
    N(0, 0.01^2); `count`: as many rules, [count, n, n, n]."""

    def __init__(
        self,
        division: int,
        *,
        count: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.division = check_size("division", division)
        self.count = None if count is None else check_size("count", count)
        check_storage(device, dtype)
        shape = (*leading(count), division, division, division)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.normal_(0.0, RULE_STD)

    def extra_repr(self) -> str:
        return f"division={self.division}" + (f", count={self.count}" if self.count else "")


class PHMWeight(nn.Module):
    """A matrix [out_features, in_features] that is formed from a rule and small factors.

    division  n, which divides both sizes.
    factor_r  rank K of each B_i; None: whole.
    rule      a PHMRule that others read too: no child of this module, whoever made it registers
              it. None: one of its own.
    count     so many matrices at once, [count, out_features, in_features].

    Factors are drawn Glorot-uniform with gain sqrt 2, each B_i (or its two factors) by itself.
    """

    factor: nn.Parameter | None
    left: nn.Parameter | None
    right: nn.Parameter | None

    def __init__(
        self,
        out_features: int,
        in_features: int,
        division: int,
        *,
        factor_r: int | None = None,
        rule: PHMRule | None = None,
        count: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.out_features = check_divided("out_features", out_features, division)
        self.in_features = check_divided("in_features", in_features, division)
        self.division = division
        self.factor_r = None if factor_r is None else check_size("factor_r", factor_r)
        self.count = None if count is None else check_size("count", count)
        check_storage(device, dtype)
        check_rule(rule, division, count)
        kind = {"device": device, "dtype": dtype}
        self.rule: PHMRule | None = None
        if rule is None:
            self.rule = PHMRule(division, count=count, **kind)  # type: ignore[arg-type]
        # A reference: a child would be stored once for each matrix that reads it.
        self.__dict__["shared_rule"] = rule
        rows, columns = out_features // division, in_features // division
        shapes: dict[str, tuple[int, int]] = {"factor": (rows, columns)}
        if factor_r is not None:
            shapes = {"left": (rows, factor_r), "right": (factor_r, columns)}
        for name in ("factor", "left", "right"):
            parameter = None
            if name in shapes:
                shape = (*leading(count), division, *shapes[name])
                parameter = nn.Parameter(torch.empty(shape, **kind))  # type: ignore[arg-type]
            self.register_parameter(name, parameter)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws rule and factors; a rule that is shared is its owner's."""
        if self.rule is not None:
            self.rule.reset_parameters()
        for factor in self.factors():
            bound = math.sqrt(12.0 / (factor.shape[-1] + factor.shape[-2]))
            factor.uniform_(-bound, bound)

    @torch.no_grad()
    def zero(self) -> None:
        """Makes the matrix zero by one of its factors: the others get gradients of it."""
        self.factors()[0].zero_()

    def factors(self) -> list[Tensor]:
        """[B], or [left, right]: [(count,) n, rows, columns] each."""
        given = (self.factor, self.left, self.right)
        return [part for part in given if part is not None]

    def rules(self) -> Tensor:
        """A [n, n, n], or [count, n, n, n]."""
        rule: PHMRule = self.__dict__["shared_rule"] if self.rule is None else self.rule
        return rule.weight

    def forward(self) -> Tensor:
        """W [(count,) out_features, in_features], float32 or wider."""
        return self.formed()

    def formed(self, index: int | None = None) -> Tensor:
        """The same, seen by no hook: an adapter's part of its own call; with `index` that matrix
        alone."""
        rule, factors, n = self.rules(), self.factors(), self.division
        if index is not None:
            factors = [part[index] for part in factors]
            rule = rule[index] if rule.dim() > 3 else rule
        wide = torch.promote_types(factors[0].dtype, torch.float32)
        with autocast_off(factors[0]):
            parts = [part.to(wide) for part in factors]
            b = parts[0] if len(parts) == 1 else parts[0] @ parts[1]
            rows, columns = b.shape[-2:]
            product = rule.to(b).flatten(-2).mT @ b.flatten(-2)
            apart = product.unflatten(-2, (n, n)).unflatten(-1, (rows, columns))
            whole: Tensor = apart.transpose(-3, -2).reshape(
                *product.shape[:-2], self.out_features, self.in_features
            )
        return whole

    def extra_repr(self) -> str:
        parts = [f"{self.out_features}, {self.in_features}, division={self.division}"]
        parts += [f"factor_r={self.factor_r}"] if self.factor_r is not None else []
        parts += [f"count={self.count}"] if self.count is not None else []
        parts += ["rule=shared"] if self.rule is None else []
        return ", ".join(parts)


def leading(count: int | None) -> tuple[int, ...]:
    """The dims in front of one matrix's."""
    return () if count is None else (count,)


def check_divided(name: str, size: object, division: object) -> int:
    """ValueError unless `size` is a multiple of `division`, which is an integer >= 1."""
    n, value = check_size("division", division), check_size(name, size)
    if value % n:
        raise ValueError(f"{name}: want a multiple of division={n}, got {value}")
    return value


def check_rule(rule: object, division: int, count: int | None = None) -> None:
    """Raise unless `rule` is None, or one rule of that division, or one for each of `count`."""
    if rule is None:
        return
    if not isinstance(rule, PHMRule):
        raise TypeError(f"rule: want None or a PHMRule, got a {type(rule).__name__}")
    if rule.division != division or rule.count not in (None, count):
        got = f"division={rule.division}, count={rule.count}"
        raise ValueError(f"rule: want division={division}, count={count}, got {got}")
