"""LoRA on any linear of any model, found by PEFT's names.

A wrapper is an ordinary module that reads its own factors: layers share nothing, and a compiled or
checkpointed layer sees plain modules. The adapter mirrors the model's paths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petal_kernels._runtime.dry_run import signature
from petal_kernels.hf import found
from petal_kernels.hf.found import Found, Layer, Place, Site
from petal_kernels.hf.linears import Chosen, of_pattern
from petal_kernels.hf.lora_config import LoraConfig
from petal_kernels.hf.method import Hand, Method
from petal_kernels.hf.methods.embeddings import guard_embeddings
from petal_kernels.hf.methods.insertion import lora_rows
from petal_kernels.hf.methods.lora_parts import (
    FusedMlp,
    OneInput,
    fused_mlp,
    one_input_parts,
    taken,
)
from petal_kernels.hf.models import Block, Linear, Stack
from petal_kernels.hf.norms import FrozenNorm, norms_around, width_of
from petal_kernels.hf.parts import LayerPart
from petal_kernels.hf.report import Row, Rows
from petal_kernels.hf.twins import base_twin, twin_of
from petal_kernels.hf.walk import device_of, is_a, joined
from petal_kernels.hf.whole import extra_modules
from petal_kernels.hf.wrappers import AdaptedLinear
from petal_kernels.nn.frozen_linear import why_not_readable
from petal_kernels.nn.lora import LoRALinear
from petal_kernels.nn.lora_fused import watched
from petal_kernels.nn.published import published_update

_ROW = Stack("linears", "", ())


class Factors(nn.Module):
    """Everything trainable: modules by the paths of the model's linears."""

    def put(self, path: str, module: nn.Module) -> None:
        """Registers the factors of the linear at `path`."""
        parents, _, name = path.rpartition(".")
        node: nn.Module = self
        for part in parents.split(".") if parents else ():
            if part not in node._modules:
                node.add_module(part, nn.Module())
            node = node._modules[part]  # type: ignore[assignment]
        node.add_module(name, module)

    def forward(self, x: Any) -> Any:
        """An nn.Sequential that is adapted runs this too, behind its own modules."""
        return x


class Lora(Method):
    """LoRA on one model."""

    shares = False
    mirrors = True
    groups_rows = True
    config: LoraConfig
    adapter: Factors

    def rows(self, stack: Stack) -> Sequence[tuple[str, Linear | Block]] | None:
        """Where the config names nothing."""
        return None if stack.name == "vision" else lora_rows(stack)

    def find(self, model: nn.Module) -> Found:
        chosen = Chosen(model, self.config, self._table(model))
        modules = dict(model.named_modules())
        path, root = next(
            ((p, m) for p, m in modules.items() if hasattr(getattr(m, "config", None), "to_dict")),
            ("", model),
        )
        site = Site(_ROW, path, root)
        self._wrappers: list[tuple[str, LoraLinear]] = []
        self._joined: dict[str, OneInput | FusedMlp] = {}  # by the paths of their members
        self._norms: dict[str, tuple[nn.Module, FrozenNorm]] = {}
        wanted = self.config.frozen_norms != "module"
        self._sites = norms_around(model, [s.path for s in chosen.linears]) if wanted else {}
        self._parents = {seen.path: seen.parent for seen in chosen.linears}
        layers: dict[int, Layer] = {}
        for seen in chosen.linears:
            where, layer = _layer_of(seen.path, modules)
            new = Layer(len(layers), where, layer, _ROW)
            known = layers.setdefault(id(layer), new)
            if known is new:
                site.layers.append(new)
            role = f"{seen.part}.{seen.name}"
            row = Linear("", seen.name, seen.path)
            known.places.append(Place(role, row, seen.path, seen.module, known))
        self._biased = self._biases(model, {seen.path for seen in chosen.linears})
        kind = getattr(getattr(root, "config", None), "model_type", None)
        return Found(str(kind or type(root).__name__), path, root, [site], chosen.notes)

    def _table(self, model: nn.Module) -> list[str] | None:
        """The query and value projections as the table of models has them, where none is named."""
        if self.config.target_modules is not None:
            return None
        try:
            known = found.find(model, self.config, self.rows)
        except ValueError as error:
            raise ValueError(
                "target_modules: want names of linears or 'all-linear' for a model that the "
                f"package has no query and value projections of, got None ({error})"
            ) from error
        return [place.path for place in known.places]

    def build(self) -> Factors:
        factors, config = Factors(), self.config
        for place in self.found.places:
            module = LoRALinear(
                place.module,
                of_pattern(config.rank_pattern, place.path, config.r),
                alpha=of_pattern(config.alpha_pattern, place.path, config.lora_alpha),
                rslora=config.use_rslora,
                dropout=config.lora_dropout,
                init=config.init_lora_weights,
                own_base=False,
                device=device_of(place.module),
                dtype=config.dtype,
            )
            factors.put(place.path, module)
        return factors

    def trained_biases(self) -> dict[str, nn.Module]:
        return self._biased

    def _biases(self, model: nn.Module, adapted: set[str]) -> dict[str, nn.Module]:
        """The modules whose biases are trained, as PEFT means it: whose parameters' names have that
        word."""
        wanted = self.config.bias
        if wanted == "none":
            return {}
        whole = extra_modules(model, self.config.modules_to_save, ()).values()
        saved = {id(child) for module in whole for child in module.modules()}
        found = {}
        for path, module in model.named_modules():
            names = [n for n, p in module._parameters.items() if p is not None]
            if path in adapted:
                has = "bias" in names
            else:
                has = wanted == "all" and any("bias" in joined(path, name) for name in names)
            if has and id(module) not in saved:
                found[path] = module
        return found

    def signature(self) -> dict[str, Any]:
        linears: dict[str, int] = {}
        for place in self.found.places:
            name = f"{place.path.rpartition('.')[2]} {place.shape[0]} -> {place.shape[1]}"
            linears[name] = linears.get(name, 0) + 1
        return {"family": self.found.model_type, "linears": linears}

    # -- how it runs ------------------------------------------------------------------------------

    def install(self, hand: Hand) -> None:
        for layer in self.found.layers:
            for place in layer.places:
                self.install_place(place, layer, hand)
            if layer.module is not layer.places[0].module:
                # It binds a checkpointed run's call alone, for its recompute.
                hand.take(layer.module, LayerPart(self, layer.index, 0))
        if not self.published:
            self._join(hand)
            self._take_norms(hand)
        guard_embeddings(self.found.root, hand)

    def _join(self, hand: Hand) -> None:
        """Lets the modules around adapted linears run several in one call, where their code says
        that they may."""
        parents = dict.fromkeys(self._parents[place.path] for place in self.found.places)
        for parent in parents:
            part = fused_mlp(self, parent, self.config.recompute_mlp)
            parts: Sequence[OneInput | FusedMlp] = (
                [part] if part is not None else one_input_parts(self, parent)
            )
            for each in parts:
                hand.take(parent, each)
                own = [m for m in each.members.values() if isinstance(m, LoraLinear)]
                self._joined.update((path, each) for path, w in self._wrappers if w in own)

    def _take_norms(self, hand: Hand) -> None:
        """Lets the frozen norms in front of adapted linears run as the config has it."""
        wrappers, folded = dict(self._wrappers), self.config.frozen_norms == "folded"
        for path, (module, norm, linears) in self._sites.items():
            if "_petal_copy" in module.__dict__:  # it is trained
                continue
            fed = [wrappers[each] for each in linears]
            self._norms[path] = module, FrozenNorm(self, norm, fed, folded)
            hand.take(*self._norms[path])

    def install_place(self, place: Place, layer: Any, hand: Hand) -> None:
        bias = self.biases.get(place.path)
        wrapper = LoraLinear(place.module, self, self.trains(place), bias)
        self._wrappers.append((place.path, wrapper))
        hand.wrap(place, wrapper)

    # -- what it says -----------------------------------------------------------------------------

    def trains(self, place: Place) -> LoRALinear:
        module: LoRALinear = self.adapter.get_submodule(place.path)  # type: ignore[assignment]
        return module

    def place_row(self, place: Place) -> Row:
        lora = self.trains(place)
        shape = f"{lora.in_features} -> {lora.out_features}, r {lora.r}, scale {lora.scale:g}"
        count = sum(p.numel() for p in lora.parameters() if p.requires_grad)
        return Row(place.path, place.role, shape, "", "", count)

    def shared_rows(self) -> list[Row]:
        """The norms."""
        how = self.config.frozen_norms
        return [
            Row(path, "norm", f"{part.norm.kind} {width_of(module)}, {how}", "", "", 0)
            for path, (module, part) in self._norms.items()
        ]

    def shared_sample(self, row: Row, tokens: Rows) -> Callable[[], object] | None:
        module, part = self._norms[row.module]
        if part.merged:
            return None
        return lambda: part.of(module, self.typical(module, tokens, width_of(module)))

    def why_called(self, base: nn.Module) -> str:
        return why_not_readable(base)

    def sample(self, place: Place, wrapper: Any, tokens: Rows) -> tuple[Any, Any]:
        lora = twin_of(wrapper.used(), base=base_twin(wrapper.base))
        bias = wrapper.trained_bias()
        key = signature(lora, bias)

        def alone() -> object:
            return lora.forward(self.typical(lora.base, tokens), bias)

        part = self._joined.get(place.path)
        if part is None:
            return key, alone
        members = [m for m in part.members.values() if isinstance(m, LoraLinear)]
        twins: dict[AdaptedLinear, Any] = {
            m: twin_of(m.used(), base=base_twin(m.base)) for m in members
        }

        def joined() -> object:
            first = next(iter(part.members.values()))
            found = part.dry(twins, self.typical(getattr(first, "base", first), tokens))
            return alone() if isinstance(found, str) else found

        biases = [m.trained_bias() for m in members]
        watched_now = [watched(m) for m in part.members.values()]
        return (key, signature(*twins.values(), *biases), *watched_now), joined


class LoraLinear(AdaptedLinear):
    """A linear with its update: all that it needs is its own."""

    def __init__(
        self, base: nn.Module, method: Method, lora: LoRALinear, bias: nn.Module | None
    ) -> None:
        super().__init__(base, method, bias)
        # A reference, no child: it is registered at the model's root.
        self.__dict__["lora"] = lora

    def adapted(self, x: Tensor) -> Tensor:
        lora = self.used()
        if self.method.published:
            return published_update(lora, self.with_merged(x), x)
        y = taken(self, x)
        # `forward` of the instance: an engine that loads the weights puts its own there.
        return lora.forward(x, self.trained_bias()) if y is None else y

    def used(self) -> LoRALinear:
        lora: LoRALinear = self.__dict__["lora"]
        return lora

    def delta(self, dtype: torch.dtype) -> Tensor:
        """s B A: without dropout it is the whole update."""
        return self.used().delta(dtype)


def _layer_of(path: str, modules: dict[str, nn.Module]) -> tuple[str, nn.Module]:
    """The layer around a linear that can be checkpointed; itself where there is none."""
    where = path.rpartition(".")[0]
    while where:
        if is_a(modules[where], "GradientCheckpointingLayer"):
            return where, modules[where]
        where = where.rpartition(".")[0]
    return path, modules[path]
