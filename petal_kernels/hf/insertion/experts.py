"""Mixtures of adapters after a layer's blocks and of low-rank updates on its linears."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from petal_kernels._runtime import checks
from petal_kernels._runtime.numerics import wide_dtype
from petal_kernels.hf.config import AdapterConfig, ExpertConfig
from petal_kernels.hf.experts import RoutedAttachment, Routings
from petal_kernels.hf.insertion.attachment import InsertionAttachment, device_of, parent_of
from petal_kernels.hf.insertion.layers import AdaptedLinear, LayerSlot, adapt_output
from petal_kernels.hf.insertion.specs import Insertion, Point, Target
from petal_kernels.hf.merging import Merged, MergeReport
from petal_kernels.hf.tokens import Domains
from petal_kernels.nn.arguments import check_range, check_values
from petal_kernels.nn.experts import ExpertAdapter, ExpertLoRALinear, LowRankExperts
from petal_kernels.nn.frozen_linear import MERGED_TRAINING, why_not_plain
from petal_kernels.nn.published import published_experts

_WHY_KEPT = {
    "softmax": "its router reads the input",
    "domain": "which expert serves a token is said with each call",
    "mean": "it stands behind a block, not on a linear",
}


class _Place:
    """One mixture: finds its experts by name, so that a copied model finds its own."""

    def __init__(self, slot: LayerSlot, place: Point | Target, name: str, path: str) -> None:
        self.slot, self.role, self.name, self.path = slot, place.role, name, path
        self.encoded = isinstance(place, Target) and place.encoded
        self.part = place.part

    @property
    def experts(self) -> Any:
        return self.slot.state.adapter.place(self.slot.index, self.name)

    def served(self, x: Tensor) -> dict[str, Tensor | None]:
        """What the experts need to know of the tokens in x."""
        tokens, mask, domain = self.slot.tokens(), None, None
        if self.experts.router_input == "pooled":
            mask = tokens.counted(x, self.encoded, self.part)
        if self.experts.gate == "domain":
            if tokens.domains is None:
                raise ValueError(
                    f"domain: want the domain of each token for {self.role!r}, got none; run the "
                    "model inside `with attachment.domains(domain):`"
                )
            domain = tokens.domains.of(x, self.encoded, self.part)
        return {"mask": mask, "domain": domain}


class ExpertInsert(_Place):
    """A mixture of adapters after one block."""

    def run(self, h: Tensor) -> Tensor | None:
        """The adapted output of the block; None while disabled."""
        state, adapter = self.slot.state, self.experts
        if not state.enabled:
            return None
        served = self.served(h)
        if state.published:
            out, routing = published_experts(adapter, h, h, keep=1.0, mix=adapter.scale, **served)
        else:
            out, routing = adapter(h, **served)
        self.slot.record(self.path, routing)
        return out


class ExpertLinear(AdaptedLinear):
    """A linear with a mixture of low-rank updates."""

    place: _Place

    def __init__(self, base: nn.Module, place: _Place) -> None:
        super().__init__(base, place.slot, place.role)
        self.__dict__["place"] = place

    def forward(self, x: Tensor) -> Tensor:
        state, lora = self.slot.state, self.place.experts
        if self.merged and self.training:
            raise RuntimeError(MERGED_TRAINING)
        if self.merged or not state.enabled:
            return super().forward(x)
        served = self.place.served(x)
        if state.published:
            y = super().forward(x)
            out, routing = published_experts(lora, x, y, keep=1.0, mix=lora.scale, **served)
        else:
            out, routing = lora.adapted(self.base, x, **served)
        self.slot.record(self.place.path, routing)
        return out


class ExpertAttachment(RoutedAttachment, InsertionAttachment):
    """Mixtures of experts on one model."""

    config: ExpertConfig

    def __init__(self, model: nn.Module, config: AdapterConfig, implementation: str) -> None:
        self._linears: list[tuple[Insertion, ExpertLinear]] = []
        super().__init__(model, config, implementation)

    @property
    def _routings(self) -> Routings:
        return self._state.routings

    def _experts(self) -> dict[str, LowRankExperts]:
        return self._modules  # type: ignore[return-value]

    @contextlib.contextmanager
    def domains(self, domain: Tensor, generated: int = 1, image: int = 0) -> Iterator[None]:
        """Inside, `domain` says which expert serves each token: integers [B, L] for the L positions
        of the sequence that the adapted stack sees (of an encoder-decoder model: the encoder; of a
        Q-Former: queries, then instruction), or [B], one for all tokens of a sample.

        Tokens behind the prompt, in cached decoding and in a decoder behind an encoder, are served
        by expert `generated`, an image's features that the stack reads by cross-attention by expert
        `image`. Where the model runs a multiple of B rows (beam search), every sample
        serves that many neighbouring rows. As with vision features, a backward outside the block
        recomputes with the right ones.
        """
        self._need_attached("domains")
        config = self.config
        if config.gate != "domain":
            raise ValueError(f"domains: want a config with gate='domain', got {config.gate!r}")
        checks.check_tensor("domain", domain)
        checks.check_dtype("domain", domain, (torch.int64, torch.int32))
        if domain.dim() not in (1, 2):
            raise ValueError(f"domain: want shape [B, L] or [B], got {list(domain.shape)}")
        for name, expert in (("generated", generated), ("image", image)):
            if type(expert) is not int or not 0 <= expert < config.experts:
                raise ValueError(
                    f"{name}: want an expert, 0 to {config.experts - 1}, got {expert!r}"
                )
        check_range("domain", domain, 0, config.experts - 1)
        for parameter in self.adapter.parameters():
            check_values("domain", domain, parameter)
        before = self._state.domains
        device = device_of(self.found.layers[0][1])
        self._state.domains = Domains(domain.to(device, torch.int64), generated, image)
        try:
            yield
        finally:
            self._state.domains = before

    def _kind(self) -> dict[str, Any]:
        config = self.config
        names = ("gate", "top_k", "router_input", "router_noise", "shared_down", "dtype")
        return {name: getattr(config, name) for name in names}

    def _install_point(self, insertion: Insertion, slot: LayerSlot) -> None:
        config, name = self.config, insertion.role.rpartition(".")[2]
        adapter = ExpertAdapter(
            self._width,
            config.experts,
            config.r,
            activation=config.activation,
            scale=config.scale,
            device=device_of(self.found.layers[insertion.layer][1]),
            **self._kind(),
        )
        self.adapter.add(insertion.layer, name, adapter)
        self._modules[insertion.path] = adapter
        assert isinstance(insertion.place, Point)
        insert = ExpertInsert(slot, insertion.place, name, insertion.path)
        self._mark(insertion.module, "_petal_insert", insert)
        self._hooks.append(insertion.module.register_forward_hook(adapt_output))

    def _install_lora(self, insertion: Insertion, place: Target, slot: LayerSlot) -> None:
        config, name = self.config, place.role.replace(".", "_")
        lora = ExpertLoRALinear(
            insertion.module,
            config.experts,
            config.r,
            alpha=config.alpha,
            own_base=False,
            **self._kind(),
        )
        self.adapter.add(insertion.layer, name, lora)
        self._modules[insertion.path] = lora
        where = _Place(slot, place, name, insertion.path)
        wrapper = ExpertLinear(insertion.module, where)
        self._wrap(*parent_of(self.model, insertion.path), wrapper)
        self._linears.append((insertion, wrapper))

    @torch.no_grad()
    def _merge(self) -> Merged:
        """The mean of low-rank updates is one; nothing else is folded."""
        merged = Merged(MergeReport())
        kept = merged.report.kept
        kept |= {i.path: _WHY_KEPT[self.config.gate] for i in self.found.at(Point)}
        for insertion, wrapper in self._linears:
            reason = why_not_plain(insertion.module)
            if self.config.gate != "mean":
                reason = _WHY_KEPT[self.config.gate]
            if reason:
                kept[insertion.path] = reason
                continue
            weight, lora = insertion.module.weight, wrapper.place.experts
            assert isinstance(weight, Tensor)
            merged.fold(
                insertion.path, insertion.module, _mean_delta(lora, wide_dtype(weight.dtype))
            )
            merged.freeze(lora.parameters())
            merged.flags.append(wrapper)
        kept |= dict.fromkeys(self._extra, "trained whole")
        for flagged in merged.flags:
            flagged.merged = True
        return merged


def _mean_delta(lora: ExpertLoRALinear, dtype: torch.dtype) -> Tensor:
    """s mean_e B_e A_e, [out, in]."""
    downs = lora.down.to(dtype).expand(lora.experts, -1, -1)
    return lora.scale * (lora.up.to(dtype) @ downs).mean(0)
