"""Folding updates into frozen weights, and back.

Only what is a linear map of a module's own input is folded, and only into weights that may be read.
The original Parameter objects are kept aside, so that undoing is exact to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from petal_kernels._runtime.numerics import wide_dtype
from petal_kernels.nn.frozen_linear import why_not_readable

if TYPE_CHECKING:
    from petal_kernels.hf.method import Method
    from petal_kernels.hf.wrappers import AdaptedLinear

NAME = "petal"  # of the adapter, at the model's root
HANDLE = "_petal_attachment"  # on the adapter: the model's copy finds its own
WHOLE = "trained whole"  # why something is kept that a plain model can hold all the same
ALL = "all."  # the prefix by which an attachment asks for its tensors, merged or not


@dataclass
class MergeReport:
    """What merge folded, what stays as modules and why, and what rounding cost.

    `rounding` is, per folded module, the Frobenius norm of (stored - exact) weight over that of the
    update: how much of the update a narrow base dtype lost (0 where the update itself is zero).
    """

    folded: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    @property
    def worst_rounding(self) -> float:
        return max(self.rounding.values(), default=0.0)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        lines = [
            f"folded {len(self.folded)} projections into {dtype} weights",
            f"rounding took at most {self.worst_rounding:.2e} of an update",
        ]
        lines += [f"kept as a module: {name} ({why})" for name, why in self.kept.items()]
        return "\n".join(lines)


class Merged:
    """A merge that can be undone."""

    def __init__(self) -> None:
        self.report = MergeReport()
        self.folded: list[Folded] = []
        self.frozen: list[nn.Parameter] = []

    def fold(self, path: str, wrapper: AdaptedLinear, update: Tensor) -> None:
        """Replaces base.weight by weight + update, summed in fp32 (fp64) and rounded once."""
        base = wrapper.base
        weight = base._parameters["weight"]
        assert weight is not None
        update = update if isinstance(base, nn.Linear) else update.t()  # transformers' Conv1D
        exact = weight.to(update.dtype) + update.to(weight.device)
        stored = self.put(path, wrapper, [base], exact)
        norm = 0.0 if weight.is_meta else _norm(update)
        lost = _norm(stored.to(update.dtype) - exact) / norm if norm > 0 else 0.0
        self.report.rounding[path] = lost

    def put(
        self, path: str, owner: nn.Module, bases: Sequence[nn.Module], exact: Tensor
    ) -> nn.Parameter:
        """`exact` in place of the weight that `bases` share; `owner` then knows it by `merged`."""
        weight = bases[0]._parameters["weight"]
        assert weight is not None
        stored = nn.Parameter(exact.to(weight.dtype), requires_grad=False)
        for base in bases:
            base._parameters["weight"] = stored
        owner.__dict__["merged"] = weight
        self.folded.append(Folded(path, owner, bases, stored, stored._version))
        self.report.folded.append(path)
        self.report.dtype = weight.dtype
        return stored

    def freeze(self, parameters: Iterable[nn.Parameter]) -> None:
        """Parameters whose gradient would miss what is folded."""
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                self.frozen.append(parameter)

    @property
    def is_whole(self) -> bool:
        """Whether nothing of the adapter is left beside the folded weights."""
        return not self.report.kept

    def undo(self) -> None:
        """RuntimeError where somebody wrote into a merged weight: that would be lost."""
        for each in self.folded:
            each.check()
        for each in self.folded:
            each.undo()
        for parameter in self.frozen:
            parameter.requires_grad_(True)


@dataclass
class Folded:
    """One weight that holds an update."""

    path: str
    owner: nn.Module  # whose update it is: its `merged` is the weight without, `partly` see there
    bases: Sequence[nn.Module]  # that share the weight
    stored: nn.Parameter
    version: int

    def check(self) -> None:
        """Module methods reach the merged weight alone: values loaded into it must not be lost."""
        for base in self.bases:
            self._check(base._parameters["weight"])

    def _check(self, now: nn.Parameter | None) -> None:
        if now is not None and now is not self.stored and self._has_moved(now):
            return
        if now is not self.stored or now._version != self.version:
            raise RuntimeError(
                f"unmerge: the merged weight of {self.path} was written since merge; load weights "
                "into the unmerged model"
            )

    def _has_moved(self, now: Tensor) -> bool:
        """Whether another object holds the same values, moved or converted: the original follows.
        A shard or an empty tensor is not compared."""
        stored = self.stored.detach()
        if stored.is_meta or now.is_meta or type(now.data) is not Tensor:
            return now._version == 0
        return now.shape == stored.shape and torch.equal(now, stored.to(now))

    def undo(self) -> None:
        original: nn.Parameter = self.owner.__dict__["merged"]
        now = self.bases[0]._parameters["weight"]
        assert now is not None
        if (now.dtype, now.device) != (original.dtype, original.device):
            original.data = original.data.to(now)  # where `.to` brought the model meanwhile
        for base in self.bases:
            base._parameters["weight"] = original
        self.owner.__dict__.update(merged=None, partly=False)


@torch.no_grad()
def merge(method: Method, wrappers: Sequence[tuple[str, AdaptedLinear]]) -> Merged:
    """Folds what can be folded and returns the report with the way back."""
    merged = Merged()
    kept = merged.report.kept
    folded_from: set[nn.Module] = set()
    kept_from: set[nn.Module] = set()
    units: dict[int, list[tuple[str, AdaptedLinear]]] = {}
    for path, wrapper in wrappers:
        units.setdefault(id(wrapper.unit()), []).append((path, wrapper))
    for members in units.values():
        reason = next((why for _, w in members if (why := why_not_readable(w.base))), "")
        deltas = []
        for _, wrapper in members:
            weight = wrapper.base._parameters.get("weight")
            dtype = torch.float32 if weight is None else wide_dtype(weight.dtype)
            delta = reason or wrapper.delta(dtype)
            if isinstance(delta, str):
                reason = delta
                break
            deltas.append(delta)
        used = {wrapper.used() for _, wrapper in members}
        (kept_from if reason else folded_from).update(used)
        if reason:
            kept.update(dict.fromkeys((path for path, _ in members), reason))
            continue
        for (path, wrapper), delta in zip(members, deltas, strict=True):
            merged.fold(path, wrapper, delta)
    for module in folded_from - kept_from:
        merged.freeze(module.parameters())
    kept.update(method.kept())
    return merged


def leave_merged_out(adapter: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A checkpoint of a merged model is that of the merged weights: with the adapter beside them it
    would be applied twice."""
    if _is_merged(adapter) and not prefix.startswith(ALL):
        for name in [name for name in state if name.startswith(prefix)]:
            del state[name]


def need_no_merged(adapter: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """And such a checkpoint is all that a merged model loads: the adapter stays."""
    if _is_merged(adapter) and not any(name.startswith(prefix) for name in state):
        own = adapter.state_dict(prefix=ALL, keep_vars=True)
        state.update((prefix + name.removeprefix(ALL), value) for name, value in own.items())


def need_all(adapter: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """A Trainer whose checkpoints are the adapter's loads whatever fits; what does not is an error
    all the same."""
    handle = adapter.__dict__.get(HANDLE)
    if handle is None or not handle.only_adapter:
        return
    errors: list[str] = rest[-1]
    got = {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    want = {name.removeprefix(ALL) for name in adapter.state_dict(prefix=ALL)}
    if got and got != want:
        differ = sorted(got ^ want)
        errors.append(
            f"{NAME}: want the tensors of the adapter that is active, got others: {differ[0]} and "
            f"{len(differ) - 1} more differ"
        )


def _is_merged(adapter: nn.Module) -> bool:
    handle = adapter.__dict__.get(HANDLE)
    merged = None if handle is None else handle._merged
    return merged is not None and merged.is_whole


def _norm(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t))
