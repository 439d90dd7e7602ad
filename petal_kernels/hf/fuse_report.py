"""What `fuse` did, as the same report that `attach` gives."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from petal_kernels._runtime.dry_run import signature
from petal_kernels.hf.linears import Seen
from petal_kernels.hf.methods.lora import layer_of
from petal_kernels.hf.methods.lora_parts import FusedMlp, OneInput, taking
from petal_kernels.hf.parts import runs_twice
from petal_kernels.hf.peft_layers import FusedLora, Update, parts_of
from petal_kernels.hf.report import Report, Row, Rows, asked_dry
from petal_kernels.hf.twins import base_twin, twin_of
from petal_kernels.hf.walk import device_of
from petal_kernels.nn.frozen_linear import compute_dtype
from petal_kernels.nn.lora_fused import lora_linears, lora_mlp, watched
from petal_kernels.nn.routed_lora import linear_features

_PEFT = "peft"  # the backend of what PEFT's own forward runs


def fuse_report(
    model: nn.Module, layers: Mapping[str, Seen], declined: Mapping[str, str], tokens: Rows
) -> Report:
    """The report of PEFT's layers as they would run here and now; `declined`: those that cannot be
    fused, and why."""
    maker = _Maker(model, layers, tokens)
    rows: list[Row] = []
    seen: set[int] = set()
    for path, each in layers.items():
        backend, why = (_PEFT, declined[path]) if path in declined else maker.backend(path, each)
        trained = {id(p): p.numel() for p in each.module.parameters() if p.requires_grad}
        count = sum(size for key, size in trained.items() if key not in seen)
        seen |= set(trained)
        role = f"{each.part}.{each.name}"
        rows.append(Row(path, role, _shape(each.module), backend, why, count))
    trainable = [p for p in model.parameters() if p.requires_grad]
    own = {id(p) for p in trainable} | maker.adapters
    stored = sum(p.numel() for p in model.parameters() if id(p) in own)
    base = sum(p.numel() for p in model.parameters() if id(p) not in maker.adapters)
    counts = (base, sum(p.numel() for p in trainable), stored)
    return Report(rows, "fused", *counts, maker.called, tokens, maker.notes(), grouped=True)


class _Maker:
    """Asks each layer, equal ones once."""

    def __init__(self, model: nn.Module, layers: Mapping[str, Seen], tokens: Rows) -> None:
        self.modules, self.tokens = dict(model.named_modules()), tokens
        self.adapters = {id(p) for each in layers.values() for p in _adapters(each.module)}
        self.others = [p for p in model.parameters() if id(p) not in self.adapters]
        self.called: dict[str, str] = {}
        self._known: dict[Hashable, tuple[tuple[str, str], bool]] = {}
        self._joined: dict[int, str] = {}

    def backend(self, path: str, seen: Seen) -> tuple[str, str]:
        """What runs a fused layer, and why not a preferred one."""
        layer: Any = seen.module
        update = layer.member()
        if isinstance(update, str):
            return _PEFT, update
        parameters = (*update.base.parameters(), *self.others, update.down)
        dtype = next(p.dtype for p in parameters if p.is_floating_point())
        call = _Call(seen, (*self.tokens,), dtype)
        found = update.operands(compute_dtype(torch.empty(0, dtype=dtype)), call.device)
        if isinstance(found, str):
            self.called[path] = found
        twice = torch.is_grad_enabled() and runs_twice(layer_of(path, self.modules)[1])
        key = (call.key(), twice)
        if key not in self._known:
            self._known[key] = asked_dry(call, update.base, twice), call.joined
        backend, joined = self._known[key]
        if joined and call.part is not None:
            names = ", ".join(call.part.members)
            self._joined[id(call.part)] = f"{type(seen.parent).__name__} ({names})"
        return backend

    def notes(self) -> list[str]:
        """What runs in joined calls."""
        kinds = list(self._joined.values())
        return [f"one call: {kind} x {kinds.count(kind)}" for kind in dict.fromkeys(kinds)]


class _Call:
    """A layer's call on tensors without values: alone, or with those that it is joined with."""

    def __init__(self, seen: Seen, lead: tuple[int, ...], dtype: torch.dtype) -> None:
        self.layer: Any = seen.module
        self.lead, self.dtype = lead, dtype
        self.device = device_of(seen.module.get_submodule("base_layer"))
        joined = parts_of(seen.parent.__dict__.get("_petal"))
        self.part = next((part for part in joined if seen.name in part.members), None)
        members = {} if self.part is None else self.part.members
        self.twins = {id(each): _twin(each) for each in (self.layer, *members.values())}
        self.joined = False

    def key(self) -> Hashable:
        """Equal where the call is."""
        part = self.part
        seen = [] if part is None else [watched(member) for member in part.members.values()]
        return type(part), *seen, signature(self.twins[id(self.layer)], *self.twins.values())

    def __call__(self) -> object:
        if self.part is not None:
            members = [self.twins[id(each)] for each in self.part.members.values()]
            y = self._together(self.part, members)
            self.joined = not isinstance(y, str)
            if self.joined:
                return y
        return self.twins[id(self.layer)].forward(self._input(self.layer))

    def _input(self, linear: nn.Module) -> torch.Tensor:
        width = linear_features(linear)[0]
        return torch.empty(*self.lead, width, dtype=self.dtype, device=self.device)

    def _together(self, part: OneInput | FusedMlp, members: list[nn.Module]) -> object:
        asked, x = taking(members), self._input(members[0])
        if isinstance(asked, str):
            return asked
        if isinstance(part, OneInput):
            return lora_linears(x, asked)
        if any(watched(each) for each in (*part.members.values(), part.act)):
            return "a member is watched"
        return lora_mlp(x, asked, part.form.activation, recompute=part.recompute)


def _twin(linear: Any) -> Any:
    if not isinstance(linear, FusedLora):
        return base_twin(linear)
    layer: Any = linear
    base = base_twin(layer.base_layer)
    return twin_of(layer, _modules={**layer._modules, "base_layer": base})


def _adapters(layer: nn.Module) -> Iterator[nn.Parameter]:
    """What is a PEFT layer's own."""
    for name in getattr(layer, "adapter_layer_names", ()):
        held = getattr(layer, name, None)
        if isinstance(held, (nn.Module, nn.ParameterDict)):
            yield from held.parameters()


def _shape(layer: Any) -> str:
    """Its widths, and rank and scale of the adapter that runs."""
    found = "{} -> {}".format(*(getattr(layer, f"{side}_features", "?") for side in ("in", "out")))
    update = layer.member() if isinstance(layer, FusedLora) else ""
    if not isinstance(update, Update):
        return found
    return f"{found}, r {update.down.shape[0]}, scale {update.scale:g}"
