"""Mixtures of adapters after a layer's blocks, or of low-rank updates on its linears."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petal_kernels._runtime.dry_run import signature
from petal_kernels.hf.config import ExpertConfig
from petal_kernels.hf.found import Place
from petal_kernels.hf.method import Hand
from petal_kernels.hf.methods.insertion import (
    InsertionMethod,
    block_rows,
    check_whole,
    lora_rows,
)
from petal_kernels.hf.models import Block, Linear, Stack
from petal_kernels.hf.parts import LayerPart, Part, Run, running_call
from petal_kernels.hf.report import Row, Rows
from petal_kernels.hf.twins import base_twin, twin_of
from petal_kernels.hf.walk import device_of
from petal_kernels.hf.wrappers import LayerLinear
from petal_kernels.nn.experts import ExpertAdapter, ExpertLoRALinear
from petal_kernels.nn.low_rank_experts import LowRankExperts
from petal_kernels.nn.published import published_experts

_WHY_KEPT = {
    "softmax": "its router reads the input",
    "domain": "which expert serves a token is said with each call",
    "mean": "it stands behind a block, not on a linear",
}


class Experts(InsertionMethod):
    """Mixtures of experts on one model."""

    structural = True
    blocks = {"domains": "gate='domain'"}  # noqa: RUF012 - as the base declares it
    config: ExpertConfig

    def rows(self, stack: Stack) -> Sequence[tuple[str, Linear | Block]] | None:
        if stack.name == "vision":
            return None
        return lora_rows(stack) if self.config.kind == "lora" else block_rows(stack)

    def module_of(self, place: Place) -> nn.Module:
        config = self.config
        names = ("gate", "top_k", "router_input", "router_noise", "shared_down", "dtype")
        kind: dict[str, Any] = {name: getattr(config, name) for name in names}
        if isinstance(place.row, Linear):
            return ExpertLoRALinear(
                place.module,
                config.experts,
                config.r,
                alpha=config.alpha,
                own_base=False,
                device=device_of(place.module),
                **kind,
            )
        return ExpertAdapter(
            self.features,
            config.experts,
            config.r,
            activation=config.activation,
            scale=config.scale,
            device=self.storage(place)["device"],
            **kind,
        )

    def install_place(self, place: Place, layer: LayerPart, hand: Hand) -> None:
        mixture = Mixture(layer, place, self.trains(place))
        if isinstance(place.row, Block):
            check_whole(place)
            hand.take(place.module, ExpertBlock(mixture))
        else:
            hand.wrap(place, ExpertLinear(place.module, mixture))

    def experts(self) -> Mapping[str, LowRankExperts]:
        return {place.path: self.trains(place) for place in self.found.places}  # type: ignore[misc]

    def kept(self) -> dict[str, str]:
        return {place.path: _WHY_KEPT[self.config.gate] for place in self.found.at(Block)}

    def place_row(self, place: Place) -> Row:
        return self.expert_row(place.path, place.role, self.trains(place))  # type: ignore[arg-type]

    def sample(self, place: Place, wrapper: Any, tokens: Rows) -> tuple[Any, Any]:
        experts = twin_of(self.trains(place))  # type: ignore[arg-type]
        like = place.layer.module
        if wrapper is not None:
            like = experts.__dict__["base"] = base_twin(wrapper.base)
        key = signature(experts, self.storage_of(like))

        def run() -> object:
            x = self.typical(like, tokens, experts.in_features)
            domain = None
            if experts.gate == "domain":
                domain = torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
            return experts(x, domain=domain)

        return key, run


class Mixture:
    """One place's experts, and what they need to know of the tokens."""

    def __init__(self, layer: LayerPart, place: Place, experts: Any) -> None:
        self.layer, self.role, self.path, self.experts = layer, place.role, place.path, experts
        self.encoded = isinstance(place.row, Linear) and place.row.encoded
        self.part = place.row.part

    def serve(self, x: Tensor, base: Any) -> Tensor:
        """x (or, of a linear, base(x)) with what the experts add, and the routing kept."""
        experts, call = self.experts, self.layer.call_now()
        mask, domain = None, None
        if experts.router_input == "pooled":
            mask = call.tokens.counted(x, self.encoded, self.part)
        if experts.gate == "domain":
            if call.tokens.domains is None:
                raise ValueError(
                    f"domain: want the domain of each token for {self.role!r}, got none; run the "
                    "model inside `with attachment.domains(domain):`"
                )
            domain = call.tokens.domains.of(x, self.encoded, self.part)
        served: dict[str, Any] = {"mask": mask, "domain": domain}
        if self.layer.method.published:
            y = x if base is None else base(x)
            out, routing = published_experts(experts, x, y, keep=1.0, mix=experts.scale, **served)
        else:
            out, routing = experts.forward(x, **served)  # an engine may have put its own there
        # A recompute, or a layer outside its stack, tells nothing of a forward.
        if running_call(self.layer.method, self.layer.stack) is call:
            self.layer.method.routings[self.path] = routing
        return out


class ExpertBlock(Part):
    """A mixture of adapters after one block."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture

    def call(self, module: nn.Module, run: Run, args: Any, kwargs: Any) -> Any:
        output = run(*args, **kwargs)
        if not self.mixture.layer.call_now().given.on:
            return output
        h: Tensor = output[0] if isinstance(output, tuple) else output
        adapted = self.mixture.serve(h, None)
        return (adapted, *output[1:]) if isinstance(output, tuple) else adapted


class ExpertLinear(LayerLinear):
    """A linear with a mixture of low-rank updates."""

    def __init__(self, base: nn.Module, mixture: Mixture) -> None:
        super().__init__(base, mixture.layer)
        self.__dict__["mixture"] = mixture

    def adapted(self, x: Tensor) -> Tensor:
        mixture: Mixture = self.__dict__["mixture"]
        return mixture.serve(x, self.base)

    def used(self) -> ExpertLoRALinear:
        experts: ExpertLoRALinear = self.__dict__["mixture"].experts
        return experts

    def delta(self, dtype: torch.dtype) -> Tensor | str:
        """s mean_e B_e A_e: the mean of low-rank updates is one; nothing else is folded."""
        lora = self.used()
        if lora.gate != "mean":
            return _WHY_KEPT[lora.gate]
        downs = lora.down.to(dtype).expand(lora.experts, -1, -1)
        return lora.scale * (lora.up.to(dtype) @ downs).mean(0)
