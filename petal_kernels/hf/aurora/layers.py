"""What runs inside Aurora's stacks: the products of one forward, and the layers that receive them.

Once per forward of a stack, before its first layer, the products that its layers share are made:
of the image encoder every projection's (`blocks.py`), of a text stack P_k of all modes and U x_img
of the features that every cross-attention reads. They reach the layers as an argument of their own
call; a layer that reentrant checkpointing recomputes contracts its own modes (`hf/stack.py`,
`hf/petal/layers.py`, whose groups of projections serve the text here).

A text layer that ran its cross-attention, that is with image features, ends with

    y + 0.1 (a * s + t) + 0.1 (c * s' + t'),   a, c: outputs of its self and cross attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petal_kernels.hf.aurora.blocks import Blocks, contract_blocks, masked_blocks
from petal_kernels.hf.dropped_mask import DroppedMask
from petal_kernels.hf.petal.layers import (
    Factors,
    LayerCall,
    LayerSlot,
    PetalAdapter,
    State,
    fused_residual,
)
from petal_kernels.hf.stack import shrink, version_of
from petal_kernels.nn.frozen_linear import (
    MERGED_TRAINING,
    FrozenLinear,
    compute_dtype,
    frozen_lowrank,
)
from petal_kernels.nn.mode_approximation import ModeApproximation
from petal_kernels.nn.published import published_residual
from petal_kernels.nn.residual import CONTEXT_SCALE

SHARED = "shared"


class AuroraAdapter(PetalAdapter):
    """Everything trainable: one set of factors whatever the branch, and the text layers' pairs."""

    def __init__(self, shared: ModeApproximation) -> None:
        super().__init__()
        self.branches[SHARED] = shared

    @property
    def shared(self) -> ModeApproximation:
        return super().branch(SHARED)

    def branch(self, name: str) -> ModeApproximation:
        return self.shared


class StackState(State):
    """Shared by all slots of one stack."""

    adapter: AuroraAdapter

    def __init__(
        self,
        adapter: AuroraAdapter,
        *,
        published: bool,
        modes: slice,
        blocks: Sequence[Blocks] = (),
        reads_image: bool = False,
        dropped: DroppedMask | None = None,
    ) -> None:
        super().__init__(adapter, published=published, context=False)
        self.modes, self.blocks, self.reads_image = modes, blocks, reads_image
        self.dropped = dropped


class StackFactors(Factors):
    """What one forward of a stack shares; `grad` and `reentrant` serve the layers' slots."""

    def __init__(self) -> None:
        self.grad = torch.is_grad_enabled()
        self.reentrant = set()
        self.ups = {}
        self.hidden = self.source = None
        self.version = 0


class VisionFactors(StackFactors):
    """The products of all projections of the image encoder."""

    def __init__(self, state: StackState, masked: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.masked = masked
        shared = state.adapter.shared
        self.products = contract_blocks(shared, state.blocks, masked=masked, dtype=dtype)


class TextFactors(StackFactors):
    """P_k of all modes of a text stack, from mode `first` on, and U x_img."""

    def __init__(self, state: StackState, dtype: torch.dtype, image: Tensor | None) -> None:
        super().__init__()
        shared = state.adapter.shared
        self.first = state.modes.start
        self.every = shared.contract(state.modes, dtype=dtype)
        if image is not None and state.reads_image:
            self.source, self.version = image, version_of(image)
            self.hidden = shrink(image, shared.down)


class TextSlot(LayerSlot):
    """Where the parts of one text layer meet."""

    pairs = False

    def ups(self, call: LayerCall, branch: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        factors, modes = call.factors, self.modes[branch]
        if isinstance(factors, TextFactors):
            return factors.every[modes.start - factors.first : modes.stop - factors.first]
        return super().ups(call, branch, dtype)

    def finish(self, call: LayerCall, y: Tensor) -> Tensor:
        if not (self.pairs and self.state.enabled) or call.a is None or call.c is None:
            return y
        add = published_residual if self.state.published else fused_residual
        y = add(y, call.a, self.state.adapter.pair(self.index, "self"))
        return add(y, call.c, self.state.adapter.pair(self.index, "cross"))


class VisionSlot(LayerSlot):
    """Where the parts of one layer of the image encoder meet."""

    def product(self, blocks: Blocks, masked: bool, dtype: torch.dtype) -> Tensor:
        """Of one projection, from what the forward shares or contracted here."""
        factors = None if self.call is None else self.call.factors
        if isinstance(factors, VisionFactors) and factors.masked == masked:
            return factors.products[blocks.key]
        shared = self.state.adapter.branch(SHARED)
        return contract_blocks(shared, [blocks], masked=masked, dtype=dtype)[blocks.key]

    def finish(self, call: LayerCall, y: Tensor) -> Tensor:
        return y


class BlockLinear(FrozenLinear):
    """A projection of the image encoder with its modes."""

    def __init__(self, base: nn.Module, slot: VisionSlot, blocks: Blocks) -> None:
        super().__init__(base)
        self.slot, self.blocks = slot, blocks
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        state = self.slot.state
        if self.merged and self.training and state.enabled:
            raise RuntimeError(MERGED_TRAINING)
        if self.merged or not state.enabled:
            return super().forward(x)
        shared = state.adapter.branch(SHARED)
        inputs = self.blocks.form == "inputs"
        masked = is_masked(shared, self.training)
        product = self.slot.product(self.blocks, masked, compute_dtype(x))
        if masked and not inputs:
            return masked_blocks(x, self.base, shared, product, self.training)
        down, up = (product, shared.up) if inputs else (shared.down, product)
        dropout, bases = shared.dropout, [self.base]
        return frozen_lowrank(x, bases, down, [up], dropout=dropout, training=self.training)[0]


def is_masked(shared: ModeApproximation, training: bool) -> bool:
    """Whether dropout stands between the core and V."""
    return training and shared.dropout > 0


# The hooks are plain functions that find their slot through the module they run on: a copied model
# then uses its own slot, not the original's.


def capture_self(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of the self-attention block: keeps its output for the residual."""
    _keep(module, "a", output)


def capture_cross(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of the cross-attention block."""
    _keep(module, "c", output)


def _keep(module: nn.Module, name: str, output: Any) -> None:
    slot: TextSlot = module.__dict__["_petal_slot"]
    if slot.call is not None:
        setattr(slot.call, name, output[0] if isinstance(output, tuple) else output)


def enter_vision(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the image encoder: its products of this forward."""
    state: StackState = module.__dict__["_petal_state"]
    if _shares(state):
        hidden = args[0] if args else kwargs["inputs_embeds"]
        masked = is_masked(state.adapter.shared, module.training)
        state.factors = VisionFactors(state, masked, compute_dtype(hidden))


def enter_text(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a text stack: its products of this forward."""
    state: StackState = module.__dict__["_petal_state"]
    if state.enabled and state.dropped is not None:
        state.dropped.look(kwargs)
    if not _shares(state):
        return
    hidden = args[0] if args else kwargs["hidden_states"]
    image, cache = kwargs.get("encoder_hidden_states"), kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        image = None  # its keys and values are in the cache
    state.factors = TextFactors(state, compute_dtype(hidden), image)


def _shares(state: StackState) -> bool:
    return state.enabled and not (state.published or state.merged)


class Context:
    """The text-only features whose mean the matching head's input gains, where they are given."""

    def __init__(self) -> None:
        self.features: Tensor | None = None
        self.enabled = True


def add_context(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Forward pre-hook of the matching head: x + 0.1 mean_b features[b, 0]."""
    context: Context = module.__dict__["_petal_context"]
    if context.features is None or not context.enabled:
        return None
    first = context.features[:, 0] if context.features.dim() == 3 else context.features
    added = CONTEXT_SCALE * first.mean(dim=0)
    return (args[0] + added.to(args[0]), *args[1:])
