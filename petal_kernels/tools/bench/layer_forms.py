"""The layers that are timed, each in several forms over the same parameters.

`published` is the eager form of `nn.published`, `petal` the module that users get, `eager` the same
algebra in well-written torch, and `base` the frozen layer alone, where there is one. Parameters of
the adapter are float32, the frozen ones and the inputs have the run's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petal_kernels.nn import (
    GatedAdapter,
    InstructionExperts,
    ModeApproximation,
    RoutedLoRALinear,
    frozen_lowrank,
)
from petal_kernels.nn.published import published_adapter, published_instruction, published_lora
from petal_kernels.ops.expert_dispatch import baselines as expert_baselines
from petal_kernels.ops.expert_dispatch import workload as expert_workload
from petal_kernels.ops.gated_bottleneck import baselines as gated_baselines
from petal_kernels.ops.gated_bottleneck import workload as gated_workload
from petal_kernels.ops.lowrank_linear import workload as lowrank_workload
from petal_kernels.ops.mode_contract import workload as mode_workload

Cost = tuple[int, int]
INIT = 0.02  # standard deviation of what would else start at zero, so that every gradient lives


@dataclass(frozen=True)
class LayerCase:
    """One layer at one size."""

    name: str
    batch: int
    tokens: int
    width: int
    rank: int
    kind: str = ""  # what distinguishes the cases of one layer

    @property
    def rows(self) -> int:
        """N."""
        return self.batch * self.tokens


class Layer(nn.Module):
    """What the layers share: inputs, and the bytes and flops of their operators' formulas."""

    forms: tuple[str, ...] = ("published", "eager", "petal")
    published: Callable[..., Tensor | list[Tensor]]
    eager: Callable[..., Tensor | Sequence[Tensor]]
    petal: Callable[..., Tensor | list[Tensor]]
    base: Callable[..., Tensor | list[Tensor]]

    def __init__(self, case: LayerCase, dtype: torch.dtype) -> None:
        super().__init__()
        self.case, self.dtype = case, dtype

    def linear(self, width: int, out: int, bias: bool = True) -> nn.Linear:
        """A frozen base."""
        return nn.Linear(width, out, bias=bias, dtype=self.dtype).requires_grad_(False)

    def inputs(self, g: torch.Generator) -> dict[str, Tensor]:
        """Row tensors in the run's dtype; all are trained."""
        case = self.case
        return {"x": torch.randn(case.batch, case.tokens, case.width, generator=g)}

    def moved(self, dtype: torch.dtype) -> Cost:
        """Bytes of forward and backward by the operators' formulas."""
        raise NotImplementedError

    def work(self) -> Cost:
        """Flops of forward and backward by the operators' formulas."""
        raise NotImplementedError


class PetalQKV(Layer):
    """q, k and v of one attention with PETAL's Tucker core, dropout 0.1; "given": of base outputs
    that are computed elsewhere."""

    dropout = 0.1

    def __init__(self, case: LayerCase, dtype: torch.dtype) -> None:
        super().__init__(case, dtype)
        d = case.width
        self.factors = ModeApproximation(d, d, case.rank, 3, core="tucker", dropout=self.dropout)
        nn.init.normal_(self.factors.up, std=case.rank**-0.5)
        self.given = case.kind == "given"
        self.forms = ("published", "eager", "petal") if self.given else (*Layer.forms, "base")
        self.bases = nn.ModuleList([] if self.given else [self.linear(d, d) for _ in range(3)])

    def inputs(self, g: torch.Generator) -> dict[str, Tensor]:
        found = super().inputs(g)
        names = ("q", "k", "v") if self.given else ()
        return found | {n: torch.randn(found["x"].shape, generator=g) for n in names}

    def base(self, x: Tensor, **given: Tensor) -> list[Tensor]:
        return list(given.values()) or [b(x) for b in self.bases]

    def published(self, x: Tensor, **given: Tensor) -> list[Tensor]:
        f, out = self.factors, []
        for y, mode in zip(self.base(x, **given), f.modes, strict=True):
            m = (f.core @ mode.unsqueeze(1)).squeeze(-1).to(x.dtype)
            z = F.dropout(F.linear(x, f.down.to(x.dtype)), self.dropout, self.training)
            out.append(y + F.linear(z @ m, f.up.to(x.dtype)))
        return out

    def eager(self, x: Tensor, **given: Tensor) -> list[Tensor]:
        f, r = self.factors, self.case.rank
        ms = (f.modes @ f.core.view(r * r, r).t()).view(3, r, r)
        ups = (f.up @ ms.transpose(1, 2)).to(x.dtype)
        h, out = F.linear(x, f.down.to(x.dtype)), []
        for y, up in zip(self.base(x, **given), ups.unbind(0), strict=True):
            z = F.dropout(h, self.dropout, self.training).flatten(0, -2)
            out.append(torch.addmm(y.flatten(0, -2), z, up.t()).view(y.shape))
        return out

    def petal(self, x: Tensor, **given: Tensor) -> list[Tensor]:
        if given:
            return list(self.factors(x, base=list(given.values())))
        ups = self.factors.contract(dtype=x.dtype)
        p, training = self.dropout, self.training
        return list(
            frozen_lowrank(
                x, list(self.bases), self.factors.down, ups, dropout=p, training=training
            )
        )

    def _cases(self) -> tuple[Any, Any]:
        c = self.case
        lowrank = lowrank_workload.Case(
            "", (c.batch, c.tokens), c.width, c.rank, (c.width,) * 3,
            "outputs" if self.given else "weights", dropout=self.dropout,
        )  # fmt: skip
        return lowrank, mode_workload.Case("", 3, c.rank, c.width)

    def moved(self, dtype: torch.dtype) -> Cost:
        lowrank, mode = self._cases()
        a = lowrank_workload.bytes_moved(lowrank, dtype)
        b = mode_workload.bytes_moved(mode, torch.float32)
        return a[0] + b[0], a[1] + b[1]

    def work(self) -> Cost:
        lowrank, mode = self._cases()
        a, b = lowrank_workload.flops(lowrank), mode_workload.flops(mode)
        return a[0] + b[0], a[1] + b[1]


class GatedLayer(Layer):
    """An adapter after a block of BART, with dropout 0.1, residual and LayerNorm; `kind` is the
    gate."""

    dropout = 0.1

    def __init__(self, case: LayerCase, dtype: torch.dtype) -> None:
        super().__init__(case, dtype)
        self.adapter = GatedAdapter(case.width, case.rank, gate=case.kind)
        for parameter in self.adapter.parameters():
            nn.init.normal_(parameter, std=INIT)
        self.norm = nn.LayerNorm(case.width)

    def inputs(self, g: torch.Generator) -> dict[str, Tensor]:
        found = super().inputs(g)
        return found | {"h": torch.randn(found["x"].shape, generator=g)}

    def published(self, x: Tensor, h: Tensor) -> Tensor:
        y = published_adapter(self.adapter, h, x)
        y = x + F.dropout(y, self.dropout, self.training)
        return F.layer_norm(y, y.shape[-1:], *self.norm_weights(y))

    def norm_weights(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The norm's weight and bias in y's dtype."""
        return self.norm.weight.to(y.dtype), self.norm.bias.to(y.dtype)

    def without_norm(self, x: Tensor, h: Tensor) -> Tensor:
        """What is normalised, in well-written torch."""
        named = {k: v.to(x.dtype) for k, v in self.adapter.named_parameters()}
        (y,) = gated_baselines.well_written(
            x=h,
            base="input",
            route="none",
            gate=self.adapter.gate,
            gate_input=x,
            residual="gate_input",
            activation=self.adapter.activation,
            scale=1.0,
            dropout=self.dropout if self.training else 0.0,
            **named,
        )
        return y

    def eager(self, x: Tensor, h: Tensor) -> Tensor:
        y = self.without_norm(x, h)
        return F.layer_norm(y, y.shape[-1:], *self.norm_weights(y))

    def petal(self, x: Tensor, h: Tensor) -> Tensor:
        out: Tensor = self.adapter(h, x, dropout=self.dropout, residual=x, norm=self.norm)
        return out

    def _case(self) -> gated_workload.Case:
        c = self.case
        return gated_workload.Case(
            "", (c.batch, c.tokens), c.width, c.rank, gate=c.kind, dropout=self.dropout,
            residual="gate_input", norm=True,
        )  # fmt: skip

    def moved(self, dtype: torch.dtype) -> Cost:
        return gated_workload.bytes_moved(self._case(), dtype)

    def work(self) -> Cost:
        return gated_workload.flops(self._case())


class RoutedLayer(Layer):
    """GPT-2's fused q, k, v with a routed update of q and v; `kind` is "ROUTE VISION-TOKENS"."""

    forms = ("published", "eager", "petal", "base")

    def __init__(self, case: LayerCase, dtype: torch.dtype) -> None:
        super().__init__(case, dtype)
        route, tokens = case.kind.split()
        self.vision_tokens = int(tokens)
        base = self.linear(case.width, 3 * case.width)
        self.lora = RoutedLoRALinear(base, case.rank, route, parts=3, targets=(0, 2))
        nn.init.normal_(self.lora.up, std=INIT)

    def inputs(self, g: torch.Generator) -> dict[str, Tensor]:
        found, c = super().inputs(g), self.case
        vision = torch.randn(c.batch, self.vision_tokens, c.width, generator=g)
        return found | {"vision": vision / c.width**0.5}

    def base(self, x: Tensor, vision: Tensor) -> Tensor:
        y: Tensor = self.lora.base(x)
        return y

    def published(self, x: Tensor, vision: Tensor) -> Tensor:
        return published_lora(self.lora, self.lora.base(x), x, vision)

    def eager(self, x: Tensor, vision: Tensor) -> Tensor:
        m, down = self.lora, self.lora.down.to(x.dtype)
        z, v = F.linear(x, down), F.linear(vision, down)
        pieces = list(m.base(x).split(self.case.width, dim=-1))
        for n, target in enumerate(m.targets):
            columns = slice(n * m.r, (n + 1) * m.r)
            (pieces[target],) = gated_baselines.well_written(
                bottleneck=z[..., columns],
                vision=v[..., columns],
                up=m.up[n].to(x.dtype),
                base=pieces[target],
                route=m.route,
                gate="none",
                activation="identity",
                scale=1.0,
                dropout=0.0,
            )
        return torch.cat(pieces, dim=-1)

    def petal(self, x: Tensor, vision: Tensor) -> Tensor:
        y: Tensor = self.lora(x, self.lora.project(vision))
        return y

    def _updates(self) -> gated_workload.Case:
        c = self.case
        return gated_workload.Case(
            "", (c.batch, c.tokens), c.width, c.rank, base="given", bottleneck=True,
            activation="identity", route=self.lora.route, vision=self.vision_tokens, bias=False,
        )  # fmt: skip

    def moved(self, dtype: torch.dtype) -> Cost:
        """The least, of the same products as `work`. Forward: both updates by the operator's
        formula, but that what the base's product has just made need not be read again; x read and z
        written by the shrinks; the base's weights, biases and third output. Backward: both updates,
        x, z and dz read, the third output's gradient, dx and the base's weights."""
        fwd, bwd = gated_workload.bytes_moved(self._updates(), dtype)
        n, d, z = self.case.rows, self.case.width, 2 * self.case.rank
        e, weights = dtype.itemsize, 3 * self.case.width**2
        forward = 2 * fwd + (n * (d + z) + weights + 3 * d + n * d - 2 * n * d) * e
        return forward, 2 * bwd + (n * (2 * d + 2 * z) + n * d + weights) * e

    def work(self) -> Cost:
        """Updates by the operator's formula, the shrinks and the base's product (its dx too)."""
        fwd, bwd = gated_workload.flops(self._updates())
        c = self.case
        base, shrink = 6 * c.rows * c.width**2, 4 * c.rows * c.width * c.rank
        return 2 * fwd + base + shrink, 2 * bwd + base + 2 * shrink


class ExpertsLayer(Layer):
    """PETAL's six instruction experts on the embeddings of a Q-Former; `kind` is the gate."""

    def __init__(self, case: LayerCase, dtype: torch.dtype) -> None:
        super().__init__(case, dtype)
        self.experts = InstructionExperts(case.width, 6, case.rank, gate=case.kind, tokens="all")
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=INIT)

    def published(self, x: Tensor) -> Tensor:
        return published_instruction(self.experts, x)[0]

    def eager(self, x: Tensor) -> tuple[Tensor]:
        named = {k: v.to(x.dtype) for k, v in self.experts.named_parameters()}
        m = self.experts
        return expert_baselines.well_written(
            x=x, base="input", keep=m.keep, mix=m.mix, gate=m.gate, activation="identity", **named
        )

    def petal(self, x: Tensor) -> Tensor:
        out: Tensor = self.experts(x)[0]
        return out

    def _case(self) -> expert_workload.Case:
        c = self.case
        return expert_workload.Case("", (c.batch, c.tokens), c.width, 6, c.rank, gate=c.kind)

    def moved(self, dtype: torch.dtype) -> Cost:
        return expert_workload.bytes_moved(self._case(), dtype)

    def work(self) -> Cost:
        return expert_workload.flops(self._case())
