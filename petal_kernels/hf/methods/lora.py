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
from petal_kernels.hf.merging import Merged
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
from petal_kernels.hf.token_rows import Tables
from petal_kernels.hf.twins import base_twin, twin_of
from petal_kernels.hf.walk import device_of, is_a, joined
from petal_kernels.hf.whole import extra_modules
from petal_kernels.hf.wrappers import AdaptedLinear
from petal_kernels.nn.dora import KEPT, DoRALinear
from petal_kernels.nn.frozen_linear import why_not_readable
from petal_kernels.nn.lora import LoRALinear
from petal_kernels.nn.lora_fused import watched
from petal_kernels.nn.lora_init import is_taken
from petal_kernels.nn.published import published_magnitude, published_update

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
        if wanted and not self._sites:
            chosen.notes.append(
                f"frozen_norms={self.config.frozen_norms!r} changes nothing: no module in front of "
                "the adapted linears gave the values of a known norm (one whose forward was "
                "replaced is not asked; a kernel that needs a GPU cannot answer on the CPU)"
            )
        self._split: set[str] = set()  # of MLPs that run in parts
        self._parents = {seen.path: seen.parent for seen in chosen.linears}
        layers: dict[int, Layer] = {}
        for seen in chosen.linears:
            where, layer = layer_of(seen.path, modules)
            new = Layer(len(layers), where, layer, _ROW)
            known = layers.setdefault(id(layer), new)
            if known is new:
                site.layers.append(new)
            role = f"{seen.part}.{seen.name}"
            row = Linear("", seen.name, seen.path)
            known.places.append(Place(role, row, seen.path, seen.module, known))
        self._biased = self._biases(model, {seen.path for seen in chosen.linears})
        self._tables = self._find_tables(model, chosen)
        kind = getattr(getattr(root, "config", None), "model_type", None)
        model_type = str(kind or type(root).__name__)
        return Found(model_type, path, root, [site], chosen.notes, chosen.outside)

    def _find_tables(self, model: nn.Module, chosen: Chosen) -> Tables | None:
        if self.config.trainable_token_indices is None:
            return None
        saved = [seen for seen in chosen.every if seen.saved]
        taken = {id(seen.module): "modules_to_save trains whole" for seen in saved}
        taken |= {id(seen.module): "LoRA adapts" for seen in chosen.linears}
        taken |= {id(s.module): f"stays: {s.read_by}" for s in chosen.every if s.read_by}
        return Tables(model, self.config.trainable_token_indices, taken)

    def _table(self, model: nn.Module) -> list[str] | None:
        """The query and value projections as the table of models has them, where none is named."""
        if self.config.target_modules is not None:
            return None
        try:
            known = found.find(model, self.config, self.rows, structural=True)
        except ValueError as error:
            raise ValueError(
                "target_modules: want names of linears or 'all-linear' for a model that the "
                f"package has no query and value projections of, got None ({error})"
            ) from error
        return [place.path for place in known.places]

    def build(self) -> Factors:
        factors, config = Factors(), self.config
        kind = DoRALinear if config.use_dora else LoRALinear
        is_read = self.loads and is_taken(config.init_lora_weights)
        for place in self.found.places:
            try:
                module = kind(
                    place.module,
                    of_pattern(config.rank_pattern, place.path, config.r),
                    alpha=of_pattern(config.alpha_pattern, place.path, config.lora_alpha),
                    rslora=config.use_rslora,
                    dropout=config.lora_dropout,
                    init=True if is_read else config.init_lora_weights,
                    own_base=False,
                    device=device_of(place.module),
                    dtype=config.dtype,
                )
            except ValueError as error:
                raise ValueError(f"{_in_config(str(error))} (of {place.path})") from error
            if is_read:
                module.reserve_first()
            factors.put(place.path, module)
        self.tables = {} if self._tables is None else self._tables.build(config.dtype)
        for path, table in self.tables.items():
            factors.put(path, table)
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
        if self._tables is not None:
            self._tables.install(self, self.tables, hand)
        guard_embeddings(self.found.root, hand)

    def _join(self, hand: Hand) -> None:
        """Lets the modules around adapted linears run several in one call, where their code says
        that they may."""
        parents = dict.fromkeys(self._parents[place.path] for place in self.found.places)
        for parent in parents:
            part = fused_mlp(self, parent, self.config.recompute_mlp)
            if part is not None and self.config.use_dora:
                # What reads one tensor is all that a magnitude lets join.
                own = [path for path, each in self._parents.items() if each is parent]
                self._split.update(own)
                part = None
            parts: Sequence[OneInput | FusedMlp] = (
                [part] if part is not None else one_input_parts(self, parent)
            )
            for each in parts:
                hand.take(parent, each)
                members = [m for m in each.members.values() if isinstance(m, LoraLinear)]
                self._joined.update((path, each) for path, w in self._wrappers if w in members)

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

    def fold_rest(self, merged: Merged) -> dict[str, str]:
        return {} if self._tables is None else self._tables.fold(self.tables, merged)

    # -- what it says -----------------------------------------------------------------------------

    def trains(self, place: Place) -> LoRALinear:
        module: LoRALinear = self.adapter.get_submodule(place.path)  # type: ignore[assignment]
        return module

    def place_row(self, place: Place) -> Row:
        lora = self.trains(place)
        shape = f"{lora.in_features} -> {lora.out_features}, r {lora.r}, scale {lora.scale:g}"
        if lora.first_down is not None:
            shape += f", {self.config.init_lora_weights}"
        if isinstance(lora, DoRALinear):
            shape += ", magnitude"
        count = sum(p.numel() for p in lora.parameters() if p.requires_grad)
        return Row(place.path, place.role, shape, "", self._why_alone(place, lora), count)

    def _why_alone(self, place: Place, lora: LoRALinear) -> str:
        """Why a linear does not run in one call with those that it could run with."""
        drops = lora.dropout > 0.0 and lora.training
        own = isinstance(lora, DoRALinear) or lora.first_down is not None
        if place.path in self._joined and drops and own:
            return "one by one in training: dropout leaves out a part of the base"
        if place.path in self._split:
            return "its MLP in parts: a magnitude stands before the activation"
        return ""

    def shared_rows(self) -> list[Row]:
        """The norms, and the rows of tokens."""
        how = self.config.frozen_norms
        rows = [
            Row(path, "norm", f"{part.norm.kind} {width_of(module)}, {how}", "", "", 0)
            for path, (module, part) in self._norms.items()
        ]
        for path, table in self.tables.items():
            assert self._tables is not None
            for number, (use, module) in enumerate(self._tables.modules[path].items()):
                size = "{} of {} x {}".format(len(table.numbers), *_size(module))
                count = 0 if number else table.rows.numel()
                rows.append(Row(use, "rows of tokens", size, "", "", count))
        return rows

    def shared_sample(self, row: Row, tokens: Rows) -> Callable[[], object] | None:
        module, part = self._norms.get(row.module, (None, None))
        if module is None or part is None or part.merged:
            return None
        return lambda: part.of(module, self.typical(module, tokens, width_of(module)))

    def why_called(self, base: nn.Module) -> str:
        return why_not_readable(base)

    def sample(self, place: Place, wrapper: Any, tokens: Rows) -> tuple[Any, Any]:
        lora = twin_of(wrapper.used(), base=base_twin(wrapper.base))
        bias = wrapper.trained_bias()
        key = signature(lora, bias, ignore=KEPT)

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
        return (key, signature(*twins.values(), *biases, ignore=KEPT), *watched_now), joined


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
            return self._published(lora, x)
        y = taken(self, x)
        # `forward` of the instance: an engine that loads the weights puts its own there.
        return lora.forward(x, self.trained_bias()) if y is None else y

    def _published(self, lora: LoRALinear, x: Tensor) -> Tensor:
        y, bias = self.with_merged(x), self.trained_bias()
        if isinstance(lora, DoRALinear):
            own = self.base._parameters.get("bias") if bias is None else bias
            return published_magnitude(lora, y, x, own)
        return published_update(lora, y, x)

    def used(self) -> LoRALinear:
        lora: LoRALinear = self.__dict__["lora"]
        return lora

    def delta(self, dtype: torch.dtype) -> Tensor:
        """s B A, or what a magnitude makes of it: without dropout it is the whole update."""
        return self.used().delta(dtype)


# Words of a module's argument for the config's.
_FIELDS = {"init": "init_lora_weights", "alpha": "lora_alpha", "base": "use_dora"}


def _in_config(text: str) -> str:
    """The module's error by the config's own name of the field."""
    name, _, rest = text.partition(":")
    return f"{_FIELDS.get(name, name)}:{rest}"


def _size(module: nn.Module) -> tuple[int, int]:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight.shape[0], weight.shape[1]


def layer_of(path: str, modules: dict[str, nn.Module]) -> tuple[str, nn.Module]:
    """The layer around a linear that can be checkpointed; itself where there is none."""
    where = path.rpartition(".")[0]
    while where:
        if is_a(modules[where], "GradientCheckpointingLayer"):
            return where, modules[where]
        where = where.rpartition(".")[0]
    return path, modules[path]
