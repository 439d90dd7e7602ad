"""What runs inside an adapted stack: the factors of one forward, and the layers that receive them.

Once per forward of the stack, before the first layer and therefore outside every checkpointed
region, `Factors` is built: P_k of all modes and U_img x_img of the image branch. Each layer gets it
as a keyword argument, bound into the checkpointed call, so that a recompute in the backward sees
the factors of its own forward, whatever has run since. While the layer's forward runs, its
projections find them in the layer's slot.

Reentrant checkpointing runs a layer first without and then with gradients and does not detach
keyword arguments: a graph shared by the layers would be backwarded once per layer. A layer that
runs without gradients while its factors carry a graph is therefore recomputed from the parameters:
it contracts its own modes and projects its own image features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from petal_kernels.hf.experts import Routings
from petal_kernels.hf.stack import shrink, version_of
from petal_kernels.hf.tokens import Tokens
from petal_kernels.nn.experts import InstructionExperts
from petal_kernels.nn.frozen_linear import (
    MERGED_TRAINING,
    FrozenLinear,
    compute_dtype,
    frozen_lowrank,
    weight_is_plain,
)
from petal_kernels.nn.mode_approximation import ModeApproximation
from petal_kernels.nn.published import published_context, published_residual
from petal_kernels.nn.residual import ScaleShift, batch_context


class PetalAdapter(nn.Module):
    """Everything trainable, registered once on the model as `petal`."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleDict()
        self.layers = nn.ModuleDict()
        self.experts: InstructionExperts | None = None

    def branch(self, name: str) -> ModeApproximation:
        module = self.branches[name]
        assert isinstance(module, ModeApproximation)
        return module

    def pair(self, layer: int, block: str) -> ScaleShift:
        pairs = self.layers[str(layer)]
        assert isinstance(pairs, nn.ModuleDict)
        module = pairs[block]
        assert isinstance(module, ScaleShift)
        return module


class State:
    """Shared by all slots of one attachment."""

    def __init__(self, adapter: PetalAdapter, *, published: bool, context: bool) -> None:
        self.adapter = adapter
        self.published = published
        self.context = context
        self.enabled = True
        self.merged = False
        self.layers: list[nn.Module] = []
        self.factors: Factors | None = None  # only while the stack's forward runs
        self.embeddings = ""  # the path of what the experts serve
        self.tokens = Tokens()  # of the embeddings' owner, while it runs
        self.reader: str | None = None  # what of the experts takes one choice per sample
        self.routings = Routings()


class Factors:
    """The products of one forward that do not depend on the tokens, and U_img x_img."""

    def __init__(self, adapter: PetalAdapter, dtype: torch.dtype, image: Tensor | None) -> None:
        self.grad = torch.is_grad_enabled()
        self.reentrant: set[int] = set()
        self.ups = {name: adapter.branch(name).contract(dtype=dtype) for name in adapter.branches}
        self.hidden: Tensor | None = None
        self.source: Tensor | None = None
        self.version = 0
        if image is not None and "image" in adapter.branches:
            self.source, self.version = image, version_of(image)
            self.hidden = shrink(image, adapter.branch("image").down)

    def hidden_of(self, x: Tensor, again: Tensor | None) -> Tensor | None:
        """The projection of x where x is the source, or what a recompute is given for it."""
        if x is self.source:
            return self.hidden if self.version == version_of(x) else None
        return self.hidden if x is again else None


class LayerCall:
    """One run of one layer: its factors, its blocks' outputs, results waiting to be fetched."""

    def __init__(self, factors: Factors | None) -> None:
        self.factors = factors
        self.a: Tensor | None = None
        self.c: Tensor | None = None
        self.waiting: dict[str, Waiting] = {}
        self.projected: dict[str, Projected] = {}
        self.local: dict[str, tuple[Tensor, ...]] = {}


class Seen:
    """Marks results as those of one input: the very tensor, unchanged, in the same grad mode."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.version, self.grad = x, version_of(x), torch.is_grad_enabled()

    def matches(self, x: Tensor) -> bool:
        same = x is self.x and self.version == version_of(x)
        return same and self.grad == torch.is_grad_enabled()


class Waiting(Seen):
    """Outputs of a group computed for its first member; each is handed out once."""

    def __init__(self, x: Tensor, outputs: tuple[Tensor, ...]) -> None:
        super().__init__(x)
        self.outputs: list[Tensor | None] = list(outputs)

    def take(self, position: int, x: Tensor) -> Tensor | None:
        if not self.matches(x):
            return None
        output, self.outputs[position] = self.outputs[position], None
        return output


class Projected(Seen):
    """x U^T of a group whose members are computed one at a time."""

    def __init__(self, x: Tensor, hidden: Tensor) -> None:
        super().__init__(x)
        self.hidden = hidden


class LayerSlot:
    """Where the parts of one layer meet; a plain object, so that it is copied with the model."""

    def __init__(self, state: State, index: int, modes: dict[str, slice]) -> None:
        self.state, self.index, self.modes = state, index, modes
        self.self_pair = False
        self.cross_pair = False
        self.call: LayerCall | None = None
        self.source: Tensor | None = None

    def begin(self, factors: Factors | None) -> LayerCall:
        if factors is not None:
            if factors.grad and not torch.is_grad_enabled():
                factors.reentrant.add(self.index)
            elif self.index in factors.reentrant:
                factors = None
        return LayerCall(factors)

    def ups(self, call: LayerCall, branch: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """P_k of this layer's modes of `branch`, from the shared factors or contracted here."""
        modes = self.modes[branch]
        if call.factors is not None:
            return call.factors.ups[branch][modes]
        if branch not in call.local:
            factors = self.state.adapter.branch(branch)
            call.local[branch] = factors.contract(modes, dtype=dtype)
        return call.local[branch]

    def finish(self, call: LayerCall, y: Tensor) -> Tensor:
        if not self.state.enabled:
            return y
        adapter = self.state.adapter
        add = published_residual if self.state.published else fused_residual
        if self.self_pair and call.a is not None:
            y = add(y, call.a, adapter.pair(self.index, "self"))
        if self.cross_pair and call.c is not None:
            pair, queries = adapter.pair(self.index, "cross"), call.c.shape[1]
            if queries == y.shape[1]:
                return add(y, call.c, pair)
            y = torch.cat([add(y[:, :queries], call.c, pair), y[:, queries:]], dim=1)
        return y


def fused_residual(y: Tensor, a: Tensor, pair: ScaleShift) -> Tensor:
    """y + 0.1 (a * s + t)."""
    out: Tensor = pair(y, a)
    return out


class ModeGroup:
    """Projections of one layer that read one input: the first one called computes them all."""

    def __init__(self, slot: LayerSlot, name: str, branch: str) -> None:
        self.slot, self.name, self.branch = slot, name, branch
        self.members: list[ModeLinear] = []
        self.merged = False

    def run(self, position: int, x: Tensor) -> Tensor:
        member, state = self.members[position], self.slot.state
        if not state.enabled:
            return FrozenLinear.forward(member, x)
        if self.merged:
            if member.training:
                raise RuntimeError(MERGED_TRAINING)
            return FrozenLinear.forward(member, x)
        call = self.slot.call
        if call is None:  # called outside its layer: nobody would fetch the others
            return self._compute(LayerCall(None), x, [member])[0]
        if len(self.members) == 1:
            return self._compute(call, x, self.members)[0]
        if not all(weight_is_plain(each.base) for each in self.members):
            # A special base is called in its own turn: what gathers, dequantises or watches it may
            # hang on the wrapper that is running, not on this one's.
            return self._compute(call, x, [member], self._projected(call, x))[0]
        waiting = call.waiting.get(self.name)
        output = waiting.take(position, x) if waiting is not None else None
        if output is None:
            call.waiting[self.name] = Waiting(x, self._compute(call, x, self.members))
            output = call.waiting[self.name].take(position, x)
            assert output is not None
        return output

    def _projected(self, call: LayerCall, x: Tensor) -> Tensor:
        hidden = self._shared_hidden(call, x)
        if hidden is not None:
            return hidden
        known = call.projected.get(self.name)
        if known is None or not known.matches(x):
            down = self.slot.state.adapter.branch(self.branch).down
            known = call.projected[self.name] = Projected(x, shrink(x, down))
        return known.hidden

    def _shared_hidden(self, call: LayerCall, x: Tensor) -> Tensor | None:
        if call.factors is None or self.branch != "image":
            return None
        return call.factors.hidden_of(x, self.slot.source)

    def _compute(
        self,
        call: LayerCall,
        x: Tensor,
        members: list[ModeLinear],
        hidden: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        factors = self.slot.state.adapter.branch(self.branch)
        ups = self.slot.ups(call, self.branch, compute_dtype(x))
        first = self.slot.modes[self.branch].start
        return frozen_lowrank(
            x,
            [member.base for member in members],
            factors.down,
            [ups[member.mode - first] for member in members],
            hidden=self._shared_hidden(call, x) if hidden is None else hidden,
            dropout=factors.dropout,
            training=members[0].training,
        )


class ModeLinear(FrozenLinear):
    """A projection with its mode, served by its group."""

    def __init__(self, base: nn.Module, group: ModeGroup, mode: int) -> None:
        super().__init__(base)
        self.mode = mode
        self.group = group
        self.position = len(group.members)
        group.members.append(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.group.run(self.position, x)


# The hooks are plain functions that find their slot through the module they run on: a copied model
# then uses its own slot, not the original's.


def capture_self(module: nn.Module, args: Any, output: Tensor) -> None:
    """Forward hook of the self-attention block: keeps its output for the residual."""
    slot: LayerSlot = module.__dict__["_petal_slot"]
    if slot.call is not None:
        slot.call.a = output


def capture_cross(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    """Forward hook of the cross-attention block: adds the context, keeps the result."""
    slot: LayerSlot = module.__dict__["_petal_slot"]
    call, state = slot.call, slot.state
    if call is None or not state.enabled:
        return None
    if state.context and call.a is not None:
        add = published_context if state.published else batch_context
        output = add(output, call.a)
    call.c = output
    return output


def enter_stack(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the stack: builds the factors of this forward."""
    state: State = module.__dict__["_petal_state"]
    if not state.enabled:
        return
    hidden = args[0] if args else kwargs["hidden_states"]
    if not (state.published or state.merged):
        image = args[2] if len(args) > 2 else kwargs.get("encoder_hidden_states")
        state.factors = Factors(state.adapter, compute_dtype(hidden), image)


def leave_stack(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of the stack, run after a failure too: the factors end with their forward."""
    state: State = module.__dict__["_petal_state"]
    state.factors = None
