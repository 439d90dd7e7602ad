"""What runs inside an adapted layer: hooks that put an adapter after a block, wrappers on linears.

The vision features and what is known of the tokens are given to every layer as an argument of its
own call (`hf/stack.py`), and so are the value adapters' down-projections of the encoder's output,
which are one product for all decoder layers. Reentrant checkpointing runs a layer first without and
then with gradients and does not detach keyword arguments: a layer in its recompute therefore
projects the encoder's output itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from petal_kernels.hf.dropped_mask import DroppedMask
from petal_kernels.hf.experts import Routings
from petal_kernels.hf.tokens import Domains, Tokens, named
from petal_kernels.nn.frozen_linear import MERGED_TRAINING, FrozenLinear, compute_dtype
from petal_kernels.nn.gated_adapter import GatedAdapter
from petal_kernels.nn.published import published_adapter, published_lora, published_value
from petal_kernels.nn.routed_lora import RoutedLoRALinear, linear_features
from petal_kernels.nn.value_adapter import ValueAdapter
from petal_kernels.ops.expert_dispatch.routing import Routing


class InsertionAdapter(nn.Module):
    """Everything trainable, registered once on the model as `petal`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        self.value: ValueAdapter | None = None

    def add(self, layer: int, name: str, module: nn.Module) -> None:
        """Registers an adapter of one layer."""
        if str(layer) not in self.layers:
            self.layers[str(layer)] = nn.ModuleDict()
        places = self.layers[str(layer)]
        assert isinstance(places, nn.ModuleDict)
        places[name] = module

    def has(self, layer: int, name: str) -> bool:
        """Whether that adapter is there."""
        return str(layer) in self.layers and name in self.layers[str(layer)]  # type: ignore[operator]

    def place(self, layer: int, name: str) -> Any:
        """The adapter of one layer."""
        places = self.layers[str(layer)]
        assert isinstance(places, nn.ModuleDict)
        return places[name]


class State:
    """Shared by all slots of one attachment."""

    def __init__(
        self, adapter: InsertionAdapter, *, published: bool, reader: str | None = None
    ) -> None:
        self.adapter = adapter
        self.reader = reader  # what takes one choice per sample, if anything does
        self.dropped: DroppedMask | None = None  # where adapters stand in BLIP's cross-attention
        self.published = published
        self.enabled = True
        self.vision: Tensor | None = None  # inside `with attachment.vision(features):`
        self.domains: Domains | None = None  # inside `with attachment.domains(domain):`
        self.routings = Routings()
        self.layers: dict[str, list[nn.Module]] = {}
        self.factors: Context | None = None  # only while a stack's forward runs


class Context:
    """What one forward of a stack gives to its layers."""

    def __init__(self, vision: Tensor | None, tokens: Tokens) -> None:
        self.vision, self.tokens = vision, tokens
        self.source: Tensor | None = None  # the encoder's output, and its projections
        self.middles: tuple[Tensor, ...] = ()
        self.grad = torch.is_grad_enabled()
        self.reentrant: set[int] = set()


@dataclass
class Pending:
    """A block's output that its norm will adapt: the whole insertion in one operator call."""

    h: Tensor
    x: Tensor
    vision: Tensor | None
    mask: Tensor | None


class LayerSlot:
    """Where the parts of one layer meet; a plain object, so that it is copied with the model."""

    def __init__(self, state: State, index: int) -> None:
        self.state, self.index = state, index
        self.call: Context | None = None
        self.source: Tensor | None = None
        self.inputs: dict[str, Tensor] = {}
        self.pending: dict[str, Pending] = {}

    def begin(self, factors: Context | None) -> Context:
        """The context of this run: without shared graphs in a reentrant recompute."""
        if factors is None:  # the layer runs outside its stack
            return Context(self.state.vision, Tokens(domains=self.state.domains))
        if factors.grad and not torch.is_grad_enabled():
            if factors.vision is not None and factors.vision.requires_grad:
                raise RuntimeError(
                    "vision: features that require grad need checkpointing with "
                    "use_reentrant=False: the reentrant form would backward through them once per "
                    "layer"
                )
            factors.reentrant.add(self.index)
        elif self.index in factors.reentrant:
            return Context(factors.vision, factors.tokens)
        return factors

    def finish(self, call: Context, y: Any) -> Any:
        """The layer's output, as it is."""
        return y

    def vision(self, role: str) -> Tensor:
        """The features that a route reads; ValueError where there are none."""
        found = self.state.vision if self.call is None else self.call.vision
        if found is None:
            raise ValueError(
                f"vision: want features for the route of {role!r}, got none; run the model inside "
                "`with attachment.vision(features):`"
            )
        return found

    def tokens(self) -> Tokens:
        """What is known of the tokens of this run."""
        return Tokens(domains=self.state.domains) if self.call is None else self.call.tokens

    def record(self, path: str, routing: Routing) -> None:
        """Keeps how the experts at `path` were routed, unless this run is a recompute."""
        if self.call is not None and self.call is self.state.factors:
            self.state.routings[path] = routing


class Insert:
    """One adapter after one block."""

    def __init__(self, slot: LayerSlot, role: str, name: str, norm: nn.Module | None) -> None:
        self.slot, self.role, self.name, self.norm = slot, role, name, norm

    @property
    def adapter(self) -> GatedAdapter:
        """Found by name, so that a copied model finds its own."""
        adapter: GatedAdapter = self.slot.state.adapter.place(self.slot.index, self.name)
        return adapter

    def keep_input(self, x: Tensor) -> None:
        """Remembers X until the block's output comes."""
        gated = self.adapter.gate in ("large", "middleX", "small")
        if self.slot.state.enabled and (gated or self.norm is not None):
            self.slot.inputs[self.role] = x

    def run(self, h: Tensor) -> Tensor | None:
        """The adapted output of the block; None where it stays for now, or while disabled."""
        slot, state, adapter = self.slot, self.slot.state, self.adapter
        x = slot.inputs.pop(self.role, None)
        slot.pending.pop(self.role, None)  # of a forward that failed before the norm
        if not state.enabled:
            return None
        vision = None if adapter.route == "none" else slot.vision(self.role)
        mask = slot.tokens().counted(h, encoded=False) if adapter.gate == "small" else None
        if adapter.variant == "release":
            mask = None  # its mean is over the padding too
        if state.published:
            return published_adapter(adapter, h, x, vision=vision, mask=mask)
        projected = None if vision is None else adapter.project(vision)
        if x is not None and self._norm_can_adapt(h, x):
            slot.pending[self.role] = Pending(h, x, projected, mask)
            return None
        out: Tensor = adapter(h, x, vision=projected, mask=mask)
        return out

    def _norm_can_adapt(self, h: Tensor, x: Tensor) -> bool:
        """In one dtype only: under autocast the residual stream is wider than the output."""
        norm = self.norm
        if norm is None or self.slot.call is None or not (h.dtype == x.dtype == compute_dtype(h)):
            return False
        plain = type(norm) is nn.LayerNorm and not (norm._forward_hooks or norm._forward_pre_hooks)
        return plain and norm.weight is not None and norm.bias is not None and h.shape == x.shape


# The hooks are plain functions that find their insertion through the module they run on: a copied
# model then uses its own, not the original's.


def keep_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the module whose input the gate reads."""
    insert: Insert = module.__dict__["_petal_reads"]
    insert.keep_input(args[0] if args else kwargs["hidden_states"])


def adapt_output(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of the module whose output is adapted."""
    insert: Insert = module.__dict__["_petal_insert"]
    h: Tensor = output[0] if isinstance(output, tuple) else output
    adapted = insert.run(h)
    # The layer's dropout and residual + H would be thrown away by the norm. Of an empty tensor that
    # broadcasts they cost nothing; but other hooks on this module are to see H.
    if insert.role in insert.slot.pending and len(module._forward_hooks) == 1:
        adapted = h.new_empty((0,) + (1,) * h.dim())
    if adapted is None or not isinstance(output, tuple):
        return adapted
    return (adapted, *output[1:])


class AdaptedLinear(FrozenLinear):
    """A linear with an adapter that is registered at the model's root."""

    slot: LayerSlot

    def __init__(self, base: nn.Module, slot: LayerSlot, role: str) -> None:
        super().__init__(base)
        self.__dict__["slot"] = slot
        self.role = role
        self.merged = False

    @property
    def in_features(self) -> int:
        return linear_features(self.base)[0]

    @property
    def out_features(self) -> int:
        return linear_features(self.base)[1]


class PostNorm(FrozenLinear):
    """The norm after an adapted block: adapter, dropout, residual and norm in one call.

    Where the adapter was left to it, the norm does not look at what the layer gives it: X plus the
    dropout of what stood in H's place (`adapt_output`).
    """

    insert: Insert
    layer: nn.Module

    def __init__(self, base: nn.Module, insert: Insert, layer: nn.Module) -> None:
        super().__init__(base)
        self.__dict__["insert"] = insert
        self.__dict__["layer"] = layer

    def forward(self, x: Tensor) -> Tensor:
        pending = self.insert.slot.pending.pop(self.insert.role, None)
        if pending is None:
            return super().forward(x)
        assert isinstance(self.base, nn.LayerNorm)
        out: Tensor = self.insert.adapter(
            pending.h,
            pending.x,
            vision=pending.vision,
            mask=pending.mask,
            dropout=float(self.layer.dropout),  # type: ignore[arg-type]
            residual=pending.x,
            norm=self.base,
            training=self.layer.training,
        )
        return out

    def extra_repr(self) -> str:
        return f"base={type(self.base).__name__}"


class ValueLinear(AdaptedLinear):
    """The values' projection of a cross-attention, with VL-PET's value adapter of its layer."""

    def __init__(self, base: nn.Module, slot: LayerSlot, role: str, number: int) -> None:
        super().__init__(base, slot, role)
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        state, values = self.slot.state, super().forward(x)
        if not state.enabled:
            return values
        adapter = state.adapter.value
        assert adapter is not None
        if state.published:
            return published_value(adapter, values, x, self.number)
        out: Tensor = adapter(values, self._middle(adapter, x), self.number)
        return out

    def _middle(self, adapter: ValueAdapter, x: Tensor) -> Tensor:
        call = self.slot.call
        if call is not None and call.middles and (x is call.source or x is self.slot.source):
            return call.middles[self.number]
        return adapter.project(x, self.number)[0]


class RoutedLinear(AdaptedLinear):
    """A linear with a routed low-rank update."""

    def __init__(self, base: nn.Module, slot: LayerSlot, role: str, name: str) -> None:
        super().__init__(base, slot, role)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        state = self.slot.state
        if self.merged and self.training:
            raise RuntimeError(MERGED_TRAINING)
        if self.merged or not state.enabled:
            return super().forward(x)
        lora: RoutedLoRALinear = state.adapter.place(self.slot.index, self.name)
        vision = None if lora.route == "none" else self.slot.vision(self.role)
        if state.published:
            return published_lora(lora, super().forward(x), x, vision)
        return lora.adapted(self.base, x, None if vision is None else lora.project(vision))


def enter_stack(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a stack: what its layers share in this forward."""
    state: State = module.__dict__["_petal_state"]
    if not state.enabled:
        return
    first: bool = module.__dict__["_petal_first"]  # of the stacks that a forward runs
    kwargs = named(module, args, kwargs)
    tokens = Tokens.entering((), kwargs, state.domains, first=first, reader=state.reader)
    if state.dropped is not None:
        state.dropped.look(kwargs)
    state.factors = Context(state.vision, tokens)
    if first:
        state.routings.clear()
    encoded = kwargs.get("encoder_hidden_states")
    if encoded is not None and state.adapter.value is not None and not state.published:
        state.factors.source = encoded
        state.factors.middles = state.adapter.value.project(encoded)


def leave_stack(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of a stack, run after a failure too."""
    state: State = module.__dict__["_petal_state"]
    state.factors = None
