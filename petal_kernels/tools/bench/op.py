"""Scenarios of single operators: their workload's shapes, baselines and formulas."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import petal_kernels as pk
from petal_kernels.tools import operators
from petal_kernels.tools.bench import correctness
from petal_kernels.tools.bench.correctness import Errors, Results
from petal_kernels.tools.bench.fresh import Fresh
from petal_kernels.tools.bench.request import Request, RequestError, covered
from petal_kernels.tools.bench.scenarios import Check, Forward, Inputs, Provider, Scenario
from petal_kernels.tools.operators import Operator

QUICK_SHAPES = 2


def names() -> list[str]:
    """Every operator."""
    return [op.name for op in operators.operators()]


def operator(name: str) -> Operator:
    """The operator of this name."""
    return next(op for op in operators.operators() if op.name == name)


def cases(name: str, request: Request) -> list[tuple[Any, float | None, str]]:
    """(case, swept value, name of the shape) of everything that a run covers."""
    shapes = [s for s in operator(name).workload.SHAPES if request.matches(s.name)]
    shapes = [s for s in shapes if s.name == request.shape] or shapes
    return [
        (case, value, shape.name)
        for shape in (shapes[:QUICK_SHAPES] if request.quick else shapes)
        for case, value in covered(shape, request)
    ]


def run(
    forward: Forward,
    inputs: Inputs,
    leaves: Sequence[Tensor] | None = None,
    gradients: bool = True,
) -> Results:
    """Outputs and the gradients of everything trained; without gradients, as in inference."""
    with torch.set_grad_enabled(gradients):
        out = forward(**inputs.arguments)
    outs = [out] if isinstance(out, Tensor) else list(out)
    if not gradients:
        return outs, []
    wanted = list(inputs.leaves() if leaves is None else leaves)
    grads = torch.autograd.grad(outs, wanted, list(inputs.douts) or None, allow_unused=True)
    return [o.detach() for o in outs], grads


class Oracle:
    """fp64 and plain torch on the same inputs, computed when first asked for and again when the
    inputs have become others; `compare` is the rule."""

    def __init__(
        self,
        exact: Callable[[], Results],
        plain: Callable[[], Results],
        compare: Callable[[Results, Results, Results], Errors] = correctness.compare,
        fresh: Fresh | None = None,
    ) -> None:
        self.fresh = Fresh() if fresh is None else fresh
        self.compare = compare
        self._known = functools.cache(lambda turn: (exact(), plain()))

    def __call__(self, got: Callable[[bool], Results]) -> Check:
        """A provider's check; `got` is asked for gradients or not."""

        def check(gradients: bool = True) -> Errors:
            exact, plain = self._known(self.fresh.turn)
            if not gradients:
                exact, plain = (exact[0], []), (plain[0], [])
            return self.compare(got(gradients), exact, plain)

        return check


def backends(op: Operator, inputs: dict[str, Any], request: Request) -> tuple[list[str], str]:
    """The backends to time, and the one that `auto` takes. Raises RequestError for a named one that
    cannot run, with its reasons."""
    explained = pk.explain(op.public, **inputs)
    reasons = dict(explained.rows)
    if request.backends:
        chosen = [explained.backend if b == "auto" else b for b in request.backends]
        for backend in chosen:
            if why := reasons[backend]:
                raise RequestError(f"{op.name}: backend {backend!r} cannot run: {'; '.join(why)}")
        return list(dict.fromkeys(chosen)), explained.backend
    interpreted = request.device.type != "cuda"
    runs = [b for b, why in reasons.items() if not why and not (b == "triton" and interpreted)]
    return runs, explained.backend


def _inputs(op: Operator, case: Any, request: Request) -> tuple[Inputs, dict[str, Any]]:
    """The inputs as they are timed (each call draws its own mask), and with the generator's state,
    by which the reference drops out the same."""
    made = op.workload.make_inputs(case, request.dtype, request.device)
    inputs = Inputs(made, operators.trainable(op, case))
    with torch.no_grad():
        outs = op.workload.BASELINES["eager"](**{k: v for k, v in made.items() if k != "rng"})
    g = torch.Generator().manual_seed(1)
    inputs.douts = [torch.randn(o.shape, generator=g).to(o) for o in outs]
    return inputs.map(lambda t: t), made


def _floor(**given: Any) -> list[Tensor]:
    """The frozen linears alone, side by side; a workload's own `floor` where they are not."""
    weights = given["weights"]
    biases = given.get("biases") or [None] * len(weights)
    return [F.linear(given["x"], w, b) for w, b in zip(weights, biases, strict=True)]


def build(name: str, case: Any, request: Request, shape: str, value: float | None) -> Scenario:
    """One operator at one shape: baselines first, then every backend."""
    op = operator(name)
    load, reference = op.workload, op.reference.forward
    exactly, made = _inputs(op, case, request)
    timed = exactly.given(rng=None)
    dry = timed.given(dropout=0.0) if "dropout" in made else timed

    fresh = Fresh([*timed.leaves(), *_activations(op, timed), *timed.douts])

    def oracle(inputs: Inputs) -> Oracle:
        return Oracle(
            lambda: run(reference, inputs.map(Tensor.double)),
            lambda: run(reference, inputs),
            fresh=fresh,
        )

    within = oracle(exactly)
    # The authors' code is not everywhere what their papers say: a baseline may be either.
    variants = ["paper", "release"] if "variant" in made else []
    oracles = [oracle(dry.given(variant=v)) for v in variants] or [oracle(dry)]

    def without(forward: Forward) -> Check:
        checks = [o(functools.partial(_results, forward, dry)) for o in oracles]

        def check(gradients: bool = True) -> Errors:
            return min((c(gradients) for c in checks), key=lambda e: e.outputs)

        return check

    providers = _baselines(load, case, request, without)
    if made.get("weights") is not None and request.wants("base"):
        providers["base"] = Provider(getattr(load, "floor", _floor), floor=True)
    wanted, chosen = backends(op, made, request)
    for backend in wanted:
        forward = functools.partial(op.public, backend=backend)
        check = within(functools.partial(_results, forward, exactly))
        ours = Provider(forward, check=check, ours=True, chosen=backend == chosen)
        providers[f"petal {backend}"] = ours
    arguments = ["op", name, "--shape", shape]
    if value is not None:
        arguments += ["--sweep", str(request.sweep), "--values", str(int(value))]
    return Scenario(
        f"{name} {case.name}",
        timed,
        providers,
        arguments,
        load.bytes_moved(case, request.dtype),
        load.flops(case),
        _parameters(op, timed),
        value,
        [f"auto {pk.explain(op.public, **made).choice}"],
        fresh,
    )


def _baselines(
    load: Any, case: Any, request: Request, check: Callable[[Forward], Check]
) -> dict[str, Provider]:
    """The eager forms, other packages' and the compiled one, those that are asked for."""
    providers: dict[str, Provider] = {}
    others: dict[str, Forward] = getattr(load, "optional_baselines", lambda *_: {})(
        case, request.device
    )
    for label, forward in (load.BASELINES | others).items():
        if request.wants(label):
            providers[label] = Provider(forward, check=check(forward))
    if request.wants("compile"):
        torch._dynamo.reset()  # else the shapes before this one use up the limit of recompilations
        torch._dynamo.config.recompile_limit = 64  # a loop over experts compiles each on its own
        forward = torch.compile(load.BASELINES["published"], dynamic=False)
        providers["compile"] = Provider(forward, check=check(forward), compiled=True)
    return providers


def _results(forward: Forward, inputs: Inputs, gradients: bool) -> Results:
    return run(forward, inputs, gradients=gradients)


def _split(op: Operator, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    """Activations, and everything else."""
    rows = getattr(op.workload, "ACTIVATIONS", ("x", "hidden", "base"))
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name, value in inputs.arguments.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        found[name not in rows].extend(v for v in values if isinstance(v, Tensor))
    return found


def _activations(op: Operator, inputs: Inputs) -> list[Tensor]:
    return [t for t in _split(op, inputs)[0] if t.is_floating_point()]


def _parameters(op: Operator, inputs: Inputs) -> list[Tensor]:
    """Everything but activations: what a training keeps anyway."""
    return _split(op, inputs)[1]


def scenarios(wanted: Sequence[str], request: Request) -> Iterator[Callable[[], Scenario]]:
    """What builds each scenario, one at a time: their tensors are not alive together."""
    for name in wanted:
        for case, value, shape in cases(name, request):
            yield functools.partial(build, name, case, request, shape, value)
