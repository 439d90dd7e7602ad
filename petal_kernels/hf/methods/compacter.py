"""Compacter: VL-Adapter with projections that are sums of Kronecker products."""

from __future__ import annotations

from typing import Any

from torch import nn

from petal_kernels.hf.config import CompacterConfig
from petal_kernels.hf.found import Place
from petal_kernels.hf.methods.insertion import InsertionAdapter
from petal_kernels.hf.methods.vladapter import VLAdapter
from petal_kernels.hf.report import Row
from petal_kernels.hf.walk import device_of
from petal_kernels.nn.compacter import CompacterAdapter
from petal_kernels.nn.kronecker import PHMRule


class Compacter(VLAdapter):
    """Compacter on one model."""

    config: CompacterConfig  # type: ignore[assignment]

    def build(self) -> InsertionAdapter:
        config, width = self.config, self.found.width()
        if width % config.division:
            raise ValueError(
                f"division: want a divisor of the layers' width {width}, got {config.division}"
            )
        self.rule: PHMRule | None = None
        if config.share_rule:
            device = device_of(self.found.places[0].layer.module)
            self.rule = PHMRule(config.division, device=device, dtype=config.dtype)
        adapter = super().build()
        adapter.rule = self.rule
        return adapter

    def module_of(self, place: Place) -> nn.Module:
        config = self.config
        return CompacterAdapter(
            self.features,
            config.r,
            division=config.division,
            factor_r=config.factor_r,
            rule=self.rule,
            activation=config.activation,
            init=config.init,
            **self.storage(place),
        )

    def shape_of(self, module: Any) -> str:
        factor = "" if module.factor_r is None else f", factors of rank {module.factor_r}"
        return f"{super().shape_of(module)}, division {module.division}{factor}"

    def shared_rows(self) -> list[Row]:
        rule = self.adapter.rule
        if rule is None:
            return []
        shape = " x ".join(map(str, rule.weight.shape))
        return [Row("petal.rule", "shared rule", shape, "", "", rule.weight.numel())]
