"""What every operator promises besides its values: opcheck, gradcheck, compile, saved bytes, no
host sync, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import petal_kernels as pk
from petal_kernels._runtime import philox
from petal_kernels._runtime.library import NAMESPACE
from tests.ops import discovery
from tests.ops.discovery import CASES, OPERATORS, SMALL, options, runnable, small


@pytest.mark.parametrize(("name", "case"), SMALL)
def test_gradcheck(name: str, case: Any) -> None:
    """Numerical derivatives in fp64: of the reference, and of the operator's own Function and
    backward."""
    op = OPERATORS[name]
    inputs = op.workload.make_inputs(case, torch.float64)
    names = discovery.trainable(op, case)
    inputs = discovery.require_grad(inputs, names)
    tensors = [t for _, t in discovery.leaves(inputs, names)]

    def scalar(function: Any) -> Any:
        def f(*_: Tensor) -> Tensor:
            out = function(**inputs)
            outs = [out] if isinstance(out, Tensor) else out
            return sum(
                (o.square().sum() * (i + 1) for i, o in enumerate(outs)),
                torch.zeros((), dtype=torch.float64),
            )

        return f

    for function in (op.reference.forward, op.public):
        assert torch.autograd.gradcheck(
            scalar(function), tensors, fast_mode=True, atol=1e-4, nondet_tol=0.0
        )


@pytest.mark.one_in(9)
@pytest.mark.parametrize(("name", "case"), SMALL)
def test_backward_twice_gives_equal_bits(name: str, case: Any) -> None:
    """A backward that wrote into what forward saved would differ the second time."""
    op = OPERATORS[name]
    names = discovery.trainable(op, case)
    for backend in runnable(op, case):
        inputs = discovery.require_grad(op.workload.make_inputs(case, torch.float32), names)
        out = op.public(**inputs, backend=backend)
        outs = [out] if isinstance(out, Tensor) else list(out)
        douts = [d.to(o) for d, o in zip(discovery.output_gradients(outs), outs, strict=True)]
        wanted = [t for _, t in discovery.leaves(inputs, names)]
        first = torch.autograd.grad(outs, wanted, douts, retain_graph=True)
        second = torch.autograd.grad(outs, wanted, douts)
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b), backend


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("name", "case"), SMALL)
def test_opcheck(name: str, case: Any) -> None:
    """Schema, fake and dispatch of the raw operators, on the arguments a real call gives them."""
    op = OPERATORS[name]
    calls: list[tuple[Any, tuple[Any, ...]]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            if func.namespace == NAMESPACE:
                calls.append((func, args))
            return func(*args, **kwargs or {})

    with Record():
        discovery.run(
            op.public, op.workload.make_inputs(case, torch.float32), discovery.trainable(op, case)
        )
    assert len(calls) >= 2
    for overload, args in calls:
        plain = tuple(
            [t.detach() if isinstance(t, Tensor) else t for t in a]
            if isinstance(a, (list, tuple))
            else a.detach()
            if isinstance(a, Tensor)
            else a
            for a in args
        )
        torch.library.opcheck(
            overload,
            plain,
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
        )


@pytest.mark.one_in(2)
@pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", list(OPERATORS))
def test_compile_fullgraph(name: str, mode: str) -> None:
    op = OPERATORS[name]
    chosen = small(op)[:4] if mode == "aot_eager" else small(op)[1:2]
    for case in chosen:
        names = discovery.trainable(op, case)
        inputs = op.workload.make_inputs(case, torch.float32)
        torch._dynamo.reset()
        compiled = torch.compile(op.public, fullgraph=True, backend=mode)
        eager = discovery.run(op.public, inputs, names)
        traced = discovery.run(compiled, inputs, names)
        for a, b in zip(eager[0], traced[0], strict=True):
            torch.testing.assert_close(a, b)
        for (label, a), (_, b) in zip(eager[1], traced[1], strict=True):
            torch.testing.assert_close(a, b, msg=discovery.labelled(label))


@pytest.mark.parametrize(("name", "case"), CASES)
def test_meta_shapes(name: str, case: Any) -> None:
    """On the meta device a call gives the shapes and dtypes of the real one, forward and
    backward."""
    op = OPERATORS[name]
    names = discovery.trainable(op, case)
    real_out, real_grads = discovery.run(
        op.public, op.workload.make_inputs(case, torch.float32), names
    )
    inputs = op.workload.make_inputs(case, torch.float32)
    inputs = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in inputs.items()}
    meta = discovery.map_tensors(inputs, lambda _, t: t.to("meta"))
    out, grads = discovery.run(op.public, meta, names)
    assert [(o.shape, o.dtype) for o in out] == [(o.shape, o.dtype) for o in real_out]
    assert [(n, g.shape, g.dtype) for n, g in grads] == [
        (n, g.shape, g.dtype) for n, g in real_grads
    ]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_saved_bytes(name: str, case: Any) -> None:
    """What is kept for backward is an exact integer: the inputs' storages aside, nothing of size N
    x d."""
    op = OPERATORS[name]
    if not hasattr(op.workload, "saved_bytes"):
        pytest.skip("saves its inputs only")
    names = discovery.trainable(op, case)
    inputs = discovery.require_grad(op.workload.make_inputs(case, torch.float32), names)
    inputs.pop("rng", None)  # drawn by the call, and counted
    everything = discovery.leaves(inputs, tuple(inputs))
    parameters = {
        t.untyped_storage().data_ptr()
        for label, t in everything
        if not label.startswith(getattr(op.workload, "ACTIVATIONS", ("x", "hidden")))
    }
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        pointer = t.untyped_storage().data_ptr()
        if pointer not in parameters and t.numel():
            seen[pointer] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        op.public(**inputs, **options(op, case))
    assert sum(seen.values()) == op.workload.saved_bytes(case, torch.float32)


@pytest.mark.one_in(9)
@pytest.mark.parametrize(("name", "case"), SMALL)
def test_autocast_does_not_reach_inside(name: str, case: Any) -> None:
    """The dtypes of the arguments decide: under autocast a call gives the very bits it gives
    outside."""
    op = OPERATORS[name]
    names = discovery.trainable(op, case)
    for backend in runnable(op, case):
        inputs = op.workload.make_inputs(case, torch.float32)
        want = discovery.run(op.public, inputs, names, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            got = discovery.run(op.public, inputs, names, backend=backend)
        for a, b in zip(want[0], got[0], strict=True):
            assert torch.equal(a, b), backend
        for (label, a), (_, b) in zip(want[1], got[1], strict=True):
            assert torch.equal(a, b), f"{backend} {label}"


@pytest.mark.one_in(9)
@pytest.mark.parametrize(("name", "case"), SMALL)
def test_no_host_synchronisation(name: str, case: Any) -> None:
    """No value of a tensor is read on the host: nothing that would stall a GPU or break a CUDA
    graph."""
    from torch.utils._python_dispatch import TorchDispatchMode

    forbidden = ("_local_scalar_dense", "nonzero", "item", "masked_select", "is_nonzero")
    found: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if any(f in str(func) for f in forbidden):
                found.append(str(func))
            return func(*args, **(kwargs or {}))

    op = OPERATORS[name]
    inputs = op.workload.make_inputs(case, torch.float32)
    inputs.pop("rng", None)
    for backend in runnable(op, case):
        with Watch():
            discovery.run(op.public, inputs, discovery.trainable(op, case), backend=backend)
    assert not found


def far_apart(t: Tensor) -> Tensor:
    """The same values with the rows of the first dim so far apart that the last begins beyond 2**31
    elements.

    The buffer is never touched between the rows, so the pages behind it are never allocated.
    """
    stride = 2**31 // (t.shape[0] - 1) + 1
    inner = t.contiguous().stride()[1:]
    buffer = torch.empty(stride * (t.shape[0] - 1) + t[0].numel(), dtype=t.dtype)
    view = buffer.as_strided(t.shape, (stride, *inner))
    return view.copy_(t)


@pytest.mark.parametrize("name", list(OPERATORS))
def test_offsets_beyond_32_bits(name: str) -> None:
    op = OPERATORS[name]
    case = op.workload.CASES[1]
    names = discovery.trainable(op, case)
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    deterministic.fill_uninitialized_memory = False
    try:
        for backend in runnable(op, case, torch.float16):
            inputs = op.workload.make_inputs(case, torch.float16)
            near = discovery.run(op.public, inputs, names, backend=backend)
            label = names[0]
            far = discovery.run(
                op.public, inputs | {label: far_apart(inputs[label])}, names, backend=backend
            )
            for a, b in zip(near[0], far[0], strict=True):
                assert torch.equal(a, b), backend
            for (leaf, a), (_, b) in zip(near[1], far[1], strict=True):
                assert torch.equal(a, b), f"{backend} {leaf}"
    finally:
        deterministic.fill_uninitialized_memory = fill


@pytest.mark.parametrize("name", list(OPERATORS))
def test_nan_and_infinity_propagate(name: str) -> None:
    op = OPERATORS[name]
    for value in (float("nan"), float("inf")):
        case = op.workload.CASES[0]
        for backend in runnable(op, case):
            inputs = op.workload.make_inputs(case, torch.float32)
            label, tensor = discovery.leaves(inputs, discovery.trainable(op, case))[0]
            tensor.view(-1)[0] = value
            out = op.public(**inputs, backend=backend)
            outs = [out] if isinstance(out, Tensor) else out
            assert not all(bool(torch.isfinite(o).all()) for o in outs), (
                f"{backend} hid {value} in {label}"
            )


@pytest.mark.parametrize("name", list(OPERATORS))
def test_an_unknown_or_unable_backend_raises(name: str) -> None:
    op = OPERATORS[name]
    case = op.workload.CASES[0]
    inputs = op.workload.make_inputs(case, torch.float32)
    with pytest.raises(
        ValueError, match=r"backend: want one of auto, cuda, triton, native, torch, got 'tirton'"
    ):
        op.public(**inputs, backend="tirton")
    with pytest.raises(
        RuntimeError,
        match=rf"{name}: backend 'cuda' cannot run here: needs tensors on cuda, got cpu",
    ):
        op.public(**inputs, backend="cuda")
    with pytest.raises(ValueError, match="backend: want one of"):
        pk.use_backend("gpu")


def test_use_backend_sets_and_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    from petal_kernels._runtime import backends

    assert backends.default_backend() == "auto"
    with pk.use_backend("torch"):
        assert backends.default_backend() == "torch"
    assert backends.default_backend() == "auto"
    monkeypatch.setenv("PETAL_BACKEND", "torch")
    assert backends.default_backend() == "torch"
    monkeypatch.setenv("PETAL_BACKEND", "abacus")
    with pytest.raises(ValueError, match="got 'abacus'"):
        backends.default_backend()


def test_explain_lists_every_backend_with_its_reasons() -> None:
    op = OPERATORS["lowrank_linear"]
    inputs = op.workload.make_inputs(op.workload.CASES[0], torch.float32)
    text = str(pk.explain(pk.lowrank_linear, **inputs))
    for word in (
        "cuda",
        "triton",
        "native",
        "torch",
        "needs tensors on cuda",
        "plan update",
        "plan merge",
    ):
        assert word in text
    with pytest.raises(TypeError, match=f"operator: want one of {', '.join(OPERATORS)}"):
        pk.explain(torch.add, torch.ones(1), torch.ones(1))


@pytest.mark.parametrize(("name", "case"), SMALL)
def test_explain_draws_nothing(name: str, case: Any) -> None:
    op = OPERATORS[name]
    inputs = op.workload.make_inputs(case, torch.float32)
    inputs.pop("rng", None)
    state = torch.get_rng_state()
    pk.explain(op.public, **inputs)
    assert torch.equal(state, torch.get_rng_state())


def test_dropout_seed_follows_the_default_generator() -> None:
    """manual_seed fixes the mask; two calls draw two masks; evaluation draws none."""
    x, u, p = torch.randn(64, 32), torch.randn(8, 32), [torch.randn(16, 8)]

    def call(**more: Any) -> Tensor:
        return pk.lowrank_linear(x, u, p, dropout=0.5, **more)[0]

    torch.manual_seed(3)
    a, b = call(), call()
    torch.manual_seed(3)
    assert torch.equal(a, call())
    assert not torch.equal(a, b)
    state = torch.get_rng_state()
    quiet = call(training=False)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(quiet, pk.lowrank_linear(x, u, p)[0])


def recovered_masks(backend: str, site: str, rng: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """Identity projections expose the masks in the outputs; their gradients expose them in
    backward."""
    n, r, k = 77, 24, 3
    eye = torch.eye(r, dtype=dtype)
    x = torch.ones(n, r, dtype=dtype, requires_grad=True)
    core = eye.expand(k, r, r).contiguous() if site == "mode" else None
    ys = pk.lowrank_linear(
        x,
        eye.clone(),
        [eye.clone() for _ in range(k)],
        core=core,
        dropout=p,
        dropout_at=site,
        rng=rng,
        backend=backend,
    )
    forward = torch.stack(list(ys))
    backward = torch.stack([torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for y in ys])
    assert torch.equal(forward, backward), "forward and backward drew different masks"
    return forward.detach()


@pytest.mark.parametrize("site", ["bottleneck", "input", "mode"])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_masks_equal_bit_for_bit_across_backends(site: str, p: float) -> None:
    rng = torch.tensor([-(2**61) + 12345, 2**33 + 7])
    op = OPERATORS["lowrank_linear"]
    for backend in runnable(op, op.workload.CASES[1]):
        for dtype in (torch.float32,) if backend == "triton" else (torch.float32, torch.bfloat16):
            streams = 1 if site == "input" else 3
            want = (
                philox.scaled_masks(rng, p, streams, 77, 24, torch.float32)
                .to(dtype)
                .expand(3, 77, 24)
            )
            got = recovered_masks(backend, site, rng, p, dtype)
            assert torch.equal(got, want), f"{backend} {dtype}"
