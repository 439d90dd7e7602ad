"""ModeApproximation: initialisation, the formula for both cores, refusals, compile."""

from __future__ import annotations

import math

import pytest
import torch

from petal_kernels.nn import ModeApproximation, ScaleShift, batch_context

CORES = ("cp", "tucker")


def _random(core: str, **values: object) -> ModeApproximation:
    torch.manual_seed(0)
    module = ModeApproximation(7, 5, 3, 4, core=core, **values)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def _matrix(module: ModeApproximation, k: int) -> torch.Tensor:
    """dW_k = s V M_k^T U, term by term."""
    if module.core_kind == "cp":
        middle = torch.diag(module.core * module.modes[k])
    else:
        middle = torch.einsum("abc,c->ab", module.core, module.modes[k])
    return module.scale * module.up @ middle.T @ module.down


@pytest.mark.parametrize("core", CORES)
def test_initial_values(core: str) -> None:
    torch.manual_seed(0)
    module = ModeApproximation(96, 48, 16, 30, core=core)
    assert module.down.shape == (16, 96)
    assert module.up.shape == (48, 16)
    assert module.modes.shape == (30, 16)
    assert not module.up.any()
    bounds = {"down": 1 / math.sqrt(96), "modes": math.sqrt(6 / 17)}
    if core == "tucker":
        assert module.core.shape == (16, 16, 16)
        bounds["core"] = math.sqrt(3) / 16
    else:
        assert torch.equal(module.core, torch.ones(16))
    for name, bound in bounds.items():
        largest = float(getattr(module, name).detach().abs().max())
        assert 0.9 * bound < largest <= bound, name
    assert {p.dtype for p in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("core", CORES)
def test_it_is_the_formula(core: str) -> None:
    module = _random(core, scale=0.5).double()
    x = torch.randn(2, 6, 7, dtype=torch.float64)
    base = [torch.randn(2, 6, 5, dtype=torch.float64) for _ in range(2)]
    outs = module(x, [3, 1], base=base)
    for out, start, k in zip(outs, base, (3, 1), strict=True):
        torch.testing.assert_close(out, start + x @ _matrix(module, k).T, rtol=0, atol=1e-12)
    assert len(module(x)) == 4
    for k, p in enumerate(module.contract(slice(1, 3)), 1):
        torch.testing.assert_close(p @ module.down, _matrix(module, k), rtol=0, atol=1e-12)


@pytest.mark.parametrize("core", CORES)
def test_gradients_are_those_of_the_formula(core: str) -> None:
    module = _random(core, scale=0.5).double()
    x = torch.randn(6, 7, dtype=torch.float64)
    runs = []
    for form in (lambda: module(x), lambda: [x @ _matrix(module, k).T for k in range(4)]):
        module.zero_grad()
        sum((out**2).sum() * (k + 1) for k, out in enumerate(form())).backward()
        runs.append([p.grad.clone() for p in module.parameters()])  # type: ignore[union-attr]
    for got, want in zip(*runs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_dropout_acts_in_training_only() -> None:
    module = _random("cp", dropout=0.5)
    x = torch.randn(64, 7)
    assert not torch.equal(module(x)[0], module(x)[0])
    module.eval()
    assert torch.equal(module(x)[0], module(x)[0])


@pytest.mark.parametrize("core", CORES)
def test_compiles_without_a_graph_break(core: str) -> None:
    torch._dynamo.reset()
    module = _random(core)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 7)
    grads = []
    for run in (module, compiled):
        module.zero_grad()
        outs = run(x)
        sum(out.square().sum() for out in outs).backward()
        grads.append([p.grad.clone() for p in module.parameters()])  # type: ignore[union-attr]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "r: want an integer >= 1, got 0"),
        ({"in_features": 0}, "in_features: want an integer >= 1, got 0"),
        ({"core": "diag"}, "core: want one of .*, got 'diag'"),
        ({"dropout": 1.0}, "dropout: want 0 <= dropout < 1, got 1.0"),
    ],
    ids=str,
)
def test_refusals(values: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"in_features": 4, "out_features": 4, "r": 2, "n_modes": 1}
    with pytest.raises(ValueError, match=message):
        ModeApproximation(**{**arguments, **values})  # type: ignore[arg-type]


def test_scale_shift_is_its_formula() -> None:
    torch.manual_seed(0)
    pair = ScaleShift(6).double()
    assert 0 < float(pair.scale.detach().abs().max()) < 0.0002 * 6
    y, a = (torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    runs = []
    for form in (lambda: pair(y, a), lambda: y + 0.1 * (a * pair.scale + pair.shift)):
        for tensor in (y, a, pair.scale, pair.shift):
            tensor.grad = None
        out = form()
        out.square().sum().backward()
        runs.append([out, *(t.grad for t in (y, a, pair.scale, pair.shift))])
    for got, want in zip(*runs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="features: want an integer >= 1, got 0"):
        ScaleShift(0)


def test_batch_context_touches_the_first_token_only() -> None:
    c, a = torch.randn(3, 4, 5), torch.randn(3, 6, 5)
    kept = c.clone()
    out = batch_context(c, a)
    assert torch.equal(c, kept)
    assert torch.equal(out[:, 1:], c[:, 1:])
    torch.testing.assert_close(out[:, 0], c[:, 0] + 0.1 * a[:, 0].mean(0))
