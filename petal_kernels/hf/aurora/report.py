"""The rows of an Aurora attachment's report."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from petal_kernels._runtime.backends import explain
from petal_kernels.hf.aurora.layers import SHARED, AuroraAdapter, is_masked
from petal_kernels.hf.aurora.specs import Found, Site
from petal_kernels.hf.report import Report, Row, choice_in_words, finish
from petal_kernels.nn.frozen_linear import why_not_plain
from petal_kernels.nn.mode_approximation import ModeApproximation
from petal_kernels.ops.lowrank_linear import lowrank_linear

_TYPICAL_ROWS = 1024  # tokens for which the planner is asked


def make_report(
    model: nn.Module,
    adapter: AuroraAdapter,
    extra: dict[str, nn.Module],
    found: Found,
    implementation: str,
) -> Report:
    """The report of an attachment, as it would run now."""
    rows = _projection_rows(adapter.shared, found, implementation) + _shared_rows(adapter)
    declined = {site.path: why_not_plain(site.base) for site in found.sites()}
    declined = {path: why for path, why in declined.items() if why}
    return finish(rows, model, adapter, extra, implementation, declined)


def _projection_rows(shared: ModeApproximation, found: Found, implementation: str) -> list[Row]:
    rows = []
    known: dict[tuple[object, ...], tuple[str, str]] = {}
    for layer in (layer for stack in found.stacks for layer in stack.layers):
        groups: dict[str, list[Site]] = {}
        for site in layer.sites:
            groups.setdefault(site.row.group or site.row.role, []).append(site)
        for sites in groups.values():
            key = tuple((s.row.form, len(s.modes), why_not_plain(s.base), *_kind(s)) for s in sites)
            if key not in known:
                known[key] = _backend(sites, shared, implementation)
            rows += [_row(site, shared, *known[key]) for site in sites]
    return rows


def _row(site: Site, shared: ModeApproximation, backend: str, why: str) -> Row:
    d_in, d_out = site.shape
    blocks = f", {len(site.modes)} blocks of {site.row.form}" if len(site.modes) > 1 else ""
    trainable = len(site.modes) * shared.r if shared.modes.requires_grad else 0
    shape = f"{d_in} -> {d_out}, r {shared.r}{blocks}"
    return Row(site.path, site.row.role, shape, backend, why, trainable)


def _kind(site: Site) -> tuple[object, ...]:
    weight = site.base._parameters.get("weight")
    return () if weight is None else (weight.dtype, weight.device)


def _backend(sites: list[Site], shared: ModeApproximation, implementation: str) -> tuple[str, str]:
    """The backend that a typical training call runs on, and why not a preferred one."""
    if implementation == "published":
        return "eager", "eager: the published form, one mode at a time"
    plain = not any(why_not_plain(site.base) for site in sites)
    weight = sites[0].base._parameters.get("weight")
    dtype = weight.dtype if plain and weight is not None else torch.float32
    like: dict[str, Any] = {"dtype": dtype, "device": shared.down.device}
    d_in, d_out = sites[0].shape
    outputs = sites[0].row.form == "outputs"
    masked = outputs and is_masked(shared, training=True)
    count, width = len(sites), d_out
    more: dict[str, Any] = {"dropout": shared.dropout}
    if masked:
        count, width = len(sites[0].modes), shared.out_features
        more |= {"core": torch.empty(count, shared.r, shared.r, **like), "dropout_at": "mode"}
    elif outputs:
        more["dropout"] = 0.0
    if plain and masked:
        assert weight is not None
        more["weights"] = weight.detach().split(width)
    elif plain:
        more["weights"] = [site.base._parameters["weight"] for site in sites]
    else:
        more["base"] = [torch.empty(_TYPICAL_ROWS, width, **like)] * count
    x = torch.empty(_TYPICAL_ROWS, d_in, **like)
    down, up = torch.empty(shared.r, d_in, **like), torch.empty(width, shared.r, **like)
    try:
        with torch.enable_grad():
            return choice_in_words(explain(lowrank_linear, x, down, [up] * count, **more))
    except RuntimeError as error:  # a backend asked for by name that cannot run here
        return "none", str(error)


def _shared_rows(adapter: AuroraAdapter) -> list[Row]:
    shared = adapter.shared
    parts = (shared.down, shared.up, shared.core)
    count = sum(p.numel() for p in parts if p.requires_grad)
    shape = ", ".join("x".join(map(str, p.shape)) for p in parts)
    role = f"shared factors ({shared.core_kind})"
    rows = [Row(f"petal.branches.{SHARED}", role, shape, "", "", count)]
    for index, pairs in adapter.layers.items():
        count = sum(p.numel() for p in pairs.parameters() if p.requires_grad)
        shape = f"2 x {shared.out_features} (self, cross)"
        rows.append(Row(f"petal.layers.{index}", "scale/shift", shape, "", "", count))
    return rows
