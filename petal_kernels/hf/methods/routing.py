"""Routing functions in low-rank bottlenecks: LoRA and adapters, plain or joined with vision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petal_kernels._runtime.dry_run import signature
from petal_kernels.hf.config import RoutingConfig
from petal_kernels.hf.context import Call
from petal_kernels.hf.found import Place
from petal_kernels.hf.method import Hand, Method
from petal_kernels.hf.methods.insertion import (
    BlocksMethod,
    block_rows,
    lora_rows,
    typical_vision,
    vision_of,
)
from petal_kernels.hf.models import Block, Linear, Stack
from petal_kernels.hf.parts import LayerPart
from petal_kernels.hf.report import Rows
from petal_kernels.hf.twins import base_twin, twin_of
from petal_kernels.hf.walk import device_of, is_norm
from petal_kernels.hf.wrappers import LayerLinear
from petal_kernels.nn.gated_adapter import GatedAdapter
from petal_kernels.nn.published import published_lora
from petal_kernels.nn.routed_lora import RoutedLoRALinear


class Routing(BlocksMethod):
    """Routing functions, LoRA or adapters on one model."""

    structural = True
    shares = False
    blocks = {"vision": "routes"}  # noqa: RUF012 - as the base declares it
    config: RoutingConfig

    def rows(self, stack: Stack) -> Sequence[tuple[str, Linear | Block]] | None:
        if stack.name == "vision":
            return None
        return lora_rows(stack) if self.config.kind == "lora" else block_rows(stack)

    def keeps(self, place: Place) -> bool:
        """With a route only the places whose input is as wide as the features that it joins: not
        those that read an image's features themselves, of another width."""
        if self.config.function == "none" or isinstance(place.row, Block):
            return True
        width, reads = self.found.width(), place.shape[0]
        if reads != width and self.config.target_modules is not None:
            raise ValueError(
                f"target_modules: want places that read the layers' {width} wide hidden states "
                f"for the route {self.config.function!r}, got {place.path}, which reads {reads}"
            )
        return reads == width

    def name_of(self, place: Place) -> str:
        shared = self.config.share and isinstance(place.row, Block)
        return "shared" if shared else super().name_of(place)

    def module_of(self, place: Place) -> nn.Module:
        config, row = self.config, place.row
        if isinstance(row, Linear):
            return RoutedLoRALinear(
                place.module,
                config.r,
                config.function,
                parts=row.parts,
                targets=row.targets,
                groups=config.groups,
                alpha=config.alpha,
                dropout=config.dropout,
                variant=config.variant,
                own_base=False,
                device=device_of(place.module),
                dtype=config.dtype,
            )
        return GatedAdapter(
            self.features,
            config.r,
            activation=config.activation,
            route=config.function,
            add_input=config.residual,
            variant=config.variant,
            **self.storage(place),
        )

    def trained(self) -> dict[str, nn.Module]:
        if not self.config.train_norms:
            return {}
        return {
            path: module
            for layer in self.found.layers
            for path, module in layer.module.named_modules(prefix=layer.path)
            if is_norm(module)
        }

    def trained_biases(self) -> dict[str, nn.Module]:
        if not self.config.train_bias:
            return {}
        return {
            place.path: place.module
            for place in self.found.at(Linear)
            if place.module._parameters.get("bias") is not None
        }

    def install_place(self, place: Place, layer: LayerPart, hand: Hand) -> None:
        if isinstance(place.row, Block):
            super().install_place(place, layer, hand)
        else:
            lora: Any = self.trains(place)
            bias = self.biases.get(place.path)
            hand.wrap(place, RoutedLinear(place.module, layer, place.role, lora, bias))

    def why_not_reentrant(self, call: Call) -> str:
        if call.given.vision is None or not call.given.vision.requires_grad:
            return ""
        return (
            "vision: features that require grad need checkpointing with use_reentrant=False: the "
            "reentrant form would backward through them once per layer"
        )

    def why_not_merge(self) -> str:
        if self.config.function == "none":
            return ""
        return (
            f"route {self.config.function!r} depends on the vision features of each sample and "
            "cannot be folded into a weight"
        )

    def shape_of(self, module: Any) -> str:
        if isinstance(module, RoutedLoRALinear):
            return f"{shape_of(module)}, {module.route}"
        return super().shape_of(module)

    def sample(self, place: Place, wrapper: Any, tokens: Rows) -> tuple[Any, Any]:
        if isinstance(place.row, Block):
            return super().sample(place, wrapper, tokens)
        return sample_of(self, wrapper, tokens)


def sample_of(method: Method, wrapper: RoutedLinear, tokens: Rows) -> tuple[Any, Any]:
    """What `Method.sample` says of such a wrapper."""
    lora = twin_of(wrapper.used(), base=base_twin(wrapper.base))
    key = signature(lora, wrapper.trained_bias())

    def run() -> object:
        x = method.typical(lora.base, tokens)
        return wrapper.fused(lora, x, None if lora.route == "none" else typical_vision(lora, x))

    return key, run


def shape_of(module: RoutedLoRALinear) -> str:
    """An update in words."""
    return f"{module.in_features} -> {module.out_features}, r {module.r}"


class RoutedLinear(LayerLinear):
    """A linear with a routed low-rank update."""

    def __init__(
        self,
        base: nn.Module,
        layer: LayerPart,
        role: str,
        lora: RoutedLoRALinear,
        bias: nn.Module | None,
    ) -> None:
        super().__init__(base, layer, bias)
        self.role = role
        # A reference, no child: it is registered at the model's root.
        self.__dict__["lora"] = lora

    def adapted(self, x: Tensor) -> Tensor:
        route = self.used().route
        if route == "none":
            return self.update(x, None)
        return self.update(x, vision_of(self.layer.call_now(), route, self.role))

    def update(self, x: Tensor, vision: Tensor | None) -> Tensor:
        """The linear's output with its update, routed with `vision`."""
        lora = self.used()
        if self.method.published:
            return published_lora(lora, self.with_merged(x), x, vision)
        return self.fused(lora, x, vision)

    def fused(self, lora: RoutedLoRALinear, x: Tensor, vision: Tensor | None) -> Tensor:
        """The same in one call of `lora`."""
        projected = None if vision is None else lora.project(vision)
        # `forward` of the instance: an engine that loads the weights puts its own there.
        return lora.forward(x, projected, self.trained_bias())

    def used(self) -> RoutedLoRALinear:
        lora: RoutedLoRALinear = self.__dict__["lora"]
        return lora

    def delta(self, dtype: torch.dtype) -> Tensor:
        """s B A: without a route or dropout it is the whole update."""
        return self.used().delta(dtype)
