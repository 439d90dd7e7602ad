"""VL-Adapter: a bottleneck after every block of encoder and decoder."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from petal_kernels.hf.config import VLAdapterConfig
from petal_kernels.hf.found import Place
from petal_kernels.hf.methods.insertion import BlocksMethod, block_rows
from petal_kernels.hf.models import Block, Linear, Stack
from petal_kernels.nn.gated_adapter import GatedAdapter


class VLAdapter(BlocksMethod):
    """VL-Adapter on one model."""

    structural = True
    shares = False
    config: VLAdapterConfig

    def rows(self, stack: Stack) -> Sequence[tuple[str, Linear | Block]] | None:
        return None if stack.name == "vision" else block_rows(stack)

    def module_of(self, place: Place) -> nn.Module:
        config = self.config
        return GatedAdapter(
            self.features,
            config.r,
            activation=config.activation,
            init=config.init,
            **self.storage(place),
        )

    def trained(self) -> dict[str, nn.Module]:
        return self.norms() if self.config.train_norms else {}
