"""Aurora on BLIP: one set of shared factors for image encoder, text encoder and text decoder.

Once per forward of a stack the products that its layers share are made: of the image encoder every
projection's (`square_blocks.py`), of a text stack P_k of all modes and U x_img (`modes.py`).

A text layer that ran its cross-attention, that is with image features, ends with

    y + 0.1 (a * s + t) + 0.1 (c * s' + t'),   a, c: outputs of its self and cross attention.

All of them share one U and one V, so every adapted projection is made of square blocks of one
width: a fused or wide projection counts one mode per block of its outputs or inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petal_kernels._runtime.dry_run import signature
from petal_kernels.hf.config import AuroraConfig
from petal_kernels.hf.context import now
from petal_kernels.hf.found import Layer, Place, counted, own_name
from petal_kernels.hf.method import Hand
from petal_kernels.hf.methods.embeddings import guard_embeddings
from petal_kernels.hf.methods.modes import (
    AFTER_NORM,
    Factors,
    ModesAdapter,
    ModesFrame,
    ModesLayer,
    ModesMethod,
)
from petal_kernels.hf.methods.square_blocks import (
    Blocks,
    contract_blocks,
    is_masked,
    masked_blocks,
    published_blocks,
)
from petal_kernels.hf.models import Block, Linear, Stack
from petal_kernels.hf.parts import Part, Run, StackPart
from petal_kernels.hf.report import SHARED_FACTORS, Row, Rows
from petal_kernels.hf.twins import base_twin, twin_of
from petal_kernels.hf.walk import device_of
from petal_kernels.hf.wrappers import LayerLinear
from petal_kernels.nn.frozen_linear import compute_dtype, frozen_lowrank
from petal_kernels.nn.mode_approximation import ModeApproximation
from petal_kernels.nn.residual import CONTEXT_SCALE, ScaleShift

SHARED = "shared"
MATCHING_HEAD = "itm_head"


class AuroraAdapter(ModesAdapter):
    """Everything trainable: one set of factors whatever the branch, and the text layers' pairs."""

    def __init__(self, shared: ModeApproximation) -> None:
        super().__init__()
        self.branches[SHARED] = shared

    @property
    def shared(self) -> ModeApproximation:
        return super().branch(SHARED)


class Products:
    """Of all projections of the image encoder, for one forward."""

    def __init__(self, masked: bool, products: dict[str, Tensor]) -> None:
        self.masked, self.products = masked, products


class Aurora(ModesMethod):
    """Aurora on one model."""

    needs = ("vision", "text")
    blocks = {"context": "the matching head"}  # noqa: RUF012 - as the base declares it
    config: AuroraConfig
    adapter: AuroraAdapter

    def rows(self, stack: Stack) -> Sequence[tuple[str, Linear | Block]] | None:
        if stack.name == "vision":
            return [(f"vision.{row.name}", row) for row in stack.linears]
        if stack.name == "text":
            return [(f"{row.attention}.{row.name}", row) for row in stack.linears]
        return None

    # -- what it trains ---------------------------------------------------------------------------

    def build(self) -> AuroraAdapter:
        config, found = self.config, self.found
        head = getattr(found.root, MATCHING_HEAD, None)
        self.head = head if isinstance(head, nn.Module) else None
        if config.context == "batch" and self.head is None:
            raise ValueError(
                f"context: want 'none' for a {type(found.root).__name__}, which has no "
                f"{MATCHING_HEAD!r}, got 'batch'"
            )
        width = _width(found.places)
        self._number(width)
        device = device_of(found.places[0].module)
        shared = ModeApproximation(
            width,
            width,
            config.r,
            sum(len(modes) for modes in self.modes.values()),
            core=str(config.core),
            scale=config.scale,
            dropout=config.dropout,
            device=device,
            dtype=config.dtype,
        )
        self._reset_modes(shared)
        adapter = AuroraAdapter(shared)
        for layer in found.layers:
            if self._live(layer):
                pair = {
                    name: ScaleShift(width, device=device, dtype=config.dtype)
                    for name in ("self", "cross")
                }
                adapter.layers[str(layer.index)] = nn.ModuleDict(pair)
        return adapter

    def _number(self, width: int) -> None:
        """Modes are numbered so that what is contracted together is one slice: stack by stack, in
        text layer by layer, in the image encoder form by form and block by block."""

        def together(place: Place) -> tuple[str, str]:
            row = place.row
            assert isinstance(row, Linear)
            whole = row.form == "whole"
            return ("" if whole else row.form, "" if whole else row.path.partition(".")[0])

        self.modes, count = {}, 0
        for stack in self.found.stacks:
            for place in sorted(stack.places, key=together):
                blocks = _long(place) // width
                self.modes[place.path] = range(count, count + blocks)
                count += blocks

    @torch.no_grad()
    def _reset_modes(self, shared: ModeApproximation) -> None:
        """Xavier-uniform on the matrix [R, n] of a block's n modes; in text every mode is its
        own."""
        for layer in self.found.layers:
            if layer.row.name != "vision":
                continue
            columns: dict[str, int] = {}
            names = {p.path: p.row.path.partition(".")[0] for p in layer.places}  # type: ignore[union-attr]
            for path, name in names.items():
                columns[name] = columns.get(name, 0) + len(self.modes[path])
            for path, name in names.items():
                bound = math.sqrt(6.0 / (shared.r + columns[name]))
                modes = self.modes[path]
                shared.modes[modes.start : modes.stop].uniform_(-bound, bound)

    def _live(self, layer: Layer) -> tuple[str, ...]:
        """The residuals of a text layer that has both attentions."""
        row = layer.row
        both = row.self_block and all(
            isinstance(getattr(layer.module, name, None), nn.Module)
            for name in (row.self_block, row.cross_block)
        )
        return ("self", "cross") if self.config.scale_shift and both else ()

    def signature(self) -> dict[str, Any]:
        return {
            f"stack {number}": {
                "class": own_name(stack.module, stack.row.runs),
                "layers": len(stack.layers),
                "projections": counted(stack.places),
            }
            for number, stack in enumerate(self.found.stacks)
        }

    def width(self) -> int:
        return self.adapter.shared.in_features

    # -- how it runs ------------------------------------------------------------------------------

    def factors(self, branch: str) -> ModeApproximation:
        return self.adapter.shared

    def layer_part(self, layer: Layer, stack: int) -> ModesLayer | None:
        part = ModesLayer(self, layer.index, stack)
        part.pairs = self._live(layer)
        part.captures = bool(part.pairs)
        return part if layer.places or part.pairs else None

    def install_place(self, place: Place, layer: ModesLayer, hand: Hand) -> None:
        if place.layer.row.name == "vision":
            hand.wrap(place, BlockLinear(place.module, layer, self._blocks(place)))
        else:
            super().install_place(place, layer, hand)

    def install(self, hand: Hand) -> None:
        super().install(hand)
        guard_embeddings(self.found.root, hand)
        if self.config.context == "batch" and self.head is not None:
            hand.take(self.head, MatchingHead(self))

    def _blocks(self, place: Place) -> Blocks:
        row = place.row
        assert isinstance(row, Linear)
        mixed = self.config.layout == "aurora_release" and not row.attention
        return Blocks(place.path, row.form, self.modes[place.path], mixed)

    def share(self, stack: StackPart, module: nn.Module, kwargs: dict[str, Any]) -> Any:
        shared = self.adapter.shared
        if stack.site.row.name == "vision":
            masked = is_masked(shared, module.training)
            blocks = [self._blocks(place) for place in stack.site.places]
            dtype = compute_dtype(kwargs["inputs_embeds"])
            return Products(masked, contract_blocks(shared, blocks, masked=masked, dtype=dtype))
        modes = [self.modes[place.path] for place in stack.site.places]
        every = slice(min(m.start for m in modes), max(m.stop for m in modes))
        factors = Factors()
        self.contract(factors, "text", every, compute_dtype(kwargs["hidden_states"]))
        factors.ups["image"], factors.first["image"] = factors.ups["text"], factors.first["text"]
        image, cache = kwargs.get("encoder_hidden_states"), kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            image = None  # its keys and values are in the cache
        reads = any(place.row.encoded for place in stack.site.places)  # type: ignore[union-attr]
        if image is not None and reads:
            factors.project(image, shared.down)
        return factors

    def residuals(self, layer: ModesLayer, frame: ModesFrame, output: Any) -> Any:
        if frame.a is None or frame.c is None:
            return output
        return layer.add(layer.add(output, frame.a, "self"), frame.c, "cross")

    # -- what it says -----------------------------------------------------------------------------

    def kept(self) -> dict[str, str]:
        kept = {
            f"{layer.path}: scale/shift residual": AFTER_NORM
            for layer in self.found.layers
            if self._live(layer)
        }
        if self.config.context == "batch":
            kept["context"] = "depends on the batch"
        return kept

    def place_row(self, place: Place) -> Row:
        shared, (d_in, d_out) = self.adapter.shared, place.shape
        modes, form = len(self.modes[place.path]), place.row.form  # type: ignore[union-attr]
        blocks = f", {modes} blocks of {form}" if modes > 1 else ""
        count = modes * shared.r if shared.modes.requires_grad else 0
        return Row(
            place.path, place.role, f"{d_in} -> {d_out}, r {shared.r}{blocks}", "", "", count
        )

    def sample(self, place: Place, wrapper: Any, tokens: Rows) -> tuple[Any, Any]:
        if place.layer.row.name != "vision":
            return super().sample(place, wrapper, tokens)
        base, blocks = base_twin(wrapper.base), self._blocks(place)
        kind = (blocks.form, len(blocks.modes), blocks.mixed)
        key = signature("vision", kind, base, self.adapter.shared, wrapper.training)
        return key, lambda: twin_of(wrapper, base=base).adapted(self.typical(base, tokens))

    def shared_sample(self, row: Row, tokens: Rows) -> Any:
        if not row.role.startswith(SHARED_FACTORS):
            return None

        def share() -> None:
            for number, site in enumerate(self.found.stacks):
                if site.places:
                    x = self.typical(site.layers[0].module, tokens, self.width())
                    given = {"inputs_embeds": x, "hidden_states": x}
                    self.share(StackPart(self, number, site), site.module, given)

        return share


class BlockLinear(LayerLinear):
    """A projection of the image encoder with its modes."""

    layer: ModesLayer

    def __init__(self, base: nn.Module, layer: ModesLayer, blocks: Blocks) -> None:
        super().__init__(base, layer)
        self.blocks = blocks

    def adapted(self, x: Tensor) -> Tensor:
        shared, method = self.used(), self.method
        if method.published:
            y: Tensor = self.base(x)
            return y + published_blocks(shared, self.blocks, x, self.drop)
        inputs = self.blocks.form == "inputs"
        masked = is_masked(shared, self.training)
        product = self._product(masked, compute_dtype(x))
        if masked and not inputs:
            return masked_blocks(x, self.base, shared, product, self.training)
        down, up = (product, shared.up) if inputs else (shared.down, product)
        dropout, bases = shared.dropout, [self.base]
        return frozen_lowrank(x, bases, down, [up], dropout=dropout, training=self.training)[0]

    def drop(self, z: Tensor) -> Tensor:
        """The published form's dropout."""
        return torch.nn.functional.dropout(z, self.used().dropout, self.training)

    def _product(self, masked: bool, dtype: torch.dtype) -> Tensor:
        """Of this projection, from what the forward shares or contracted here."""
        frame = self.layer.running()
        shared = None if frame is None else frame.shared
        if isinstance(shared, Products) and shared.masked == masked:
            return shared.products[self.blocks.key]
        blocks = [self.blocks]
        return contract_blocks(self.used(), blocks, masked=masked, dtype=dtype)[self.blocks.key]

    def used(self) -> ModeApproximation:
        return self.layer.method.factors(SHARED)

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Block by block s V M^T U: of rows where the outputs have the modes, else of columns."""
        shared = self.used()
        product = contract_blocks(shared, [self.blocks], masked=False, dtype=dtype)[self.blocks.key]
        if self.blocks.form == "inputs":
            return shared.up.to(dtype) @ product
        return product @ shared.down.to(dtype)


class MatchingHead(Part):
    """x + 0.1 mean_b features[b, 0], where a block gives features."""

    def __init__(self, method: Aurora) -> None:
        self.method = method

    def forward(self, module: nn.Module, run: Run, args: Any, kwargs: Any) -> Any:
        says = now(self.method)
        if says.features is None or not says.on:
            return run(*args, **kwargs)
        first = says.features[:, 0] if says.features.dim() == 3 else says.features
        added = CONTEXT_SCALE * first.mean(dim=0)
        return run(args[0] + added.to(args[0]), *args[1:], **kwargs)


def _long(place: Place) -> int:
    """The size that is cut into blocks."""
    return place.shape[1 if place.row.form == "outputs" else 0]  # type: ignore[union-attr]


def _width(places: Sequence[Place]) -> int:
    """The width of all blocks, which share U and V."""
    widths: dict[int, str] = {}
    for place in places:
        d_in, d_out = place.shape
        ends = {"whole": (d_in, d_out), "outputs": (d_in,), "inputs": (d_out,)}[place.row.form]  # type: ignore[union-attr]
        for width in ends:
            widths.setdefault(width, place.path)
    if len(widths) != 1:
        raise ValueError(
            "model: want one width in the image encoder and the text, which share their factors, "
            f"got {widths}"
        )
    width = next(iter(widths))
    for place in places:
        if _long(place) % width:
            raise ValueError(
                f"{place.path}: want sizes that are multiples of the width {width}, which is that "
                f"of a mode's block, got {place.shape[0]} -> {place.shape[1]}"
            )
    return width
