"""VL-PET: gated adapters after every encoder block, value adapters in the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from petal_kernels._runtime.dry_run import signature
from petal_kernels.hf.config import VLPetConfig
from petal_kernels.hf.found import Place
from petal_kernels.hf.method import Hand
from petal_kernels.hf.methods.insertion import (
    AN_ACTIVATION,
    BlocksMethod,
    InsertionAdapter,
    block_rows,
    role_of,
)
from petal_kernels.hf.models import Block, Linear, Stack
from petal_kernels.hf.parts import LayerPart, StackPart
from petal_kernels.hf.report import Row, Rows
from petal_kernels.hf.twins import base_twin, twin_of
from petal_kernels.hf.walk import device_of
from petal_kernels.hf.wrappers import LayerLinear
from petal_kernels.nn.gated_adapter import GatedAdapter
from petal_kernels.nn.published import published_value
from petal_kernels.nn.value_adapter import ValueAdapter


class VLPet(BlocksMethod):
    """VL-PET on one model."""

    config: VLPetConfig

    def rows(self, stack: Stack) -> Sequence[tuple[str, Linear | Block]] | None:
        if stack.name == "vision":
            return None
        if stack.name == "encoder":
            return block_rows(stack)
        values = stack.name == "decoder" and bool(self.config.value_r)
        return [
            (role_of(stack, row), row)
            for row in stack.linears
            if values and (row.attention, row.name) == ("cross", "value")
        ]

    def build(self) -> InsertionAdapter:
        adapter, targets, config = super().build(), self.found.at(Linear), self.config
        if targets:
            shapes = {place.shape for place in targets}
            if len(shapes) != 1:
                raise ValueError(f"model: want one shape for all values' projections, got {shapes}")
            adapter.value = ValueAdapter(
                *shapes.pop(),
                config.value_r,
                len(targets),
                activation=config.activation,
                init="normal" if config.init == "normal" else "zero",
                device=device_of(targets[0].module),
                dtype=config.dtype,
            )
        return adapter

    def module_of(self, place: Place) -> nn.Module | None:
        config = self.config
        if isinstance(place.row, Linear):
            return None
        return GatedAdapter(
            self.features,
            config.r,
            gate=config.gate,
            gate_r=config.gate_r,
            activation=config.activation,
            scale=config.scale,
            init=config.init,
            variant=config.variant,
            **self.storage(place),
        )

    def trained(self) -> dict[str, nn.Module]:
        return self.norms("encoder") if self.config.train_norms else {}

    def install_place(self, place: Place, layer: LayerPart, hand: Hand) -> None:
        if isinstance(place.row, Block):
            super().install_place(place, layer, hand)
        else:
            number = [p.path for p in self.found.at(Linear)].index(place.path)
            hand.wrap(place, ValueLinear(place.module, layer, number))

    def share(self, stack: StackPart, module: nn.Module, kwargs: dict[str, Any]) -> Any:
        encoded = kwargs.get("encoder_hidden_states")
        if encoded is None or self.adapter.value is None:
            return None
        return Middles(encoded, self.adapter.value.project(encoded))

    def shape_of(self, module: Any) -> str:
        return "shared product" if module is None else super().shape_of(module)

    def shared_rows(self) -> list[Row]:
        value = self.adapter.value
        if value is None:
            return []
        count = sum(p.numel() for p in value.parameters() if p.requires_grad)
        shape = f"{value.layers} x {value.in_features} -> {value.out_features}, r {value.r}"
        return [Row("petal.value", "value adapters", shape, "", "", count)]

    def sample(self, place: Place, wrapper: Any, tokens: Rows) -> tuple[Any, Any]:
        if isinstance(place.row, Block):
            return super().sample(place, wrapper, tokens)
        base, adapter = base_twin(wrapper.base), twin_of(wrapper.used())
        key = signature(base, adapter, wrapper.training)
        return key, lambda: twin_of(wrapper, base=base).fused(adapter, self.typical(base, tokens))


class Middles:
    """The value adapters' down-projections of the encoder's output: one product for all layers."""

    def __init__(self, source: Tensor, middles: tuple[Tensor, ...]) -> None:
        self.source, self.middles = source, middles


class ValueLinear(LayerLinear):
    """The values' projection of a cross-attention, with the value adapter of its layer."""

    def __init__(self, base: nn.Module, layer: LayerPart, number: int) -> None:
        super().__init__(base, layer)
        self.number = number

    def adapted(self, x: Tensor) -> Tensor:
        if self.method.published:
            return published_value(self.used(), self.base(x), x, self.number)
        return self.fused(self.used(), x)

    def fused(self, adapter: ValueAdapter, x: Tensor) -> Tensor:
        """The values with what `adapter` adds."""
        values: Tensor = self.base(x)
        out: Tensor = adapter(values, self._middle(adapter, x), self.number)
        return out

    def _middle(self, adapter: ValueAdapter, x: Tensor) -> Tensor:
        shared, source = self.layer.shared()
        if isinstance(shared, Middles) and (x is shared.source or x is source):
            return shared.middles[self.number]
        return adapter.project(x, self.number)[0]

    def used(self) -> ValueAdapter:
        method: Any = self.method
        adapter: ValueAdapter = method.adapter.value
        return adapter

    def delta(self, dtype: Any) -> str:
        return AN_ACTIVATION
