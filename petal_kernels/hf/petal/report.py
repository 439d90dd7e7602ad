"""The rows of a PETAL attachment's report."""

from __future__ import annotations

import torch
from torch import nn

from petal_kernels._runtime.backends import explain
from petal_kernels.hf.experts import expert_row
from petal_kernels.hf.petal.layers import PetalAdapter
from petal_kernels.hf.petal.specs import Found, Site
from petal_kernels.hf.report import Report, Row, choice_in_words, finish
from petal_kernels.nn.frozen_linear import why_not_plain
from petal_kernels.nn.gated_adapter import Near
from petal_kernels.nn.mode_approximation import ModeApproximation
from petal_kernels.ops.lowrank_linear import lowrank_linear

_TYPICAL_ROWS = 1024  # tokens for which the planner is asked


def make_report(
    model: nn.Module,
    adapter: PetalAdapter,
    extra: dict[str, nn.Module],
    found: Found,
    implementation: str,
) -> Report:
    """The report of an attachment, as it would run now."""
    rows = _projection_rows(adapter, found, implementation) + _shared_rows(adapter)
    if found.embeddings is not None and adapter.experts is not None:
        at, place = (found.embeddings.path, "instruction experts"), found.embeddings.module
        rows.append(expert_row(*at, adapter.experts, implementation, place))
    declined = {site.path: why_not_plain(site.base) for site in found.sites()}
    declined = {path: why for path, why in declined.items() if why}
    return finish(rows, model, adapter, extra, implementation, declined)


def _projection_rows(adapter: PetalAdapter, found: Found, implementation: str) -> list[Row]:
    rows, known = [], {}
    for layer in found.layers:
        groups: dict[str, list[Site]] = {}
        for site in layer.sites:
            groups.setdefault(site.row.group, []).append(site)
        for sites in groups.values():
            factors = adapter.branch(sites[0].row.branch)
            key = _group_key(sites)
            if key not in known:
                known[key] = _backend(sites, factors, implementation)
            rows += [_projection_row(site, factors, *known[key]) for site in sites]
    return rows


def _projection_row(site: Site, factors: ModeApproximation, backend: str, why: str) -> Row:
    shape = f"{factors.in_features} -> {factors.out_features}, r {factors.r}"
    trainable = factors.r if factors.modes.requires_grad else 0
    return Row(site.path, site.row.role, shape, backend, why, trainable)


def _group_key(sites: list[Site]) -> tuple[object, ...]:
    bases = tuple((why_not_plain(s.base), _weight_kind(s.base)) for s in sites)
    return (sites[0].row.branch, len(sites), bases)


def _weight_kind(base: nn.Module) -> tuple[object, ...]:
    weight = base._parameters.get("weight")
    return () if weight is None else (weight.dtype, weight.device)


def _backend(sites: list[Site], factors: ModeApproximation, implementation: str) -> tuple[str, str]:
    """The backend that a typical call of this group runs on, and why not a preferred one."""
    if implementation == "published":
        return "eager", "eager: the published form, one mode at a time"
    plain = not any(why_not_plain(site.base) for site in sites)
    weight = sites[0].base._parameters.get("weight")
    dtype = weight.dtype if plain and weight is not None else torch.float32
    like = {"dtype": dtype, "device": factors.down.device}
    x = torch.empty(_TYPICAL_ROWS, factors.in_features, **like)  # type: ignore[call-overload]
    up = torch.empty(factors.out_features, factors.r, **like)  # type: ignore[call-overload]
    base: dict[str, object] = {}
    if plain:
        base["weights"] = [site.base._parameters["weight"] for site in sites]
        base["biases"] = [site.base._parameters.get("bias") for site in sites]
    else:
        outs = torch.empty(_TYPICAL_ROWS, factors.out_features, **like)  # type: ignore[call-overload]
        base["base"] = [outs] * len(sites)
    ups, dropout = [up] * len(sites), factors.dropout
    down = Near(dtype, x.device).parameter(factors.down)
    try:
        with torch.enable_grad():
            found = explain(lowrank_linear, x, down, ups, dropout=dropout, **base)
    except RuntimeError as error:  # a backend asked for by name that cannot run here
        return "none", str(error)
    return choice_in_words(found)


def _shared_rows(adapter: PetalAdapter) -> list[Row]:
    rows = []
    for name in adapter.branches:
        factors = adapter.branch(name)
        parts = (factors.down, factors.up, factors.core)
        count = sum(p.numel() for p in parts if p.requires_grad)
        shape = ", ".join("x".join(map(str, p.shape)) for p in parts)
        role = f"shared factors ({factors.core_kind})"
        rows.append(Row(f"petal.branches.{name}", role, shape, "", "", count))
    for index, pairs in adapter.layers.items():
        count = sum(p.numel() for p in pairs.parameters() if p.requires_grad)
        names = ", ".join(name for name, _ in pairs.named_children())
        width = next(pairs.parameters()).numel()
        shape = f"2 x {width} ({names})"
        rows.append(Row(f"petal.layers.{index}", "scale/shift", shape, "", "", count))
    return rows
