"""What a method is: a description. The life cycle around it (`attachment.py`) is written once.

A method says which rows of the table of models it adapts, what it trains, how a place runs, what a
forward of a stack shares, and what merging leaves. One instance belongs to one attachment; it is a
plain object that is copied and pickled with the model.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from petal_kernels.hf import found
from petal_kernels.hf.context import Call, given
from petal_kernels.hf.dropped_mask import DroppedMask
from petal_kernels.hf.found import Found, Layer, Place, counted, own_name
from petal_kernels.hf.merging import Merged
from petal_kernels.hf.models import Block, Linear, Stack
from petal_kernels.hf.parts import LayerPart, Part, StackPart, own_class, running_call
from petal_kernels.hf.report import Row, Rows
from petal_kernels.hf.routing import Routings
from petal_kernels.hf.tokens import Tokens, named, reader_of
from petal_kernels.hf.walk import device_of
from petal_kernels.hf.wrappers import AdaptedLinear
from petal_kernels.nn.frozen_linear import why_not_plain
from petal_kernels.nn.low_rank_experts import LowRankExperts
from petal_kernels.nn.routed_lora import linear_features


class Hand(Protocol):
    """What installs and remembers, so that everything is taken back by detach."""

    def take(self, module: nn.Module, part: Part) -> None:
        """Lets `module` take part."""

    def wrap(self, place: Place, wrapper: AdaptedLinear) -> None:
        """Puts `wrapper` where the place's linear stands."""


class Method(ABC):
    """One method on one model: what is its own."""

    needs: ClassVar[Sequence[str]] = ()  # stacks that it cannot do without
    structural: ClassVar[bool] = False  # whether it adapts layers that no row of the table names
    shares: ClassVar[bool] = True  # whether a stack's forward makes something for its layers
    stack_starts: ClassVar[bool] = True  # whether the first stack's forward begins a new routing
    mirrors: ClassVar[bool] = False  # whether the adapter's names begin at the model's root
    groups_rows: ClassVar[bool] = False  # whether a report's table joins equal rows of its layers
    blocks: ClassVar[Mapping[str, str]] = {}  # the `with` blocks it reads, and for what

    def __init__(
        self, model: nn.Module, config: Any, *, published: bool, loads: bool = False
    ) -> None:
        """`loads`: a file brings all values, none need be computed first."""
        self.config, self.published, self.loads = config, published, loads
        self.switched = False  # whether another adapter of the model was active before, or is now
        self.found: Found = self.find(model)
        for layer in self.found.layers:
            layer.places = [place for place in layer.places if self.keeps(place)]
        if not self.found.places:
            raise ValueError(
                f"model: want places that {config.method!r} can adapt with this config, got none "
                f"in a {self.found.model_type!r} model, a {type(model).__name__}"
            )
        self.reader = reader_of(config)  # what takes one choice per sample, if anything does
        crosses = any("cross" in place.role for place in self.found.places)
        blip = self.found.model_type in ("blip", "blip_text_model")
        self.dropped = DroppedMask() if crosses and blip else None
        self.routings = Routings()
        self.biases: dict[str, nn.Module] = {}
        self.adapter = self.build()

    # -- what it adapts and trains ----------------------------------------------------------------

    @abstractmethod
    def rows(self, stack: Stack) -> Sequence[tuple[str, Linear | Block]] | None:
        """Roles and rows that it adapts in the layers of a stack; None: none of its stacks."""

    def find(self, model: nn.Module) -> Found:
        """The places that it adapts, among its rows of the table of models."""
        return found.find(model, self.config, self.rows, self.needs, self.structural)

    def keeps(self, place: Place) -> bool:
        """Whether the config can adapt a place that was found; raises where it was named."""
        return True

    @abstractmethod
    def build(self) -> nn.Module:
        """Everything trainable, to be registered once at the model's root."""

    def trained(self) -> dict[str, nn.Module]:
        """The base's modules that it trains whole, by path."""
        return {}

    def trained_biases(self) -> dict[str, nn.Module]:
        """The linears whose biases it trains, by path; its `biases` then hold the copies."""
        return {}

    def width(self) -> int:
        """Of the features that blocks give."""
        return self.found.width()

    def signature(self) -> dict[str, Any]:
        """What the adapter needs of its base, as stored with it."""
        layers: dict[str, int] = {}
        for layer in self.found.layers:
            name = own_name(layer.module, layer.row.layer)
            layers[name] = layers.get(name, 0) + 1
        places = counted(self.found.places)
        return {"family": self.found.model_type, "layers": layers, "places": places}

    # -- how it runs ------------------------------------------------------------------------------

    def install(self, hand: Hand) -> None:
        """Puts parts and wrappers into the model, in one walk: stack, layer, place."""
        for number, stack in enumerate(self.found.stacks):
            if (self.shares or self.dropped is not None) and stack.places:
                hand.take(stack.module, StackPart(self, number, stack))
            for layer in stack.layers:
                part = self.layer_part(layer, number)
                if part is None:
                    continue
                for place in layer.places:
                    self.install_place(place, part, hand)
                part.install(layer, hand)
                hand.take(layer.module, part)

    def layer_part(self, layer: Layer, stack: int) -> LayerPart | None:
        """How a layer takes part; None where nothing of it is adapted."""
        return LayerPart(self, layer.index, stack) if layer.places else None

    @abstractmethod
    def install_place(self, place: Place, layer: Any, hand: Hand) -> None:
        """Puts the adapter of one place there."""

    def enter(self, stack: StackPart, module: nn.Module, args: Any, kwargs: Any) -> Call:
        """What this forward of a stack depends on."""
        says = given(self)
        if not says.on:
            return Call(says)
        first = stack.number == 0
        kwargs = named(own_class(module), args, kwargs)
        tokens = Tokens.entering((), kwargs, says.domains, first=first, reader=self.reader)
        if self.dropped is not None:
            self.dropped.look(kwargs)
        if first and self.stack_starts:
            self.routings = Routings()
        shared = None if self.published else self.share(stack, module, kwargs)
        return Call(says, tokens, shared)

    def share(self, stack: StackPart, module: nn.Module, kwargs: dict[str, Any]) -> Any:
        """The products that the layers of a stack share in this forward."""
        return None

    def call_of(self, layer: LayerPart) -> Call:
        """The call that a layer's run belongs to: its stack's, or one of its own outside of it."""
        return running_call(self, layer.stack) or Call(given(self))

    def why_not_reentrant(self, call: Call) -> str:
        """Why a layer must not run without gradients to be run again; empty where it may."""
        return ""

    def why_not_merge(self) -> str:
        """Why nothing of the method can be merged; empty where something may be."""
        return ""

    # -- what it says -----------------------------------------------------------------------------

    def fold_rest(self, merged: Merged) -> dict[str, str]:
        """Folds what is no linear's update, once everything else is known to fold or not; returns
        what of it stays, and why."""
        return {}

    def kept(self) -> dict[str, str]:
        """What merging leaves as modules beside unfolded linears, and why."""
        return {}

    @abstractmethod
    def place_row(self, place: Place) -> Row:
        """The place's row of a report, without backend, with the parameters that are its own."""

    def trains(self, place: Place) -> nn.Module | None:
        """The adapter of a place, which several may share: it is counted once."""
        return None

    def why_called(self, base: nn.Module) -> str:
        """Why a base is called where its weight is not read; empty where it is read."""
        return why_not_plain(base)

    @abstractmethod
    def sample(
        self, place: Place, wrapper: Any, tokens: Rows
    ) -> tuple[Hashable, Callable[[], object]]:
        """A call of the place's adapter as a layer would make it, on values that do not matter, and
        a key that is equal where the call is."""

    def shared_rows(self) -> list[Row]:
        """The report's rows of what no single place owns."""
        return []

    def shared_sample(self, row: Row, tokens: Rows) -> Callable[[], object] | None:
        """A call of what such a row stands for, where it has one of its own."""
        return None

    def experts(self) -> Mapping[str, LowRankExperts]:
        """The experts by the path of their place."""
        return {}

    def typical(self, like: nn.Module, tokens: Rows, width: int | None = None) -> Tensor:
        """An input of a module, as training would give it: [*tokens, features]."""
        width = linear_features(like)[0] if width is None else width
        dtype, device = self.storage_of(like)
        return torch.empty(*tokens, width, dtype=dtype, device=device)

    def storage_of(self, like: nn.Module) -> tuple[torch.dtype, torch.device]:
        """Dtype and device of a module's input: the dtype of its parameters, of the model's where
        it has none that count."""
        parameters = itertools.chain(like.parameters(), self.found.root.parameters())
        dtype = next(p.dtype for p in parameters if p.is_floating_point())
        return dtype, device_of(like)

    def expert_row(self, path: str, role: str, module: LowRankExperts) -> Row:
        """The row of one mixture, without backend."""
        shape = f"{module.in_features} -> {module.out_features}, {module.experts} x r {module.r}"
        gate = f"{module.gate}, top {module.top_k}" if module.top_k else module.gate
        count = sum(p.numel() for p in module.parameters() if p.requires_grad)
        return Row(path, role, f"{shape}, {gate}", "", "", count)
