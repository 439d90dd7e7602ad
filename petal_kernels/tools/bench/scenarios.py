"""What is timed: for each scenario, one step per provider over the same inputs, and what it leaves
for backward.

A provider is a function of no arguments that runs one step and returns the gradients of the trained
inputs; the first provider of each scenario is the published eager form, the last ones are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import petal_kernels as pk

Step = Callable[[], Sequence[Tensor]]


@dataclass
class Scenario:
    """Providers over the same inputs; ``saved`` are forwards alone, to count what they keep for
    backward."""

    name: str
    providers: dict[str, Step]
    saved: dict[str, Callable[[], Any]] = field(default_factory=dict)
    parameters: Sequence[Tensor] = ()


@dataclass(frozen=True)
class PetalLayer:
    """q, k and v of one attention with released PETAL's Tucker core."""

    rows: int = 4096
    width: int = 768
    rank: int = 64
    dropout: float = 0.1
    dtype: torch.dtype = torch.float32
    outputs_given: bool = False


def _petal_tensors(case: PetalLayer, device: torch.device) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    d, r, n = case.width, case.rank, case.rows

    def randn(*shape: int, divisor: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        t = torch.randn(shape, generator=g) / divisor
        return t.to(dtype or case.dtype).to(device)

    tensors: dict[str, Any] = {
        "x": randn(n, d).requires_grad_(),
        "u": randn(r, d, divisor=d**0.5, dtype=torch.float32).requires_grad_(),
        "v": randn(d, r, divisor=r**0.5, dtype=torch.float32).requires_grad_(),
        "core": randn(r, r, r, divisor=r**0.5, dtype=torch.float32).requires_grad_(),
        "modes": randn(3, r, divisor=r**0.5, dtype=torch.float32).requires_grad_(),
        "weights": [randn(d, d, divisor=d**0.5) for _ in range(3)],
        "biases": [randn(d) for _ in range(3)],
        "dys": [randn(n, d) for _ in range(3)],
    }
    tensors["base"] = [
        F.linear(tensors["x"].detach(), w, b).requires_grad_()
        for w, b in zip(tensors["weights"], tensors["biases"], strict=True)
    ]
    return tensors


def petal_layer(case: PetalLayer, device: torch.device, compiled: bool = True) -> Scenario:
    """Forward and backward of q, k, v with the core contraction, dropout on, dx needed.

    ``published``: every mode contracts the core, drops out z, multiplies by M and V and adds, as
    released. ``eager``: contraction batched, V folded in, z shared, update by addmm. ``compile``:
    torch.compile of published.
    """
    t = _petal_tensors(case, device)
    p = case.dropout
    trained = [t[k] for k in ("x", "u", "v", "core", "modes")]
    if case.outputs_given:
        trained += t["base"]

    def bases() -> list[Tensor]:
        if case.outputs_given:
            return list(t["base"])
        return [F.linear(t["x"], w, b) for w, b in zip(t["weights"], t["biases"], strict=True)]

    def cast(parameter: Tensor) -> Tensor:
        return parameter.to(case.dtype)

    def published() -> list[Tensor]:
        ys = []
        for base, mode in zip(bases(), t["modes"], strict=True):
            m = cast((t["core"] @ mode.unsqueeze(1)).squeeze(-1))
            z = F.dropout(F.linear(t["x"], cast(t["u"])), p)
            ys.append(base + F.linear(z @ m, cast(t["v"])))
        return ys

    def eager() -> list[Tensor]:
        r = case.rank
        ms = (t["modes"] @ t["core"].view(r * r, r).t()).view(3, r, r)
        ups = cast(t["v"] @ ms.transpose(1, 2))
        h = F.linear(t["x"], cast(t["u"]))
        return [
            torch.addmm(base, F.dropout(h, p), up.t())
            for base, up in zip(bases(), ups.unbind(0), strict=True)
        ]

    def fused() -> list[Tensor]:
        ups = pk.mode_contract(t["core"], t["modes"], t["v"], dtype=case.dtype).unbind(0)
        given = (
            {"base": t["base"]}
            if case.outputs_given
            else {"weights": t["weights"], "biases": t["biases"]}
        )
        return list(pk.lowrank_linear(t["x"], t["u"], ups, dropout=p, **given))

    def step(forward: Callable[[], list[Tensor]]) -> Step:
        return lambda: torch.autograd.grad(forward(), trained, t["dys"])

    forwards: dict[str, Callable[[], list[Tensor]]] = {"published": published, "eager": eager}
    if compiled:
        forwards["compile"] = torch.compile(published)
    forwards["petal"] = fused
    part = "adapter part, base outputs given" if case.outputs_given else "layer"
    name = f"petal qkv {part}, N={case.rows} d={case.width} R={case.rank} {str(case.dtype)[6:]}"
    parameters = [t[k] for k in ("u", "v", "core", "modes")] + t["weights"] + t["biases"]
    return Scenario(name, {k: step(f) for k, f in forwards.items()}, dict(forwards), parameters)


def saved_bytes(forward: Callable[[], Any], parameters: Sequence[Tensor]) -> int:
    """Bytes of distinct storages kept for backward, the parameters' own excluded."""
    own = {t.untyped_storage().data_ptr() for t in parameters}
    seen: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = forward()
    del out
    return sum(seen.values())


def operator(
    name: str,
    case: Any,
    dtype: torch.dtype,
    device: torch.device,
    backends: Sequence[str],
    backward: bool = True,
) -> Scenario:
    """Forward (as in training) and backward of one operator at one of its workload's shapes."""
    import importlib

    workload = importlib.import_module(f"petal_kernels.ops.{name}.workload")
    public = getattr(pk, name)
    inputs = workload.make_inputs(case, dtype, device)
    names = [
        n
        for n in workload.DIFFERENTIABLE
        if n not in getattr(workload, "frozen", lambda _: ())(case)
    ]
    trained: list[Tensor] = []
    for n in names:
        values = inputs.get(n)
        for v in values if isinstance(values, (list, tuple)) else [values]:
            if isinstance(v, Tensor):
                trained.append(v.requires_grad_())
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        outs = workload.BASELINES["eager"](**{k: v for k, v in inputs.items() if k != "rng"})
    dys = [torch.randn(o.shape, generator=g).to(o) for o in outs]
    plain = {k: v for k, v in inputs.items() if k != "rng"}

    def step(forward: Callable[[], Any]) -> Step:
        def run() -> Sequence[Tensor]:
            out = forward()
            out = [out] if isinstance(out, Tensor) else list(out)
            if not backward:
                return out
            return torch.autograd.grad(out, trained, dys, allow_unused=True)

        return run

    others = getattr(workload, "optional_baselines", lambda *_: {})(case, device)
    forwards: dict[str, Callable[[], Any]] = {
        label: (lambda f=f: f(**plain)) for label, f in (workload.BASELINES | others).items()
    }
    torch._dynamo.reset()  # else the shapes before this one use up the limit of recompilations
    torch._dynamo.config.recompile_limit = 64  # a loop over experts compiles each on its own
    compiled = torch.compile(workload.BASELINES["published"], dynamic=False)
    forwards["compile"] = lambda: compiled(**plain)
    for backend in backends:
        forwards[f"petal {backend}"] = lambda b=backend: public(**plain, backend=b)
    label = f"{name} {case.name}" + ("" if backward else ", forward")
    return Scenario(label, {k: step(f) for k, f in forwards.items()})
