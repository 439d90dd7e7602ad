"""What an attachment did, as rows and as a table."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from petal_kernels._runtime.backends import explain
from petal_kernels.hf.layers import PetalAdapter
from petal_kernels.hf.specs import Found, Site
from petal_kernels.nn.frozen_linear import why_not_plain
from petal_kernels.nn.mode_approximation import ModeApproximation
from petal_kernels.ops.lowrank_linear import lowrank_linear

_TYPICAL_ROWS = 1024  # tokens for which the planner is asked


@dataclass(frozen=True)
class Row:
    """One replaced module or one shared part of the adapter."""

    module: str
    role: str
    shape: str
    backend: str
    why: str
    trainable: int


@dataclass(frozen=True)
class Report:
    """`rows` and the counts; str() is a table."""

    rows: list[Row] = field(repr=False)
    implementation: str
    base_parameters: int
    trainable: int
    stored: int
    declined: dict[str, str]

    @property
    def percent(self) -> float:
        """Trainable parameters in per cent of the base model's."""
        return 100.0 * self.trainable / max(self.base_parameters, 1)

    def __str__(self) -> str:
        header = ("module", "role", "shape", "backend", "trainable")
        notes = {
            why: i for i, why in enumerate(dict.fromkeys(r.why for r in self.rows if r.why), 1)
        }
        table = [header]
        for row in self.rows:
            mark = f"[{notes[row.why]}]" if row.why else ""
            backend = f"{row.backend} {mark}".strip()
            table.append((row.module, row.role, row.shape, backend, f"{row.trainable:,}"))
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        lines = []
        for line in table:
            cells = [cell.ljust(width) for cell, width in zip(line[:-1], widths, strict=False)]
            lines.append("  ".join([*cells, line[-1].rjust(widths[-1])]))
        lines.insert(1, "-" * len(lines[0]))
        lines += [f"[{number}] {why}" for why, number in notes.items()]
        lines += [f"base called, not read: {path} ({why})" for path, why in self.declined.items()]
        lines.append(
            f"{self.implementation}: {self.trainable:,} trainable parameters ({self.stored:,} "
            f"stored), {self.percent:.3f} % of the model's {self.base_parameters:,}"
        )
        return "\n".join(lines)


def make_report(
    model: nn.Module,
    adapter: PetalAdapter,
    extra: dict[str, nn.Module],
    found: Found,
    implementation: str,
) -> Report:
    """The report of an attachment, as it would run now."""
    own = {id(p) for p in adapter.parameters()}
    base = sum(p.numel() for p in model.parameters() if id(p) not in own)
    rows = _projection_rows(adapter, found, implementation)
    rows += _shared_rows(adapter, extra)
    trainable = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    stored = sum(p.numel() for p in adapter.parameters())
    for module in extra.values():
        trainable += sum(p.numel() for p in module.parameters() if p.requires_grad)
        stored += sum(p.numel() for p in module.parameters())
    declined = {site.path: why_not_plain(site.base) for site in found.sites()}
    declined = {path: why for path, why in declined.items() if why}
    return Report(rows, implementation, base, trainable, stored, declined)


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
    try:
        with torch.enable_grad():
            found = explain(lowrank_linear, x, factors.down, ups, dropout=dropout, **base)
    except RuntimeError as error:  # a backend asked for by name that cannot run here
        return "none", str(error)
    chosen, plan = found.backend, f"plan {found.plan}"
    better = found.rows[: [name for name, _ in found.rows].index(chosen)]
    why = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in better)
    return chosen, f"{chosen}: {plan}" + (f"; {why}" if why else "")


def _shared_rows(adapter: PetalAdapter, extra: dict[str, nn.Module]) -> list[Row]:
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
    for path, module in extra.items():
        count = sum(p.numel() for p in module.parameters() if p.requires_grad)
        rows.append(Row(path, "modules_to_save", "trained whole", "", "", count))
    return rows
