"""Compacter: VL-Adapter with projections that are sums of Kronecker products."""

from __future__ import annotations

from typing import Any

from torch import nn

from petal_kernels.hf.config import CompacterConfig, VLPetConfig
from petal_kernels.hf.found import Place
from petal_kernels.hf.methods.insertion import InsertionAdapter, InsertionMethod
from petal_kernels.hf.methods.vladapter import VLAdapter
from petal_kernels.hf.report import Row
from petal_kernels.hf.walk import device_of
from petal_kernels.nn.compacter import CompacterAdapter
from petal_kernels.nn.kronecker import PHMRule


class Compacter(VLAdapter):
    """Compacter on one model."""

    config: CompacterConfig  # type: ignore[assignment]

    def build(self) -> InsertionAdapter:
        self.rule = rule_of(self, self.config)
        adapter = super().build()
        adapter.rule = self.rule
        return adapter

    def module_of(self, place: Place) -> nn.Module:
        config = self.config
        return CompacterAdapter(
            self.features,
            config.r,
            activation=config.activation,
            init=config.init,
            **form_of(config),
            rule=self.rule,
            **self.storage(place),
        )

    def shape_of(self, module: Any) -> str:
        return with_form(super().shape_of(module), module)

    def shared_rows(self) -> list[Row]:
        return rule_rows(self.adapter)


def rule_of(method: InsertionMethod, config: CompacterConfig | VLPetConfig) -> PHMRule | None:
    """The rule that a model's adapters share, where they do; ValueError where the model is not as
    wide as its division asks."""
    width = method.found.width()
    if width % config.division:
        raise ValueError(
            f"division: want a divisor of the layers' width {width}, got {config.division}"
        )
    if not config.share_rule:
        return None
    device = device_of(method.found.places[0].layer.module)
    return PHMRule(config.division, device=device, dtype=config.dtype)


def form_of(config: CompacterConfig | VLPetConfig) -> dict[str, Any]:
    """How the adapters' projections are formed."""
    return {"division": config.division, "factor_r": config.factor_r}


def with_form(words: str, module: Any) -> str:
    """An adapter in words, and how its projections are formed."""
    factor = "" if module.factor_r is None else f", factors of rank {module.factor_r}"
    return f"{words}, division {module.division}{factor}"


def rule_rows(adapter: InsertionAdapter) -> list[Row]:
    """A report's row of the shared rule."""
    if adapter.rule is None:
        return []
    weight = adapter.rule.weight
    shape = " x ".join(map(str, weight.shape))
    return [Row("petal.rule", "shared rule", shape, "", "", weight.numel())]
