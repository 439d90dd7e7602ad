"""Frozen norms of a model's layers, found by what they compute, and run by `frozen_norm`.

A norm is a module whose values are those of one of the operator's kinds, in float32 and, rounding
for rounding, in bfloat16: its name and its code do not matter. It keeps its input, the very tensor,
and a number or two of each row; where it is "folded" the adapted linears that read its output keep
that input too, in the output's place.

A call runs as the module's own forward where the operator would not give the same: under autocast,
in float64, in mixed dtypes, with a weight that is trained or sharded, in a graph that is being
compiled (which fuses norms itself), where the adapter is off or merged.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from petal_kernels._runtime.autocast import autocast_on
from petal_kernels.hf.context import now
from petal_kernels.hf.parts import Part, Run, own_class
from petal_kernels.hf.twins import twin_of
from petal_kernels.hf.walk import is_a
from petal_kernels.hf.wrappers import AdaptedLinear
from petal_kernels.nn.routed_lora import linear_features
from petal_kernels.ops.frozen_norm import frozen_norm
from petal_kernels.ops.frozen_norm.arguments import KINDS
from petal_kernels.ops.frozen_norm.reference import forward as reference

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SAME_BITS = 0.97  # of bfloat16 results: another order of a sum moves few, another rounding a third


class Norm(NamedTuple):
    """What a norm computes."""

    kind: str
    eps: str  # the name of the module's attribute


class Values(NamedTuple):
    """A module's input and output in one dtype."""

    x: Tensor
    y: Tensor
    weight: Tensor
    bias: Tensor | None


def norm_of(module: nn.Module) -> Norm | None:
    """The norm over its last dim that `module` is; None where it is anything else."""
    parameters = module._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is None or weight.dim() != 1 or weight.numel() < 2 or not set(parameters) <= _NAMES:
        return None
    if (bias is not None and bias.shape != weight.shape) or "forward" in module.__dict__:
        return None
    if any(True for each in (module.children, module.buffers) for _ in each()):
        return None
    numbers = {n: v for n, v in vars(module).items() if type(v) is float and 0 < v < 1}
    with _disable_current_modes(), torch.no_grad():
        try:
            seen = [
                _values(module, dtype, training)
                for dtype in (torch.float32, torch.bfloat16)
                for training in (False, True)
            ]
        except Exception:  # whatever it is, it is no norm
            return None
        for kind in KINDS if bias is None else KINDS[:1]:
            for name, eps in numbers.items():
                if all(_is(kind, eps, each) for each in seen):
                    return Norm(kind, name)
    return None


_NAMES = {"weight", "bias"}


def _values(module: nn.Module, dtype: torch.dtype, training: bool) -> Values:
    """Of rows of usual size, of rows so small that eps shows, and of large ones."""
    g = torch.Generator("cpu").manual_seed(0)
    held = {n: p for n, p in module._parameters.items() if p is not None}
    width = held["weight"].numel()
    own = {n: torch.randn(width, generator=g, device="cpu").to(dtype) for n in held}
    instead: dict[str, Any] = {n: nn.Parameter(t, requires_grad=False) for n, t in own.items()}
    instead |= {n: None for n in module._parameters if n not in held}
    twin = twin_of(module, _parameters=instead, training=training)
    scale = torch.tensor([1.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-5, 1e3], device="cpu")[:, None]
    x = ((torch.randn(7, width, generator=g, device="cpu") + 0.5) * scale).to(dtype)
    y = twin(x.clone())
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != dtype:
        raise TypeError("it gives something else")
    return Values(x, y, own["weight"], own.get("bias"))


def _is(kind: str, eps: float, seen: Values) -> bool:
    """Whether the values are those of this kind."""
    (want,) = reference(seen.x, seen.weight, seen.bias, kind=kind, eps=eps)
    if seen.x.dtype == torch.float32:
        return torch.allclose(seen.y, want, rtol=1e-4, atol=1e-5)
    near = torch.allclose(seen.y.float(), want.float(), rtol=2e-2, atol=2e-2)
    return near and float((seen.y == want).float().mean()) >= _SAME_BITS


class FrozenNorm(Part):
    """A norm that runs as the operator; `linears` are the adapted ones that it may feed."""

    needed = False

    def __init__(
        self, method: Any, norm: Norm, linears: Sequence[AdaptedLinear], recompute: bool
    ) -> None:
        self.method, self.norm, self.linears = method, norm, linears
        self.recompute = recompute

    def forward(self, module: nn.Module, run: Run, args: Any, kwargs: Any) -> Any:
        x = self._input(module, args, kwargs)
        return run(*args, **kwargs) if x is None else self.of(module, x)

    def of(self, module: nn.Module, x: Tensor) -> Tensor:
        """The module's output."""
        weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
        eps = getattr(module, self.norm.eps)
        kind, recompute = self.norm.kind, self.recompute
        return frozen_norm(x, weight, bias, kind=kind, eps=eps, recompute=recompute)

    @property
    def merged(self) -> bool:
        """Whether an update lies in the weight of a linear behind the norm."""
        return any(linear.merged is not None for linear in self.linears)

    def _input(self, module: nn.Module, args: Any, kwargs: Any) -> Tensor | None:
        """What the norm reads; None where its own forward must run."""
        given = (*args, *kwargs.values())
        if torch.compiler.is_compiling() or len(given) != 1 or not isinstance(given[0], Tensor):
            return None
        if not now(self.method).on or self.merged:
            return None
        (x,) = given
        return x if x.dtype in _DTYPES and _is_plain(x) and _fits(module, x) else None


def _fits(module: nn.Module, x: Tensor) -> bool:
    """Whether the operator takes the module's parameters for x."""
    if autocast_on(x.device.type):
        return False
    for parameter in module._parameters.values():
        if parameter is None:
            continue
        if not _is_plain(parameter) or parameter.shape != x.shape[-1:]:
            return False
        if (parameter.dtype, parameter.device) != (x.dtype, x.device):
            return False
        if parameter.requires_grad and torch.is_grad_enabled():
            return False
    return True


def _is_plain(t: Tensor) -> bool:
    """Whether it is a whole tensor of torch's own class, neither sharded nor anybody else's."""
    own = type(t) in (Tensor, nn.Parameter) or isinstance(t, FakeTensor)
    return own and not hasattr(t, "ds_id")  # DeepSpeed's part of one


class Site(NamedTuple):
    """A norm of a model, and the paths of the linears that it may feed."""

    module: nn.Module
    norm: Norm
    linears: list[str]


def norms_around(model: nn.Module, paths: Iterable[str]) -> dict[str, Site]:
    """The norms in front of the linears at `paths`, by their own paths: of each linear the norms
    of its width in the nearest module around it that holds one, up to its layer."""
    modules = dict(model.named_modules())
    widths = {path: linear_features(modules[path])[0] for path in paths}
    wanted, known = set(widths.values()), dict[Hashable, Norm | None]()
    norms: dict[str, Norm] = {}
    for path, module in modules.items():
        norm = _known(module, known) if width_of(module) in wanted else None
        if norm is not None:
            norms[path] = norm
    found: dict[str, Site] = {}
    for path, width in widths.items():
        for where in _blocks(path, modules):
            inside = [name for name in norms if not where or name.startswith(where + ".")]
            near = [name for name in inside if width_of(modules[name]) == width]
            for name in near:
                found.setdefault(name, Site(modules[name], norms[name], [])).linears.append(path)
            if near:
                break
    return found


def width_of(module: nn.Module) -> int:
    """Of the rows that a norm reads; 0 where it has no weight for them."""
    weight = module._parameters.get("weight")
    return 0 if weight is None or weight.dim() != 1 else weight.numel()


def _known(module: nn.Module, known: dict[Hashable, Norm | None]) -> Norm | None:
    """`norm_of`, once for modules of one class that are alike."""
    plain = {n: v for n, v in vars(module).items() if not n.startswith("_") and n != "training"}
    if not all(isinstance(v, (bool, int, float, str, tuple)) for v in plain.values()):
        return norm_of(module)
    names = tuple(n for n, p in module._parameters.items() if p is not None)
    key = (own_class(module), width_of(module), names, tuple(plain.items()))
    if key not in known:
        known[key] = norm_of(module)
    return known[key]


def _blocks(path: str, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """The paths of the modules around a linear, the nearest first: up to the layer that can be
    checkpointed, or where there is none to the last module that holds no list of modules."""
    around = []
    while path:
        path = path.rpartition(".")[0]
        around.append(path)
    layers = [where for where in around if is_a(modules[where], "GradientCheckpointingLayer")]
    for where in around:
        lists = any(isinstance(each, nn.ModuleList) for each in modules[where].modules())
        if not layers and lists:
            return
        yield where
        if where in layers:
            return
