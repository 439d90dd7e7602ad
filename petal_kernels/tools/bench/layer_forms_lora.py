"""LoRA on a language model's linears, as layers that are timed: one, those of one x, an MLP.

A layer is what its linears compose; every form composes other callables over the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petal_kernels.nn.lora import LoRALinear
from petal_kernels.nn.lora_fused import lora_linears, lora_mlp
from petal_kernels.nn.published import published_update
from petal_kernels.ops.gated_mlp import workload as mlp_workload
from petal_kernels.ops.lowrank_linear import workload as lowrank_workload
from petal_kernels.tools.bench.layer_forms import INIT, Cost, Layer, LayerCase

Linear = Callable[[Tensor], Tensor]


class LoRALayers(Layer):
    """LoRA on several linears, alpha = 2 r; `kind` is the probability of dropout."""

    forms = ("published", "eager", "petal", "base")

    def __init__(self, case: LayerCase, dtype: torch.dtype) -> None:
        super().__init__(case, dtype)
        self.dropout = float(case.kind or 0)
        self.loras = nn.ModuleList(
            LoRALinear(
                self.linear(width, out, bias=False),
                case.rank,
                alpha=2.0 * case.rank,
                dropout=self.dropout,
            )
            for width, out in self.shapes()
        )
        for lora in self.loras:
            nn.init.normal_(lora.up, std=INIT)  # type: ignore[arg-type]

    def shapes(self) -> list[tuple[int, int]]:
        """[in, out] of every linear."""
        raise NotImplementedError

    def composed(self, linears: Sequence[Linear], x: Tensor) -> Tensor | list[Tensor]:
        """What the layer computes of its linears."""
        raise NotImplementedError

    def each(self) -> list[LoRALinear]:
        """The linears with their updates."""
        return list(self.loras)  # type: ignore[arg-type]

    def base(self, x: Tensor) -> Tensor | list[Tensor]:
        return self.composed([lora.base for lora in self.each()], x)

    def published(self, x: Tensor) -> Tensor | list[Tensor]:
        def form(lora: LoRALinear) -> Linear:
            return lambda t: published_update(lora, lora.base(t), t)

        return self.composed([form(lora) for lora in self.each()], x)

    def eager(self, x: Tensor) -> Tensor | list[Tensor]:
        return self.composed(self.eager_linears(), x)

    def eager_linears(self) -> list[Linear]:
        """The linears in well-written torch."""

        def form(lora: LoRALinear) -> Linear:
            def run(t: Tensor) -> Tensor:
                y = lora.base(t)
                dropped = F.dropout(t, lora.dropout, lora.training)
                z = F.linear(dropped, lora.down.to(t.dtype)).flatten(0, -2)
                up = lora.up.to(t.dtype).t()
                return torch.addmm(y.flatten(0, -2), z, up, alpha=lora.scale).view(y.shape)

            return run

        return [form(lora) for lora in self.each()]

    def _lowrank(self, shapes: Sequence[tuple[int, int]]) -> lowrank_workload.Case:
        c, outs = self.case, tuple(out for _, out in shapes)
        ranks = (c.rank,) * len(outs) if len(outs) > 1 else ()
        return lowrank_workload.Case(
            "", (c.batch, c.tokens), shapes[0][0], c.rank, outs, bias=False,
            dropout=self.dropout, dropout_at="input", ranks=ranks,
        )  # fmt: skip


class LoRALayer(LoRALayers):
    """LoRA on one linear."""

    def shapes(self) -> list[tuple[int, int]]:
        return [(self.case.width, self.case.width)]

    def composed(self, linears: Sequence[Linear], x: Tensor) -> Tensor:
        return linears[0](x)

    @property
    def lora(self) -> LoRALinear:
        """The linear with its update."""
        return self.each()[0]

    def petal(self, x: Tensor) -> Tensor:
        y: Tensor = self.lora(x)
        return y

    def moved(self, dtype: torch.dtype) -> Cost:
        return lowrank_workload.bytes_moved(self._lowrank(self.shapes()), dtype)

    def work(self) -> Cost:
        return lowrank_workload.flops(self._lowrank(self.shapes()))


class LoRAQKV(LoRALayers):
    """LoRA on q, k and v, of which k and v have a quarter of the heads."""

    def shapes(self) -> list[tuple[int, int]]:
        d = self.case.width
        return [(d, d), (d, d // 4), (d, d // 4)]

    def composed(self, linears: Sequence[Linear], x: Tensor) -> list[Tensor]:
        return [linear(x) for linear in linears]

    def petal(self, x: Tensor) -> list[Tensor]:
        found = lora_linears(x, [(lora, None) for lora in self.each()])
        assert not isinstance(found, str), found
        return list(found)

    def moved(self, dtype: torch.dtype) -> Cost:
        return lowrank_workload.bytes_moved(self._lowrank(self.shapes()), dtype)

    def work(self) -> Cost:
        return lowrank_workload.flops(self._lowrank(self.shapes()))


class LoRAMlp(LoRALayers):
    """LoRA on Llama's MLP: gate, up and down."""

    def shapes(self) -> list[tuple[int, int]]:
        d, inner = self.case.width, self.case.width * 11 // 4
        return [(d, inner), (d, inner), (inner, d)]

    def composed(self, linears: Sequence[Linear], x: Tensor) -> Tensor:
        gate, up, down = linears
        return down(F.silu(gate(x)) * up(x))

    def petal(self, x: Tensor) -> Tensor:
        y = lora_mlp(x, [(lora, None) for lora in self.each()], "silu")
        assert not isinstance(y, str), y
        return y

    def _case(self) -> mlp_workload.Case:
        c = self.case
        return mlp_workload.Case(
            "", (c.batch, c.tokens), c.width, self.shapes()[0][1], c.width, (c.rank,) * 3,
            dropout=self.dropout,
        )  # fmt: skip

    def moved(self, dtype: torch.dtype) -> Cost:
        return mlp_workload.bytes_moved(self._case(), dtype)

    def work(self) -> Cost:
        return mlp_workload.flops(self._case())
