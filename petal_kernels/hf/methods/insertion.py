"""Adapters that stand after a layer's blocks: what the methods that insert them have in common.

After a post-LN block the adapter is left to the norm that follows: adapter, dropout, residual and
norm are one operator call, and the layer's own dropout and sum run on an empty tensor.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from petal_kernels._runtime.dry_run import signature
from petal_kernels.hf.context import Call, Frame
from petal_kernels.hf.found import Layer, Place
from petal_kernels.hf.method import Hand, Method
from petal_kernels.hf.methods.embeddings import guard_embeddings
from petal_kernels.hf.models import Block, Stack
from petal_kernels.hf.parts import LayerPart, Part, Run, own_class
from petal_kernels.hf.report import Row, Rows
from petal_kernels.hf.twins import twin_of
from petal_kernels.hf.walk import device_of, is_norm
from petal_kernels.hf.whole import CopyPart
from petal_kernels.nn.frozen_linear import compute_dtype
from petal_kernels.nn.gated_adapter import GatedAdapter
from petal_kernels.nn.kronecker import PHMRule
from petal_kernels.nn.published import published_adapter
from petal_kernels.nn.value_adapter import ValueAdapter

AN_ACTIVATION = "an activation stands between its projections"


class InsertionAdapter(nn.Module):
    """Everything trainable, by layer and place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        self.value: ValueAdapter | None = None
        self.rule: PHMRule | None = None  # one that several places' adapters read

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


class InsertionMethod(Method):
    """A method with a module for every place."""

    adapter: InsertionAdapter

    def build(self) -> InsertionAdapter:
        self.features = self.found.width()
        adapter = InsertionAdapter()
        for place in self.found.places:
            name = self.name_of(place)
            if not adapter.has(place.layer.index, name):
                module = self.module_of(place)
                if module is not None:
                    adapter.add(place.layer.index, name, module)
        return adapter

    def name_of(self, place: Place) -> str:
        """The name of a place's adapter in its layer; places of one name share it."""
        if isinstance(place.row, Block):
            return place.role.rpartition(".")[2]
        return place.role.replace(".", "_")

    @abstractmethod
    def module_of(self, place: Place) -> nn.Module | None:
        """The adapter of a place; None where it has none of its own."""

    def storage(self, place: Place) -> dict[str, Any]:
        """Where and in what dtype the adapter of a place is kept."""
        return {"device": device_of(place.layer.module), "dtype": self.config.dtype}

    def trains(self, place: Place) -> nn.Module | None:
        name = self.name_of(place)
        if not self.adapter.has(place.layer.index, name):
            return None
        module: nn.Module = self.adapter.place(place.layer.index, name)
        return module

    def norms(self, only: str | None = None) -> dict[str, nn.Module]:
        """Every norm of the adapted stacks (of the encoder's only), by path."""
        return {
            path: module
            for stack in self.found.stacks
            if only in (None, stack.row.name)
            for path, module in stack.module.named_modules(prefix=stack.path)
            if is_norm(module)
        }

    def install(self, hand: Hand) -> None:
        super().install(hand)
        guard_embeddings(self.found.root, hand)

    def kept(self) -> dict[str, str]:
        return {place.path: AN_ACTIVATION for place in self.found.at(Block)}

    def place_row(self, place: Place) -> Row:
        module = self.trains(place)
        count = 0
        if module is not None:
            count = sum(p.numel() for p in module.parameters() if p.requires_grad)
        return Row(place.path, place.role, self.shape_of(module), "", "", count)

    def shape_of(self, module: Any) -> str:
        """A place's adapter in words."""
        parts = [f"{module.features}, r {module.r}"]
        parts += [f"gate {module.gate}"] if module.gate != "none" else []
        parts += [f"route {module.route}"] if module.route != "none" else []
        return ", ".join(parts)


class InsertFrame(Frame):
    """One run of a layer: its blocks' inputs, and outputs that a norm will adapt."""

    def __init__(self, *bound: Any) -> None:
        super().__init__(*bound)
        self.inputs: dict[str, Tensor] = {}
        self.pending: dict[str, Pending] = {}


@dataclass
class Pending:
    """A block's output that its norm will adapt: the whole insertion in one operator call."""

    h: Tensor
    x: Tensor
    vision: Tensor | None
    mask: Tensor | None


class AfterBlock(Part):
    """An adapter on a block's output, as others' hooks leave it."""

    def __init__(
        self,
        layer: LayerPart,
        place: Place,
        adapter: GatedAdapter,
        reads: nn.Module,
        norm: nn.Module | None,
    ) -> None:
        self.layer, self.role, self.adapter = layer, place.role, adapter
        self.layer_module, self.reads, self.norm = place.layer.module, reads, norm
        # Whether something needs X, the block's input.
        self.reads_input = norm is not None or adapter.gate in ("large", "middleX", "small")

    def forward(self, module: nn.Module, run: Run, args: Any, kwargs: Any) -> Any:
        if module is self.reads:
            self.keep_input(args, kwargs)
        return run(*args, **kwargs)

    def keep_input(self, args: Any, kwargs: Any) -> None:
        """Remembers X until the block's output comes."""
        frame = self.layer.running()
        if isinstance(frame, InsertFrame) and frame.call.given.on and self.reads_input:
            frame.inputs[self.role] = args[0] if args else kwargs["hidden_states"]

    def call(self, module: nn.Module, run: Run, args: Any, kwargs: Any) -> Any:
        frame = self.layer.running()
        if self.reads_input and frame is None:
            return self.layer.alone(lambda: self.call(module, run, args, kwargs))
        output = run(*args, **kwargs)
        call: Call = self.layer.call_now() if frame is None else frame.call
        if not call.given.on:
            return output
        h: Tensor = output[0] if isinstance(output, tuple) else output
        adapted = self.run(h, call, frame)
        return (adapted, *output[1:]) if isinstance(output, tuple) else adapted

    def run(self, h: Tensor, call: Call, frame: Any) -> Tensor:
        """The adapted output of the block; an empty tensor where the norm will adapt it."""
        adapter = self.adapter
        x = frame.inputs.pop(self.role, None) if isinstance(frame, InsertFrame) else None
        vision = vision_of(call, adapter.route, self.role)
        mask = call.tokens.counted(h, encoded=False) if adapter.gate == "small" else None
        if adapter.variant == "release":
            mask = None  # its mean is over the padding too
        if self.layer.method.published:
            return published_adapter(adapter, h, x, vision=vision, mask=mask)
        projected = None if vision is None else adapter.project(vision)
        waits = isinstance(frame, InsertFrame) and not frame.alone
        if waits and x is not None and self._norm_can_adapt(h, x):
            frame.pending[self.role] = Pending(h, x, projected, mask)
            # The layer's dropout and residual + H would be thrown away by the norm. Of an empty
            # tensor that broadcasts they cost nothing.
            return h.new_empty((0,) + (1,) * h.dim())
        out: Tensor = adapter(h, x, vision=projected, mask=mask)
        return out

    def _norm_can_adapt(self, h: Tensor, x: Tensor) -> bool:
        """In one dtype only: under autocast the residual stream is wider than the output. A norm
        that others watch is to see what the layer gives it."""
        norm = self.norm
        if norm is None or not (h.dtype == x.dtype == compute_dtype(h)) or h.shape != x.shape:
            return False
        watched = norm._forward_hooks or norm._forward_pre_hooks or "forward" in norm.__dict__
        watched = watched or torch_module._global_forward_hooks
        watched = watched or torch_module._global_forward_pre_hooks
        plain = own_class(norm) is nn.LayerNorm and not watched
        own = norm._parameters
        return plain and own["weight"] is not None and own["bias"] is not None

    def finish(self, pending: Pending, adapter: GatedAdapter | None = None) -> Tensor:
        """What the norm gives, with the adapter and the residual in the same call."""
        adapter = self.adapter if adapter is None else adapter
        out: Tensor = adapter(
            pending.h,
            pending.x,
            vision=pending.vision,
            mask=pending.mask,
            dropout=float(self.layer_module.dropout),  # type: ignore[arg-type]
            residual=pending.x,
            norm=self.norm,
            training=self.layer_module.training,
        )
        return out

    def run_once(self, x: Tensor) -> Tensor:
        """The adapter alone on a typical input of the block, as a layer would call it."""
        adapter: GatedAdapter = twin_of(self.adapter)
        h = x.to(compute_dtype(x))
        vision = None if adapter.route == "none" else adapter.project(typical_vision(adapter, h))
        if self._norm_can_adapt(h, x):
            return self.finish(Pending(h, x, vision, None), adapter)
        out: Tensor = adapter(h, x if self.reads_input else None, vision=vision)
        return out

    def kind(self) -> tuple[Any, ...]:
        """What decides how the adapter is called."""
        norm, layer = self.norm, self.layer_module
        copy = None if norm is None else norm.__dict__.get("_petal_copy")
        held = copy.holder if isinstance(copy, CopyPart) else None
        return self.adapter, norm, held, layer.training, getattr(layer, "dropout", None)


class Reads(Part):
    """The module whose input an adapter's gate reads, where the block is another one."""

    def __init__(self, block: AfterBlock) -> None:
        self.block = block

    def call(self, module: nn.Module, run: Run, args: Any, kwargs: Any) -> Any:
        if self.block.layer.running() is None:
            return self.block.layer.alone(lambda: run(*args, **kwargs))
        return run(*args, **kwargs)

    def forward(self, module: nn.Module, run: Run, args: Any, kwargs: Any) -> Any:
        self.block.keep_input(args, kwargs)
        return run(*args, **kwargs)


class PostNorm(Part):
    """The norm after an adapted block: where the adapter was left to it, it does not look at what
    the layer gives it: X plus the dropout of what stood in H's place."""

    def __init__(self, block: AfterBlock) -> None:
        self.block = block

    def call(self, module: nn.Module, run: Run, args: Any, kwargs: Any) -> Any:
        frame = self.block.layer.running()
        meets = isinstance(frame, InsertFrame)
        pending = frame.pending.pop(self.block.role, None) if meets else None
        return run(*args, **kwargs) if pending is None else self.block.finish(pending)


def typical_vision(module: Any, x: Tensor) -> Tensor:
    """Features for a route beside rows [B, L, D]: as many tokens, or one where more may mean
    nothing."""
    many = module.variant == "paper" or module.route not in ("add", "mul", "expand")
    return x if many else x[:, :1]


def vision_of(call: Call, route: str, role: str) -> Tensor | None:
    """The features that a route reads; ValueError where there are none."""
    if route == "none":
        return None
    if call.given.vision is None:
        raise ValueError(
            f"vision: want features for the route of {role!r}, got none; run the model inside "
            "`with attachment.vision(features):`"
        )
    return call.given.vision


class BlocksMethod(InsertionMethod):
    """A method with gated adapters after blocks."""

    def __init__(
        self, model: nn.Module, config: Any, *, published: bool, loads: bool = False
    ) -> None:
        self.parts: dict[str, AfterBlock] = {}
        super().__init__(model, config, published=published, loads=loads)

    def layer_part(self, layer: Layer, stack: int) -> LayerPart | None:
        if not layer.places:
            return None
        meets = any(isinstance(p.row, Block) and self._meets(p) for p in layer.places)
        return LayerPart(self, layer.index, stack, InsertFrame if meets else None)

    def sample(self, place: Place, wrapper: Any, tokens: Rows) -> tuple[Any, Any]:
        part, like = self.parts[place.path], place.layer.module
        kind = (*part.kind(), self.storage_of(like))
        key = signature(*kind, ignore=("_petal", "_petal_copy"))
        return key, lambda: part.run_once(self.typical(like, tokens, self.features))

    def _meets(self, place: Place) -> bool:
        """Whether the block and its norm, or its gate's input, meet in the layer's frame."""
        assert isinstance(place.row, Block)
        gate = getattr(self.config, "gate", "none")
        fuses = bool(place.row.norm) and not self.published
        return gate in ("large", "middleX", "small") or fuses

    def install_place(self, place: Place, layer: LayerPart, hand: Hand) -> None:
        row = place.row
        assert isinstance(row, Block)
        check_whole(place)
        raw = self.config.variant == "release" and row.raw
        reads = place.layer.child(row.raw if raw else row.reads)
        norm = place.layer.child(row.norm) if row.norm and not self.published else None
        adapter: Any = self.trains(place)
        block = AfterBlock(layer, place, adapter, reads, norm)
        self.parts[place.path] = block
        hand.take(place.module, block)
        if reads is not place.module and block.reads_input:
            hand.take(reads, Reads(block))
        if norm is not None:
            hand.take(norm, PostNorm(block))


def check_whole(place: Place) -> None:
    """ValueError where a block runs its tokens in pieces and must not."""
    chunk: Any = getattr(place.layer.module, "chunk_size_feed_forward", None)
    if place.row.part != "all" and chunk:
        raise ValueError(
            f"{place.layer.path}: want chunk_size_feed_forward = 0, since {place.role!r} must see "
            f"its tokens at once, got {chunk}"
        )


def role_of(stack: Stack, row: Any) -> str:
    """The role of a row: "encoder.ffn", "decoder.cross.query"."""
    cross = "cross." if getattr(row, "attention", "") == "cross" else ""
    return f"{stack.name}.{cross}{row.name}"


def lora_rows(stack: Stack) -> list[tuple[str, Any]]:
    """The query and value projections, fused ones included."""
    names = ("query", "value", "query_value")
    return [(role_of(stack, row), row) for row in stack.linears if row.name in names]


def block_rows(stack: Stack) -> list[tuple[str, Any]]:
    """All places after blocks."""
    return [(role_of(stack, row), row) for row in stack.blocks]
