"""Mode approximation in the layers of a stack, as PETAL and Aurora's text have it.

Once per forward of the stack `Factors` is made: P_k of all its modes, and U x_img of the features
that every cross-attention reads. Projections that read one input are a group: the first one called
computes them all in one operator call, the others find theirs in the layer's frame. A recompute
that must not touch the shared graph contracts its own modes from the parameters.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petal_kernels._runtime.dry_run import signature
from petal_kernels.hf.context import Call, Frame, Given
from petal_kernels.hf.found import Layer, Place
from petal_kernels.hf.method import Hand, Method
from petal_kernels.hf.parts import LayerPart, Part, Run
from petal_kernels.hf.report import SHARED_FACTORS, Row, Rows
from petal_kernels.hf.twins import base_twin, twin_of
from petal_kernels.hf.wrappers import LayerLinear
from petal_kernels.nn.frozen_linear import compute_dtype, frozen_lowrank, weight_is_plain
from petal_kernels.nn.mode_approximation import ModeApproximation
from petal_kernels.nn.published import published_mode, published_residual
from petal_kernels.nn.residual import ScaleShift

AFTER_NORM = "added after the block's LayerNorm"


class ModesAdapter(nn.Module):
    """Everything trainable: shared factors by branch, the layers' scale/shift pairs, experts."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleDict()
        self.layers = nn.ModuleDict()
        self.experts: Any = None

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


class Factors:
    """The products of one forward that do not depend on the tokens, and U_img x_img."""

    def __init__(self) -> None:
        self.ups: dict[str, tuple[Tensor, ...]] = {}  # by branch
        self.first: dict[str, int] = {}  # the mode of their first one
        self.hidden: Tensor | None = None
        self.source: Tensor | None = None
        self.version = 0

    def project(self, image: Tensor, down: Tensor) -> None:
        """Keeps U image for all who read it."""
        self.source, self.version = image, version_of(image)
        self.hidden = shrink(image, down)

    def hidden_of(self, x: Tensor, again: Tensor | None) -> Tensor | None:
        """The projection of x where x is the source, or what a recompute is given for it."""
        if x is self.source:
            return self.hidden if self.version == version_of(x) else None
        return self.hidden if x is again else None


class ModesFrame(Frame):
    """One run of a layer: its blocks' outputs, results that wait to be fetched."""

    def __init__(self, *bound: Any) -> None:
        super().__init__(*bound)
        self.a: Tensor | None = None
        self.c: Tensor | None = None
        self.waiting: dict[str, Waiting] = {}
        self.projected: dict[str, Projected] = {}
        self.local: dict[str, tuple[Tensor, ...]] = {}


class ModesLayer(LayerPart):
    """A layer with modes, and the residuals that its output gains."""

    method: ModesMethod

    def __init__(self, method: ModesMethod, index: int, stack: int) -> None:
        super().__init__(method, index, stack, ModesFrame)
        self.groups: dict[str, ModeGroup] = {}
        self.modes: dict[str, slice] = {}  # of this layer, by branch
        self.pairs: tuple[str, ...] = ()  # the blocks whose outputs are added
        self.captures = True  # whether anything reads the blocks' outputs

    def ups(self, frame: ModesFrame | None, branch: str, dtype: torch.dtype) -> Sequence[Tensor]:
        """P_k of this layer's modes of `branch`, from the shared factors or contracted here."""
        modes = self.modes[branch]
        shared = None if frame is None else frame.shared
        if isinstance(shared, Factors):
            first = shared.first[branch]
            return shared.ups[branch][modes.start - first : modes.stop - first]
        local = {} if frame is None else frame.local
        if branch not in local:
            local[branch] = self.method.factors(branch).contract(modes, dtype=dtype)
        return local[branch]

    def install(self, layer: Layer, hand: Hand) -> None:
        """Lets the layer see what its attention blocks give."""
        for name, child in (("a", layer.row.self_block), ("c", layer.row.cross_block)):
            block = getattr(layer.module, child, None) if self.captures else None
            if isinstance(block, nn.Module):
                hand.take(block, Capture(self, name))

    def finish(self, frame: ModesFrame, output: Any) -> Any:
        if not self.pairs or not frame.call.given.on:
            return output
        return self.method.residuals(self, frame, output)

    def add(self, y: Tensor, a: Tensor, block: str) -> Tensor:
        """y + 0.1 (a * s + t)."""
        pair = self.method.adapter.pair(self.index, block)
        if self.method.published:
            return published_residual(y, a, pair)
        out: Tensor = pair(y, a)
        return out


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


class ModeGroup:
    """Projections of one layer that read one input: the first one called computes them all."""

    def __init__(self, layer: ModesLayer, name: str, branch: str) -> None:
        self.layer, self.name, self.branch = layer, name, branch
        self.factors = layer.method.factors(branch)
        self.members: list[ModeLinear] = []

    def run(self, position: int, x: Tensor) -> Tensor:
        member = self.members[position]
        frame: ModesFrame | None = self.layer.running()
        if frame is None:  # called outside its layer: nobody would fetch the others
            return self._compute(None, x, [member])[0]
        if len(self.members) == 1:
            return self._compute(frame, x, self.members)[0]
        if not all(weight_is_plain(each.base) for each in self.members):
            # A special base is called in its own turn: what gathers, dequantises or watches it may
            # hang on the wrapper that is running, not on this one's.
            return self._compute(frame, x, [member], self._projected(frame, x))[0]
        waiting: Waiting | None = frame.waiting.get(self.name)
        output: Tensor | None = None if waiting is None else waiting.take(position, x)
        if output is None:
            frame.waiting[self.name] = Waiting(x, self._compute(frame, x, self.members))
            output = frame.waiting[self.name].take(position, x)
            assert output is not None
        return output

    def run_twins(self, x: Tensor, twins: Sequence[ModeLinear]) -> object:
        """What a layer's run calls for its members, or for one whose turn it is, in whose place
        `twins` stand."""
        method, shared = self.layer.method, Factors()
        method.contract(shared, self.branch, self.layer.modes[self.branch], compute_dtype(x))
        if self.branch == "image":
            shared.project(x, self.factors.down)
        frame = ModesFrame(self.layer, Call(Given()), shared, None, None)
        alone = len(twins) < len(self.members)
        return self._compute(frame, x, twins, self._projected(frame, x) if alone else None)

    def _projected(self, frame: ModesFrame, x: Tensor) -> Tensor:
        hidden = self._shared_hidden(frame, x)
        if hidden is not None:
            return hidden
        known = frame.projected.get(self.name)
        if known is None or not known.matches(x):
            hidden = shrink(x, self.factors.down)
            known = frame.projected[self.name] = Projected(x, hidden)
        return known.hidden

    def _shared_hidden(self, frame: ModesFrame | None, x: Tensor) -> Tensor | None:
        if frame is None or self.branch != "image" or not isinstance(frame.shared, Factors):
            return None
        return frame.shared.hidden_of(x, frame.source)

    def _compute(
        self,
        frame: ModesFrame | None,
        x: Tensor,
        members: Sequence[ModeLinear],
        hidden: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        factors = self.factors
        ups = self.layer.ups(frame, self.branch, compute_dtype(x))
        first = self.layer.modes[self.branch].start
        return frozen_lowrank(
            x,
            [member.base for member in members],
            factors.down,
            [ups[member.mode - first] for member in members],
            hidden=self._shared_hidden(frame, x) if hidden is None else hidden,
            dropout=factors.dropout,
            training=members[0].training,
        )


class ModeLinear(LayerLinear):
    """A projection with its mode, served by its group."""

    layer: ModesLayer

    def __init__(self, base: nn.Module, group: ModeGroup, mode: int) -> None:
        super().__init__(base, group.layer)
        self.mode = mode
        self.__dict__["group"] = group
        self.position = len(group.members)
        group.members.append(self)

    def adapted(self, x: Tensor) -> Tensor:
        group: ModeGroup = self.__dict__["group"]
        if not self.method.published:
            out: Tensor = group.run(self.position, x)
            return out
        y: Tensor = self.base(x)
        return y + published_mode(group.factors, self.mode, x, self.drop)

    def drop(self, z: Tensor) -> Tensor:
        """The published form's dropout."""
        p = self.used().dropout
        return F.dropout(z, float(p), self.training)  # type: ignore[arg-type]

    def unit(self) -> object:
        return self if self.method.published else self.__dict__["group"]

    def used(self) -> nn.Module:
        return self.__dict__["group"].factors  # type: ignore[no-any-return]

    def delta(self, dtype: torch.dtype) -> Tensor:
        """s V M^T U."""
        factors: ModeApproximation = self.__dict__["group"].factors
        (up,) = factors.contract([self.mode], dtype=dtype)
        return up @ factors.down.to(dtype)


class Capture(Part):
    """An attention block whose output, as others' hooks leave it, its layer adds to its own."""

    def __init__(self, layer: ModesLayer, name: str) -> None:
        self.layer, self.name = layer, name

    def call(self, module: nn.Module, run: Run, args: Any, kwargs: Any) -> Any:
        output, frame = run(*args, **kwargs), self.layer.running()
        if frame is None or not frame.call.given.on:
            return output
        if self.name == "c":
            output = self.layer.method.add_context(frame, output)
        setattr(frame, self.name, output[0] if isinstance(output, tuple) else output)
        return output


class ModesMethod(Method):
    """What PETAL and Aurora have in common."""

    adapter: ModesAdapter
    modes: dict[str, range]  # of each place, by path

    @abstractmethod
    def factors(self, branch: str) -> ModeApproximation:
        """The shared factors of a branch."""

    @abstractmethod
    def residuals(self, layer: ModesLayer, frame: ModesFrame, output: Any) -> Any:
        """A layer's output with what it gains from its blocks."""

    def add_context(self, frame: ModesFrame, output: Any) -> Any:
        """The output of a cross-attention block, with what else it gains."""
        return output

    def install_place(self, place: Place, layer: ModesLayer, hand: Hand) -> None:
        row = place.row
        branch = "image" if row.encoded else "text"  # type: ignore[union-attr]
        name = group_of(row)
        modes, known = self.modes[place.path], layer.modes.get(branch)
        layer.modes[branch] = slice(known.start if known else modes.start, modes.stop)
        if name not in layer.groups:
            layer.groups[name] = ModeGroup(layer, name, branch)
        hand.wrap(place, ModeLinear(place.module, layer.groups[name], modes.start))

    def contract(self, shared: Factors, branch: str, modes: slice | None, dtype: Any) -> None:
        """P_k of those modes, for all layers of a forward."""
        shared.first[branch] = modes.start if modes is not None else 0
        shared.ups[branch] = self.factors(branch).contract(modes, dtype=dtype)

    def sample(self, place: Place, wrapper: Any, tokens: Rows) -> tuple[Any, Any]:
        group: ModeGroup = wrapper.__dict__["group"]
        together = all(weight_is_plain(member.base) for member in group.members)
        members = group.members if together else [wrapper]
        twins = [twin_of(m, base=base_twin(m.base)) for m in members]
        factors = group.factors
        key = signature(
            group.branch, len(group.members), [t.base for t in twins], factors, wrapper.training
        )
        return key, lambda: group.run_twins(self.typical(wrapper.base, tokens), twins)

    def shared_rows(self) -> list[Row]:
        rows = []
        for name in self.adapter.branches:
            factors = self.adapter.branch(name)
            parts = (factors.down, factors.up, factors.core)
            count = sum(p.numel() for p in parts if p.requires_grad)
            shape = ", ".join("x".join(map(str, p.shape)) for p in parts)
            role = f"{SHARED_FACTORS} ({factors.core_kind})"
            rows.append(Row(f"petal.branches.{name}", role, shape, "", "", count))
        for index, pairs in self.adapter.layers.items():
            count = sum(p.numel() for p in pairs.parameters() if p.requires_grad)
            names = ", ".join(name for name, _ in pairs.named_children())
            shape = f"2 x {next(pairs.parameters()).numel()} ({names})"
            rows.append(Row(f"petal.layers.{index}", "scale/shift", shape, "", "", count))
        return rows


def group_of(row: Any) -> str:
    """Projections of one group read one input and share one operator call."""
    if row.attention == "self":
        return "self"
    return "cross.key_value" if row.encoded else "cross.query"


def shrink(x: Tensor, down: Tensor) -> Tensor:
    """x down^T in the compute dtype."""
    dtype = compute_dtype(x)
    down = down.to(device=x.device, dtype=dtype)
    if x.dtype == dtype:
        return F.linear(x, down)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), down)


def version_of(x: Tensor) -> int:
    """Grows when x is written in place."""
    # A compiled graph is functional; inference tensors keep no version.
    if torch.compiler.is_compiling() or x.is_inference():
        return 0
    return x._version
