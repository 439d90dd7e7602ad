"""VL-PET, VL-Adapter and routing attached: adapters by hooks on the blocks' outputs, low-rank
updates and value adapters by wrappers that share the linears' parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from petal_kernels._runtime import checks
from petal_kernels._runtime.numerics import wide_dtype
from petal_kernels.hf.attachment import Attachment
from petal_kernels.hf.config import AdapterConfig, RoutingConfig, VLAdapterConfig, VLPetConfig
from petal_kernels.hf.dropped_mask import DroppedMask
from petal_kernels.hf.embeddings import guard_embeddings
from petal_kernels.hf.insertion.layers import (
    Insert,
    InsertionAdapter,
    LayerSlot,
    PostNorm,
    RoutedLinear,
    State,
    ValueLinear,
    adapt_output,
    enter_stack,
    keep_input,
    leave_stack,
)
from petal_kernels.hf.insertion.report import make_report
from petal_kernels.hf.insertion.specs import (
    Found,
    Insertion,
    Point,
    Target,
    base_signature,
    find,
    width_of,
)
from petal_kernels.hf.merging import Merged, MergeReport
from petal_kernels.hf.report import Report
from petal_kernels.hf.stack import adapted_class
from petal_kernels.hf.tokens import reader_of
from petal_kernels.nn.arguments import check_values
from petal_kernels.nn.frozen_linear import why_not_plain
from petal_kernels.nn.gated_adapter import GatedAdapter
from petal_kernels.nn.routed_lora import RoutedLoRALinear, linear_features
from petal_kernels.nn.value_adapter import ValueAdapter


class InsertionAttachment(Attachment):
    """One of these methods on one model."""

    adapter: InsertionAdapter

    def __init__(self, model: nn.Module, config: AdapterConfig, implementation: str) -> None:
        self.found = find(model, config)
        adapter = InsertionAdapter()
        linears = [i.module for i in self.found.at(Target)]
        trained = _trained(self.found, config)
        super().__init__(model, config, adapter, implementation, linears, trained)
        published = implementation == "published"
        self._state = State(adapter, published=published, reader=reader_of(config))
        blip = self.found.model_type in ("blip", "blip_text_model")
        if blip and any(".cross" in i.role for i in self.found.insertions):
            self._state.dropped = DroppedMask()
        self._routed: list[tuple[Insertion, RoutedLinear]] = []
        self._modules: dict[str, nn.Module] = {}  # the adapters by the path of their place
        self._width = width_of(self.found)
        self._install()

    def signature(self) -> dict[str, Any]:
        return base_signature(self.found)

    @contextlib.contextmanager
    def vision(self, features: Tensor) -> Iterator[None]:
        """Inside, routes read `features`: [B, V, d], or [B, d] for one token per sample.

        d is the width of the adapted layers. Where the model runs a multiple of B rows (beam
        search), every sample serves that many neighbouring rows. The features are bound to each
        layer's call: a backward outside the block recomputes with the right ones.
        """
        self._need_attached("vision")
        checks.check_floating("features", features)
        if features.dim() not in (2, 3):
            raise ValueError(
                f"features: want shape [B, V, d] or [B, d], got {list(features.shape)}"
            )
        if features.shape[-1] != self._width:
            raise ValueError(
                f"features: want the width {self._width} of the adapted layers (project them "
                f"first), got {list(features.shape)}"
            )
        if not features.numel():
            raise ValueError(f"features: want at least one token, got {list(features.shape)}")
        for parameter in self.adapter.parameters():
            check_values("features", features, parameter)
        before = self._state.vision
        self._state.vision = features if features.dim() == 3 else features.unsqueeze(1)
        try:
            yield
        finally:
            self._state.vision = before

    def report(self) -> Report:
        self._need_attached("report")
        return make_report(
            self.model,
            self.adapter,
            self._extra,
            self.found,
            self._modules,
            self.implementation,
        )

    # -- installing ---------------------------------------------------------------------------

    def _install(self) -> None:
        slots: dict[int, LayerSlot] = {}
        values = 0
        self._add_value()
        for insertion in self.found.insertions:
            index = insertion.layer
            if index not in slots:
                slots[index] = self._slot(index)
            place = insertion.place
            if isinstance(place, Point):
                self._install_point(insertion, slots[index])
            elif isinstance(self.config, VLPetConfig):
                wrapper = ValueLinear(insertion.module, slots[index], place.role, values)
                self._wrap(*parent_of(self.model, insertion.path), wrapper)
                values += 1
            else:
                self._install_lora(insertion, place, slots[index])
        self.adapter.train(self.model.training)
        self._hooks += guard_embeddings(self.model)
        for number, (_, stack) in enumerate(self.found.stacks.values()):
            self._mark(stack, "_petal_state", self._state)
            self._mark(stack, "_petal_first", number == 0)
            hook = stack.register_forward_pre_hook(enter_stack, with_kwargs=True)
            self._hooks.append(hook)
            self._hooks.append(stack.register_forward_hook(leave_stack, always_call=True))

    def _slot(self, index: int) -> LayerSlot:
        _, layer, _ = self.found.layers[index]
        slot = LayerSlot(self._state, index)
        self._mark(layer, "_petal_slot", slot)
        self._change_class(layer, adapted_class(type(layer)))
        return slot

    def _add_value(self) -> None:
        config, targets = self.config, self.found.at(Target)
        if not isinstance(config, VLPetConfig) or not targets:
            return
        shapes = {linear_features(i.module) for i in targets}
        if len(shapes) != 1:
            raise ValueError(f"model: want one shape for all values' projections, got {shapes}")
        d_in, d_out = shapes.pop()
        self.adapter.value = ValueAdapter(
            d_in,
            d_out,
            config.value_r,
            len(targets),
            activation=config.activation,
            init="normal" if config.init == "normal" else "zero",
            device=device_of(targets[0].module),
            dtype=config.dtype,
        )

    def _install_point(self, insertion: Insertion, slot: LayerSlot) -> None:
        config = self.config
        shared = isinstance(config, RoutingConfig) and config.share
        name = "shared" if shared else insertion.role.rpartition(".")[2]
        if not shared or not self.adapter.has(insertion.layer, name):
            layer = self.found.layers[insertion.layer][1]
            self.adapter.add(insertion.layer, name, _adapter(config, self._width, device_of(layer)))
        self._modules[insertion.path] = self.adapter.place(insertion.layer, name)
        path, layer, _ = self.found.layers[insertion.layer]
        place = insertion.place
        assert isinstance(place, Point)
        norm = layer.get_submodule(place.norm) if place.norm else None
        insert = Insert(slot, insertion.role, name, norm)
        if norm is not None:
            self._wrap(
                *parent_of(self.model, f"{path}.{place.norm}"), PostNorm(norm, insert, layer)
            )
        assert insertion.reads is not None
        self._mark(insertion.reads, "_petal_reads", insert)
        self._mark(insertion.module, "_petal_insert", insert)
        hook = insertion.reads.register_forward_pre_hook(keep_input, with_kwargs=True)
        self._hooks.append(hook)
        self._hooks.append(insertion.module.register_forward_hook(adapt_output))

    def _install_lora(self, insertion: Insertion, place: Target, slot: LayerSlot) -> None:
        config = self.config
        assert isinstance(config, RoutingConfig)
        name = place.role.replace(".", "_")
        lora = RoutedLoRALinear(
            insertion.module,
            config.r,
            config.function,
            parts=place.parts,
            targets=place.targets,
            groups=config.groups,
            alpha=config.alpha,
            dropout=config.dropout,
            variant=config.variant,
            own_base=False,
            dtype=config.dtype,
        )
        self.adapter.add(insertion.layer, name, lora)
        self._modules[insertion.path] = lora
        wrapper = RoutedLinear(insertion.module, slot, place.role, name)
        self._wrap(*parent_of(self.model, insertion.path), wrapper)
        self._routed.append((insertion, wrapper))

    # -- switching, merging -------------------------------------------------------------------

    def _enable(self, enabled: bool) -> None:
        self._state.enabled = enabled

    @torch.no_grad()
    def _merge(self) -> Merged:
        """LoRA without a route or dropout is W + s B A; everything else stays."""
        config = self.config
        if isinstance(config, RoutingConfig) and config.function != "none":
            raise ValueError(
                f"merge: route {config.function!r} depends on the vision features of each sample "
                "and cannot be folded into a weight"
            )
        merged = Merged(MergeReport())
        for insertion in self.found.at(Point):
            merged.report.kept[insertion.path] = "an activation stands between its projections"
        for insertion, wrapper in self._routed:
            reason = why_not_plain(insertion.module)
            if reason:
                merged.report.kept[insertion.path] = reason
                continue
            lora = self.adapter.place(insertion.layer, wrapper.name)
            weight = insertion.module.weight
            assert isinstance(weight, Tensor)
            merged.fold(insertion.path, insertion.module, lora.delta(wide_dtype(weight.dtype)))
            merged.freeze(lora.parameters())
            merged.flags.append(wrapper)
        if self.adapter.value is not None:
            merged.report.kept["value adapters"] = "an activation stands between their projections"
        for path in self._extra:
            merged.report.kept[path] = "trained whole"
        for flagged in merged.flags:
            flagged.merged = True
        return merged


def parent_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that owns the one at `path`, and its name there."""
    parent, _, child = path.rpartition(".")
    return model.get_submodule(parent), child


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters are."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _adapter(config: AdapterConfig, width: int, device: torch.device) -> GatedAdapter:
    kind: dict[str, Any] = {"device": device, "dtype": config.dtype}
    if isinstance(config, VLPetConfig):
        return GatedAdapter(
            width,
            config.r,
            gate=config.gate,
            gate_r=config.gate_r,
            activation=config.activation,
            scale=config.scale,
            init=config.init,
            variant=config.variant,
            **kind,
        )
    if isinstance(config, VLAdapterConfig):
        kind["init"] = config.init
        return GatedAdapter(width, config.r, activation=config.activation, **kind)
    assert isinstance(config, RoutingConfig)
    return GatedAdapter(
        width,
        config.r,
        activation=config.activation,
        route=config.function,
        add_input=config.residual,
        variant=config.variant,
        **kind,
    )


class _Bias(nn.Module):
    """A linear's bias alone, to be trained and stored like a module."""

    def __init__(self, bias: nn.Parameter) -> None:
        super().__init__()
        self.bias = bias


def _trained(found: Found, config: AdapterConfig) -> dict[str, nn.Module]:
    """The norms and biases that the method trains whole, by path."""
    biases: dict[str, nn.Module] = {}
    if isinstance(config, RoutingConfig) and config.train_bias:
        for insertion in found.at(Target):
            bias = insertion.module._parameters.get("bias")
            if bias is not None:
                biases[insertion.path] = _Bias(bias)
    if not getattr(config, "train_norms", False):
        return biases
    if isinstance(config, RoutingConfig):
        roots = [(path, layer) for path, layer, _ in found.layers]
    else:
        only = "encoder" if isinstance(config, VLPetConfig) else None
        stacks = found.stacks.items()
        roots = [(path, stack) for path, (name, stack) in stacks if only in (None, name)]
    return biases | {
        path: module
        for root_path, root in roots
        for path, module in root.named_modules(prefix=root_path)
        if type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
    }
