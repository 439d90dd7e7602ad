"""PETAL on models with a Q-Former: mode approximation, residual, batch context, experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from petal_kernels.hf.config import PetalConfig
from petal_kernels.hf.context import THREAD, Call, Frame, now
from petal_kernels.hf.found import Layer, Place, counted, own_name
from petal_kernels.hf.method import Hand
from petal_kernels.hf.methods.modes import (
    AFTER_NORM,
    Factors,
    ModesAdapter,
    ModesFrame,
    ModesLayer,
    ModesMethod,
)
from petal_kernels.hf.models import Block, Linear, Stack
from petal_kernels.hf.parts import Part, Run, StackPart, own_class
from petal_kernels.hf.report import SHARED_FACTORS, Row, Rows
from petal_kernels.hf.routing import Routings
from petal_kernels.hf.tokens import Tokens, named
from petal_kernels.hf.twins import twin_of
from petal_kernels.hf.walk import device_of, is_a, joined
from petal_kernels.nn.experts import InstructionExperts
from petal_kernels.nn.frozen_linear import compute_dtype
from petal_kernels.nn.low_rank_experts import LowRankExperts
from petal_kernels.nn.mode_approximation import ModeApproximation
from petal_kernels.nn.published import published_context, published_instruction
from petal_kernels.nn.residual import ScaleShift, batch_context

_EMBEDDINGS = "*QFormerEmbeddings"


class Petal(ModesMethod):
    """PETAL on one model."""

    needs = ("qformer",)
    stack_starts = False  # the embeddings do, before it
    config: PetalConfig

    def __init__(
        self, model: nn.Module, config: PetalConfig, *, published: bool, loads: bool = False
    ) -> None:
        self.embeddings: tuple[str, nn.Module, nn.Module] | None = None  # path, module, its owner
        super().__init__(model, config, published=published, loads=loads)

    def rows(self, stack: Stack) -> Sequence[tuple[str, Linear | Block]] | None:
        if stack.name != "qformer":
            return None
        return [(f"{row.attention}.{row.name}", row) for row in stack.linears]

    # -- what it trains ---------------------------------------------------------------------------

    def build(self) -> ModesAdapter:
        config, adapter, found = self.config, ModesAdapter(), self.found
        if len(found.stacks) != 1:
            raise ValueError(
                f"model: want exactly one module of class {found.stacks[0].row.runs!r} in a "
                f"{found.model_type!r} model, got {[stack.path for stack in found.stacks]}"
            )
        device = device_of(found.places[0].module)
        self.modes = {}
        for branch in ("text", "image"):
            # Modes are numbered layer by layer, so that one layer's are one slice.
            places = [p for p in found.places if p.row.encoded == (branch == "image")]  # type: ignore[union-attr]
            self.modes |= {place.path: range(k, k + 1) for k, place in enumerate(places)}
            shapes = {place.shape for place in places}
            if not places:
                continue
            if len(shapes) != 1:
                raise ValueError(
                    f"model: want one (in, out) shape for all {branch} projections, which share "
                    f"their factors, got {sorted(shapes)}"
                )
            adapter.branches[branch] = ModeApproximation(
                *shapes.pop(),
                config.r,
                len(places),
                core=str(config.core),
                scale=config.scale,
                dropout=config.dropout,
                device=device,
                dtype=config.dtype,
            )
        if config.scale_shift:
            for layer in found.layers:
                adapter.layers[str(layer.index)] = self._pairs(layer, device)
        if config.experts:
            self.embeddings = self._find_embeddings()
            adapter.experts = self._experts(*self.embeddings[:2])
        return adapter

    def _pairs(self, layer: Layer, device: torch.device) -> nn.ModuleDict:
        """The pairs of a layer; those that never act are stored, frozen, in "release"."""
        first = self.found.layers[0]
        width = norm_width(first.child(first.row.self_block), first.path)
        kind: dict[str, Any] = {"device": device, "dtype": self.config.dtype}
        pairs = nn.ModuleDict({"self": ScaleShift(width, **kind)})
        live = "cross" in self._live(layer)
        if live or self.config.variant == "release":
            pairs["cross"] = ScaleShift(width, **kind)
            pairs["cross"].requires_grad_(live)
        return pairs

    def _live(self, layer: Layer) -> tuple[str, ...]:
        """The pairs that act."""
        if not self.config.scale_shift:
            return ()
        crosses = getattr(layer.module, layer.row.cross_block, None) is not None
        return ("self", "cross") if self.config.use_cross_residual and crosses else ("self",)

    def _find_embeddings(self) -> tuple[str, nn.Module, nn.Module]:
        """The module that embeds [queries; instruction], and the one that calls it."""
        root = self.found.root
        matches = [(n, m) for n, m in root.named_modules() if is_a(m, _EMBEDDINGS)]
        if len(matches) != 1:
            raise ValueError(
                "experts: want a model whose Q-Former embeds an instruction (one module of class "
                f"{_EMBEDDINGS!r}), got a {self.found.model_type!r} model with {len(matches)}"
            )
        name, module = matches[0]
        owner = root.get_submodule(name.rpartition(".")[0])
        return joined(self.found.path, name), module, owner

    def _experts(self, path: str, module: nn.Module) -> InstructionExperts:
        config = self.config
        return InstructionExperts(
            norm_width(module, path),
            config.experts,
            config.expert_r,
            gate=str(config.gate),
            top_k=config.top_k,
            router_input=config.router_input,
            router_noise=config.router_noise,
            tokens=str(config.tokens),
            keep=config.keep,
            mix=config.mix,
            init=config.expert_init,
            device=device_of(module),
            dtype=config.dtype,
        )

    def signature(self) -> dict[str, Any]:
        (stack,) = self.found.stacks
        signature = {
            "stack": own_name(stack.module, stack.row.runs),
            "layers": len(stack.layers),
            "projections": counted(self.found.places),
        }
        if self.embeddings is not None:
            width = norm_width(self.embeddings[1], self.embeddings[0])
            signature["embeddings"] = {"width": width}
        return signature

    # -- how it runs ------------------------------------------------------------------------------

    def factors(self, branch: str) -> ModeApproximation:
        return self.adapter.branch(branch)

    def layer_part(self, layer: Layer, stack: int) -> ModesLayer:
        part = ModesLayer(self, layer.index, stack)
        part.pairs = self._live(layer)
        return part

    def install(self, hand: Hand) -> None:
        super().install(hand)
        if self.embeddings is not None:
            _, module, owner = self.embeddings
            hand.take(owner, Instructed(self))
            hand.take(module, Served(self))

    def share(self, stack: StackPart, module: nn.Module, kwargs: dict[str, Any]) -> Factors:
        hidden, image = kwargs["hidden_states"], kwargs.get("encoder_hidden_states")
        shared = Factors()
        for branch in self.adapter.branches:
            self.contract(shared, branch, None, compute_dtype(hidden))
        if image is not None and "image" in self.adapter.branches:
            shared.project(image, self.factors("image").down)
        return shared

    def add_context(self, frame: ModesFrame, output: Any) -> Any:
        if self.config.context != "batch" or frame.a is None:
            return output
        return (published_context if self.published else batch_context)(output, frame.a)

    def residuals(self, layer: ModesLayer, frame: ModesFrame, output: Any) -> Any:
        y = output if frame.a is None else layer.add(output, frame.a, "self")
        if "cross" not in layer.pairs or frame.c is None:
            return y
        queries = frame.c.shape[1]
        if queries == y.shape[1]:
            return layer.add(y, frame.c, "cross")
        return torch.cat([layer.add(y[:, :queries], frame.c, "cross"), y[:, queries:]], dim=1)

    # -- what it says -----------------------------------------------------------------------------

    def experts(self) -> Mapping[str, LowRankExperts]:
        experts = self.adapter.experts
        return {} if self.embeddings is None else {self.embeddings[0]: experts}

    def kept(self) -> dict[str, str]:
        kept = {}
        for layer in self.found.layers:
            if self.config.scale_shift:
                kept[f"{layer.path}: scale/shift residual"] = AFTER_NORM
            if self.config.context == "batch" and hasattr(layer.module, layer.row.cross_block):
                kept[f"{layer.path}: batch context"] = "depends on the batch"
        if self.embeddings is not None:
            kept[f"{self.embeddings[0]}: experts"] = "no linear precedes them"
        return kept

    def place_row(self, place: Place) -> Row:
        factors = self.factors("image" if place.row.encoded else "text")  # type: ignore[union-attr]
        shape = f"{factors.in_features} -> {factors.out_features}, r {factors.r}"
        count = factors.r if factors.modes.requires_grad else 0
        return Row(place.path, place.role, shape, "", "", count)

    def shared_rows(self) -> list[Row]:
        rows = super().shared_rows()
        if self.embeddings is not None:
            rows.append(
                self.expert_row(self.embeddings[0], "instruction experts", self.adapter.experts)
            )
        return rows

    def shared_sample(self, row: Row, tokens: Rows) -> Any:
        if row.role.startswith(SHARED_FACTORS):
            dtype, device = self.storage_of(self.found.layers[0].module)
            branch = row.module.rpartition(".")[2]

            def contract() -> None:
                hidden = torch.empty(0, dtype=dtype, device=device)
                self.contract(Factors(), branch, None, compute_dtype(hidden))

            return contract
        if self.embeddings is None or row.module != self.embeddings[0]:
            return None
        experts, module = self.adapter.experts, self.embeddings[1]
        return lambda: twin_of(experts)(self.typical(module, tokens, experts.in_features))


def norm_width(block: nn.Module, path: str) -> int:
    """What the last LayerNorm of a block normalises: the width of its output."""
    for module in reversed(list(block.modules())):
        if isinstance(module, nn.LayerNorm):
            return int(module.normalized_shape[0])
    raise ValueError(f"{path}: want a LayerNorm in the {type(block).__name__}, got none")


class Instructed(Part):
    """The embeddings' owner: while it runs, what its call says of their tokens is known to them."""

    def __init__(self, method: Petal) -> None:
        self.method = method

    def forward(self, module: nn.Module, run: Run, args: Any, kwargs: Any) -> Any:
        says = now(self.method)
        if not says.on:
            return run(*args, **kwargs)
        known = named(own_class(module), args, kwargs)
        call = Call(says, Tokens.entering((), known, None, reader=self.method.reader))
        frame = Frame(self, call, None, None, THREAD.frame)
        THREAD.frame = frame
        try:
            return run(*args, **kwargs)
        finally:
            THREAD.frame = frame.outer


class Served(Part):
    """The embeddings [queries; instruction]: what the experts make of them, once per forward."""

    def __init__(self, method: Petal) -> None:
        self.method = method

    def call(self, module: nn.Module, run: Run, args: Any, kwargs: Any) -> Any:
        output, experts = run(*args, **kwargs), self.method.adapter.experts
        if not now(self.method).on:
            return output
        embeds = args[2] if len(args) > 2 else kwargs.get("query_embeds")
        queries = 0 if embeds is None else embeds.shape[1]
        if experts.tokens == "text" and queries == output.shape[1]:
            return output  # there is no instruction
        frame = THREAD.frame
        tokens = frame.call.tokens if frame is not None else Tokens()
        mask = tokens.counted(output, encoded=False)
        if self.method.published:
            served, routing = published_instruction(experts, output, queries, mask)
        else:
            served, routing = experts(output, queries, mask)
        path = next(iter(self.method.experts()))
        self.method.routings = Routings({path: routing})
        # Under autocast the stream of a post-LN stack is wider than its products.
        return served.to(output.dtype)
