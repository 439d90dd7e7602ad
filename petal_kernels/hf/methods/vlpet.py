"""VL-PET: a module after every encoder block, another on the decoder's values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from petal_kernels._runtime.dry_run import signature
from petal_kernels.hf.config import VLPetConfig
from petal_kernels.hf.found import Place
from petal_kernels.hf.method import Hand
from petal_kernels.hf.methods.compacter import form_of, rule_of, rule_rows, with_form
from petal_kernels.hf.methods.insertion import (
    AN_ACTIVATION,
    BlocksMethod,
    InsertionAdapter,
    block_rows,
    role_of,
)
from petal_kernels.hf.methods.routing import RoutedLinear, sample_of, shape_of
from petal_kernels.hf.models import Block, Linear, Stack
from petal_kernels.hf.parts import LayerPart, StackPart
from petal_kernels.hf.report import Row, Rows
from petal_kernels.hf.twins import base_twin, twin_of
from petal_kernels.hf.walk import device_of
from petal_kernels.hf.wrappers import LayerLinear
from petal_kernels.nn.compacter import CompacterAdapter, CompacterValueAdapter
from petal_kernels.nn.gated_adapter import GatedAdapter
from petal_kernels.nn.published import published_value
from petal_kernels.nn.routed_lora import RoutedLoRALinear
from petal_kernels.nn.value_adapter import ValueAdapter


class VLPet(BlocksMethod):
    """VL-PET on one model."""

    config: VLPetConfig

    def rows(self, stack: Stack) -> Sequence[tuple[str, Linear | Block]] | None:
        if stack.name == "vision":
            return None
        if stack.name == "encoder" and self.config.module == "lora":
            ends = [row for row in stack.blocks if row.linear]
            return [(role_of(stack, row), Linear("", row.name, row.linear)) for row in ends]
        if stack.name == "encoder":
            return block_rows(stack)
        values = stack.name == "decoder" and bool(self.config.value_r)
        return [
            (role_of(stack, row), row)
            for row in stack.linears
            if values and (row.attention, row.name) == ("cross", "value")
        ]

    def build(self) -> InsertionAdapter:
        config = self.config
        formed = config.module == "compacter"
        self.rule = rule_of(self, config) if formed else None
        adapter, targets = super().build(), self.found.at(Linear)
        adapter.rule = self.rule
        if targets and config.module != "lora":
            adapter.value = self._values(targets)
        return adapter

    def _values(self, targets: list[Place]) -> ValueAdapter:
        config, shapes = self.config, {place.shape for place in targets}
        if len(shapes) != 1:
            raise ValueError(f"model: want one shape for all values' projections, got {shapes}")
        reads, gives = shapes.pop()
        sizes = reads, gives, config.value_r, len(targets)
        given: dict[str, Any] = {
            "activation": config.activation,
            "scale": config.value_scale,
            "init": "normal" if config.init == "normal" else "zero",
            "device": device_of(targets[0].module),
            "dtype": config.dtype,
        }
        if config.module == "compacter":
            given |= {"rule": self.rule, **form_of(config)}
            return CompacterValueAdapter(*sizes, **given)
        return ValueAdapter(*sizes, **given)

    def module_of(self, place: Place) -> nn.Module | None:
        config = self.config
        if config.module == "lora":
            return RoutedLoRALinear(
                place.module,
                config.r if place.role.startswith("encoder") else config.value_r,
                alpha=config.alpha,
                dropout=config.dropout,
                own_base=False,
                device=device_of(place.module),
                dtype=config.dtype,
            )
        if isinstance(place.row, Linear):
            return None
        given: dict[str, Any] = {
            "gate": config.gate,
            "gate_r": config.gate_r,
            "activation": config.activation,
            "scale": config.scale,
            "init": config.init,
            "variant": config.variant,
            **self.storage(place),
        }
        if config.module == "compacter":
            given |= {"rule": self.rule, **form_of(config)}
            return CompacterAdapter(self.features, config.r, **given)
        return GatedAdapter(self.features, config.r, **given)

    def trained(self) -> dict[str, nn.Module]:
        return self.norms("encoder") if self.config.train_norms else {}

    def install_place(self, place: Place, layer: LayerPart, hand: Hand) -> None:
        if isinstance(place.row, Block):
            super().install_place(place, layer, hand)
        elif self.config.module == "lora":
            lora: Any = self.trains(place)
            hand.wrap(place, RoutedLinear(place.module, layer, place.role, lora, None))
        else:
            number = [p.path for p in self.found.at(Linear)].index(place.path)
            hand.wrap(place, ValueLinear(place.module, layer, number))

    def share(self, stack: StackPart, module: nn.Module, kwargs: dict[str, Any]) -> Any:
        encoded = kwargs.get("encoder_hidden_states")
        if encoded is None or self.adapter.value is None:
            return None
        return Middles(encoded, self.adapter.value.project(encoded))

    def shape_of(self, module: Any) -> str:
        if module is None:
            return "shared product"
        if isinstance(module, RoutedLoRALinear):
            return shape_of(module)
        words = super().shape_of(module)
        return with_form(words, module) if self.config.module == "compacter" else words

    def shared_rows(self) -> list[Row]:
        rows, value = rule_rows(self.adapter), self.adapter.value
        if value is None:
            return rows
        count = sum(p.numel() for p in value.parameters() if p.requires_grad)
        shape = f"{value.layers} x {value.in_features} -> {value.out_features}, r {value.r}"
        if isinstance(value, CompacterValueAdapter):
            shape = with_form(shape, value)
        return [Row("petal.value", "value adapters", shape, "", "", count), *rows]

    def sample(self, place: Place, wrapper: Any, tokens: Rows) -> tuple[Any, Any]:
        if isinstance(place.row, Block):
            return super().sample(place, wrapper, tokens)
        if isinstance(wrapper, RoutedLinear):
            return sample_of(self, wrapper, tokens)
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
