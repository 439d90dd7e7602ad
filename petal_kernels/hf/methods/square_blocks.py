"""Projections adapted block by block: what a forward contracts for them, and their one call.

With d the width, U [R, d], V [d, R] and M_k of the projection's modes (`nn/mode_approximation.py`):

    outputs  (qkv: 3 blocks, fc1: 4)         y block k = base block k + s V drop_k(M_k^T U x)
    inputs   (projection: 1 block, fc2: 4)   y = base + s V drop(sum_k M_k^T U x_k)

x_k is block k of the inputs. The mask acts after the core, so that the core folds into V only where
nothing is dropped; with `inputs`, where nothing is shared, it folds into U either way:

    outputs, masked   M_k [n, R, R]: the operator's own core
    outputs           s [V M_1^T; ..; V M_n^T]  [n d, R]: one up-projection as wide as the base
    inputs            s [M_1^T U, .., M_n^T U]  [R, n d]: one down-projection, one mask

The layout "aurora_release" is that of the authors' code: the [R, R, n] contraction is reshaped to
T [R, n R] with the mode fastest and used with the mode slowest, so M_k [a, b] above becomes
T[a, k R + b], and for `inputs` T[b, k R + a].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petal_kernels._runtime.autocast import autocast_off
from petal_kernels.nn.frozen_linear import compute_dtype, weight_is_plain
from petal_kernels.nn.mode_approximation import ModeApproximation
from petal_kernels.nn.published import weight_dtype
from petal_kernels.ops.lowrank_linear import lowrank_linear
from petal_kernels.ops.mode_contract import mode_contract


@dataclass(frozen=True)
class Blocks:
    """The modes of one projection."""

    key: str  # its path
    form: str  # "outputs" or "inputs"
    modes: range
    mixed: bool = False  # the layout is "aurora_release"


def contract_blocks(
    shared: ModeApproximation, sites: Sequence[Blocks], *, masked: bool, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The product of every projection, by key: one contraction per form for all of them."""
    kinds: dict[tuple[str, bool], list[Blocks]] = {}
    for site in sites:
        kinds.setdefault((site.form, site.mixed), []).append(site)
    products: dict[str, Tensor] = {}
    for (form, mixed), batch in kinds.items():
        batch.sort(key=lambda site: site.modes.start)
        counts = [len(site.modes) for site in batch]
        first, last = batch[0].modes.start, batch[-1].modes.stop
        assert sum(counts) == last - first  # a slice: an index would be copied to the device
        modes = shared.modes[first:last]
        if mixed:
            matrices = mode_contract(shared.core, modes).split(counts)
            parts = [_folded(shared, _mix(m, form), form, masked, dtype) for m in matrices]
        else:
            parts = list(_contracted(shared, modes, form, masked, dtype).split(counts))
        for site, part in zip(batch, parts, strict=True):
            if form == "outputs":
                products[site.key] = part if masked else part.reshape(-1, shared.r)
            else:
                products[site.key] = part.transpose(0, 1).reshape(shared.r, -1)
    return products


def _contracted(
    shared: ModeApproximation, modes: Tensor, form: str, masked: bool, dtype: torch.dtype
) -> Tensor:
    """Of every mode M [R, R], s V M^T [d, R] or s M^T U [R, d]."""
    core = shared.core
    if form == "outputs" and masked:
        return mode_contract(core, modes, dtype=dtype)
    if form == "outputs":
        return mode_contract(core, modes, shared.up, scale=shared.scale, dtype=dtype)
    # M^T U is the transpose of U^T M: a fold of U^T with the core's first two indices exchanged.
    turned = core.transpose(0, 1) if core.dim() == 3 else core
    return mode_contract(turned, modes, shared.down.t(), scale=shared.scale, dtype=dtype).mT


def _mix(m: Tensor, form: str) -> Tensor:
    """The matrices that the released layout makes of M [n, R, R]."""
    n, r, _ = m.shape
    table = m.permute(1, 2, 0).reshape(r, n, r)  # T[a, k R + b]
    return table.transpose(0, 1) if form == "outputs" else table.permute(1, 2, 0)


def _folded(
    shared: ModeApproximation, m: Tensor, form: str, masked: bool, dtype: torch.dtype
) -> Tensor:
    """`_contracted` for matrices that are there already."""
    with autocast_off(m):
        if form == "outputs" and masked:
            return m.to(dtype)
        folded = shared.up.to(m.dtype) @ m.mT if form == "outputs" else m.mT @ shared.down
        return (shared.scale * folded).to(dtype)


def is_masked(shared: ModeApproximation, training: bool) -> bool:
    """Whether dropout stands between the core and V."""
    return training and shared.dropout > 0


def masked_blocks(
    x: Tensor, base: nn.Module, shared: ModeApproximation, cores: Tensor, training: bool
) -> Tensor:
    """base(x) with every block of its outputs updated by its own mode, dropped after the core."""
    dtype, width = compute_dtype(x), shared.out_features
    x_c = x if x.dtype == dtype else x.to(dtype)
    base_kind: dict[str, Sequence[Tensor | None]] = {}
    out = None
    if isinstance(base, nn.Linear) and weight_is_plain(base):
        parts = [base.weight] if base.bias is None else [base.weight, base.bias]
        if all(part.dtype == dtype and not part.requires_grad for part in parts):
            base_kind["weights"] = base.weight.split(width)
            base_kind["biases"] = (
                [None] * len(cores) if base.bias is None else base.bias.split(width)
            )
        else:
            out = F.linear(x_c, base.weight, base.bias)
    else:
        out = base(x)
    joins = out is not None and out.dtype == dtype and out.shape[:-1] == x.shape[:-1]
    if out is not None and joins:
        base_kind["base"] = out.split(width, dim=-1)
    with autocast_off(x):
        outputs = lowrank_linear(
            x_c,
            _operand(shared.down, x_c),
            # Views, one per output: a compiled graph does not take one tensor several times.
            list(_operand(shared.up, x_c).expand(len(cores), -1, -1).unbind(0)),
            core=_operand(cores, x_c),
            scale=shared.scale,
            dropout=shared.dropout,
            dropout_at="mode",
            training=training,
            **base_kind,  # type: ignore[arg-type]
        )
        y = torch.cat(outputs, dim=-1)
    return y if out is None or joins else out + y.to(out.dtype)


def _operand(t: Tensor, x: Tensor) -> Tensor:
    """`t` on x's device and in a dtype that the operator takes beside x (its own or float32)."""
    if t.dtype != torch.float32 or x.dtype == torch.float64:
        t = t.to(x.dtype)
    return t.to(x.device)


def published_blocks(
    factors: ModeApproximation, blocks: Blocks, x: Tensor, dropout: Callable[[Tensor], Tensor]
) -> Tensor:
    """The update in the published form: outputs, s [drop(x U^T [M_1 .. M_n])_k V^T for every k];
    inputs, s drop([x_1 U^T .. x_n U^T] [M_1; ..; M_n]) V^T."""
    dtype = weight_dtype(x)
    down, up = factors.down.to(dtype), factors.up.to(dtype)
    if blocks.form == "outputs":
        z = F.linear(x, down)
        w = dropout(z @ _table(factors, blocks).to(z.dtype))
        pieces = [F.linear(piece, up) for piece in w.split(factors.r, dim=-1)]
        return factors.scale * torch.cat(pieces, dim=-1)
    z = torch.cat([F.linear(block, down) for block in x.split(factors.in_features, -1)], dim=-1)
    return factors.scale * F.linear(dropout(z @ _table(factors, blocks).to(z.dtype)), up)


def _table(factors: ModeApproximation, blocks: Blocks) -> Tensor:
    """[M_1 .. M_n] ([R, n R]) for outputs, [M_1; ..; M_n] ([n R, R]) for inputs."""
    core, inputs = factors.core, blocks.form == "inputs"
    p = factors.modes[blocks.modes.start : blocks.modes.stop]
    if factors.core_kind == "cp":
        modes = torch.stack([torch.diag(core * each) for each in p], dim=-1)
    else:
        modes = torch.stack([torch.einsum("abc,c->ab", core, each) for each in p], dim=-1)
    if blocks.mixed:
        table = modes.reshape(modes.shape[0], -1)
        return table.t() if inputs else table
    return torch.cat(modes.unbind(-1), dim=0 if inputs else 1)
