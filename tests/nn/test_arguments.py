"""Every argument of every module's constructor, and of its forward, reaches what is computed."""

from __future__ import annotations

import inspect
import zlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels.nn import published
from petal_kernels.nn.kronecker import PHMWeight

D, OUT, R, B, L, E = 12, 8, 4, 3, 5, 4
# Where parameters lie and how they begin: the modules' own tests.
ELSEWHERE = {"self", "device", "dtype", "init", "own_base", "base", "rule"}


def draw(name: str, *shape: int) -> Tensor:
    g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=g, dtype=torch.float64)


def filled(module: nn.Module) -> nn.Module:
    """Every parameter drawn, by its name, in fp64."""
    module.double()
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(draw(name, *p.shape) / max(p.shape[-1], 1) ** 0.5)
    return module


def adapter(m: Any, fused: bool) -> Tensor:
    h = m.inputs["h"]
    x = None if m.gate in ("none", "middleY") else m.inputs["x" if m.gate != "large" else "wide"]
    x = x if x is None or m.gate != "large" else x[..., : m.gate_features]
    mask = m.inputs["mask"] if m.gate == "small" and m.variant == "paper" else None
    vision = m.inputs["vision"] if m.route != "none" else None
    if not fused:
        return published.published_adapter(m, h, x, vision=vision, mask=mask)
    vision = None if vision is None else m.project(vision)
    return m(h, x, vision=vision, mask=mask)


def rule(m: Any, fused: bool) -> Tensor:
    """Rows through the matrices that its rules and factors of three columns each make."""
    n, h = m.division, m.inputs["h"]
    weight = PHMWeight(n * 5, D, n, rule=m, count=m.count, dtype=torch.float64)
    (factor,) = weight.factors()
    with torch.no_grad():
        factor.copy_(draw("factor", *factor.shape))
    whole = weight() if fused else published.published_kronecker(weight)
    return h @ whole.flatten(0, -2).mT.to(h)


def lora(m: Any, fused: bool) -> Tensor:
    x = m.inputs["h"]
    vision = m.inputs["vision"] if m.route != "none" else None
    torch.manual_seed(3)
    if fused:
        return m(x, None if vision is None else m.project(vision))
    return published.published_lora(m, F.linear(x, m.base.weight, m.base.bias), x, vision)


def plain_lora(m: Any, fused: bool) -> Tensor:
    x = m.inputs["h"]
    torch.manual_seed(8)
    if fused:
        return m(x)
    a: dict[str, Any] = {
        "scale": m.scale,
        "dropout": m.dropout,
        "dropout_at": "input",
        "backend": "torch",
    }
    y = F.linear(x, m.base.weight, m.base.bias)
    return y + pk.lowrank_linear(x, m.down, [m.up], **a)[0]


def magnitude(m: Any, fused: bool) -> Tensor:
    x = m.inputs["h"]
    torch.manual_seed(8)
    return m(x) if fused else published.published_magnitude(m, m.base(x), x, m.base.bias)


def value(m: Any, fused: bool) -> Tensor:
    layer = m.layers - 1
    values, e = m.inputs["base"], m.inputs["h"]
    if fused:
        return m(values, m.project(e)[layer], layer)
    return published.published_value(m, values, e, layer)


def experts(m: Any, fused: bool) -> Tensor:
    domain = m.inputs["domain"] if m.gate == "domain" else None
    mask = m.inputs["mask"] if m.router_input == "pooled" else None
    h = m.inputs["h"]
    torch.manual_seed(4)
    if isinstance(m, pk.nn.InstructionExperts):
        return (m(h, 2, mask) if fused else published.published_instruction(m, h, 2, mask))[0]
    if fused:
        return m(h, mask=mask, domain=domain)[0]
    base = h if isinstance(m, pk.nn.ExpertAdapter) else m.base(h)
    return published.published_experts(m, h, base, keep=1.0, mix=m.scale, mask=mask, domain=domain)[
        0
    ]


def modes(m: Any, fused: bool) -> Tensor:
    h = m.inputs["h"]
    torch.manual_seed(5)
    if fused:
        return torch.cat(m(h))
    if m.core_kind == "cp":
        core = torch.diag_embed(m.core * m.modes)
    else:
        core = torch.einsum("abc,kc->kab", m.core, m.modes)
    ups = m.scale * m.up @ core.transpose(1, 2)
    return torch.cat(pk.lowrank_linear(h, m.down, ups, dropout=m.dropout, backend="torch"))


def information(m: Any, fused: bool) -> Tensor:
    image, queries = m.inputs["h"].float(), m.inputs["base"].float()
    labels = torch.tensor([[1, 2, -100], [3, 3, 5], [0, -100, -100]])
    m.float()
    torch.manual_seed(6)
    if fused:
        return m(image, queries, labels)
    x, z = image.mean(1), queries.mean(1)
    answers = m._answers(labels)
    other = answers.permuted(torch.randperm(B))
    drawn = torch.randint(B, (B,))
    y, y_other = answers.dense(m.club.outputs), other.dense(m.club.outputs)
    mine = m.mine.critic(torch.cat((x, z), 1)).mean() + torch.tensor(float(B)).log()
    mine = mine - torch.logsumexp(m.mine.critic(torch.cat((x, z[drawn]), 1)).squeeze(1), 0)
    total = m.weight * (m.club.dense(z, y, y_other) - m.beta * mine)
    return total.sum()


def shift(m: Any, fused: bool) -> Tensor:
    y, a = m.inputs["base"], m.inputs["base"].flip(0)
    return m(y, a) if fused else y + 0.1 * (a * m.scale + m.shift)


_LORA: dict[str, Any] = {
    "gate": ["mean", "domain"], "top_k": [2], "router_input": ["pooled"], "router_noise": [0.7],
    "shared_down": [True], "experts": [2], "r": [3],
}  # fmt: skip
_WIDTHS = {"image_features": D, "features": OUT, "vocabulary": 6}
_GATES = ["large", "middleX", "middleY", "small"]
_ROUTES = ["add", "mul", "expand", "gram", "gram_relu", "xt"]
_ACTS = ["identity", "relu", "gelu", "silu"]
# class: how it is run, what it is made with, and other values of each argument.
MODULES: dict[str, tuple[Any, dict[str, Any], dict[str, list[Any]]]] = {
    "GatedAdapter": (adapter, {"features": D, "r": R}, {
        "gate": _GATES, "activation": _ACTS, "scale": [-0.7], "add_input": [False], "r": [3],
        "route": _ROUTES, "gate_r": [3], "gate_features": [7], "variant": ["release"],
        "features": [D],
    }),
    "CompacterAdapter": (adapter, {"features": D, "r": R}, {
        "division": [4, 1], "factor_r": [1, 2], "gate": _GATES, "gate_r": [3], "scale": [-0.7],
        "activation": _ACTS, "variant": ["release"], "r": [6], "features": [D],
    }),
    "CompacterValueAdapter": (value, {"in_features": D, "out_features": OUT, "r": R}, {
        "layers": [3], "activation": _ACTS, "r": [6], "in_features": [D], "out_features": [OUT],
        "division": [4], "factor_r": [1], "scale": [-1.7],
    }),
    "PHMRule": (rule, {"division": 2}, {"division": [3], "count": [2]}),
    "VLAdapter": (adapter, {"features": D}, {"r": [3], "activation": _ACTS, "features": [D]}),
    "RoutedAdapter": (adapter, {"features": D, "r": R, "route": "gram"}, {
        "activation": _ACTS, "add_input": [False], "variant": ["release"], "r": [3],
        "features": [D], "route": _ROUTES[:3],
    }),
    "RoutedLoRALinear": (lora, {"r": R, "route": "gram", "parts": 2, "targets": (0, 1)}, {
        "r": [3], "route": ["none", *_ROUTES[:3], "xt"], "parts": [4], "targets": [(1,)],
        "groups": ["merged"], "alpha": [9.0], "dropout": [0.5], "variant": ["release"],
    }),
    "LoRALinear": (plain_lora, {"r": R}, {
        "r": [3], "alpha": [9.0], "rslora": [True], "dropout": [0.5],
    }),
    "DoRALinear": (magnitude, {"r": R}, {
        "r": [3], "alpha": [9.0], "rslora": [True], "dropout": [0.5],
    }),
    "ValueAdapter": (value, {"in_features": D, "out_features": OUT, "r": R}, {
        "layers": [3], "activation": _ACTS, "r": [3], "in_features": [D], "out_features": [OUT],
        "scale": [-1.7],
    }),
    "InstructionExperts": (experts, {"features": D, "experts": E, "r": R}, {
        **{k: v for k, v in _LORA.items() if k != "shared_down"}, "gate": ["mean"],
        "tokens": ["all"], "keep": [-0.3], "mix": [1.7], "features": [D],
    }),
    "ExpertAdapter": (experts, {"features": D, "experts": E, "r": R}, {
        **_LORA, "activation": _ACTS, "scale": [-1.7], "features": [D],
    }),
    "ExpertLoRALinear": (experts, {"experts": E, "r": R}, {**_LORA, "alpha": [9.0]}),
    "ModeApproximation": (modes, {"in_features": D, "out_features": OUT, "r": R, "n_modes": 3}, {
        "core": ["tucker"], "scale": [-1.7], "dropout": [0.5], "n_modes": [2], "r": [3],
        "in_features": [D], "out_features": [OUT],
    }),
    "MutualInformationLoss": (information, _WIDTHS, {
        "hidden": [7], "critic_hidden": [7], "weight": [-0.4], "beta": [1.7],
        "variant": ["release"], "image_features": [D], "features": [OUT], "vocabulary": [7],
    }),
    "ScaleShift": (shift, {"features": OUT}, {"features": [OUT]}),
}  # fmt: skip
# What an argument needs beside it to be seen.
BESIDE: dict[tuple[str, str], dict[str, Any]] = {
    ("GatedAdapter", "gate_r"): {"gate": "large"},
    ("CompacterAdapter", "gate_r"): {"gate": "large"},
    ("CompacterAdapter", "variant"): {"gate": "small"},
    ("GatedAdapter", "gate_features"): {"gate": "large"},
    ("GatedAdapter", "variant"): {"gate": "small", "route": "gram"},
    ("RoutedLoRALinear", "dropout"): {"route": "none"},
    ("RoutedLoRALinear", "parts"): {"targets": (0, 1)},
}
CASES = [
    pytest.param(name, argument, other, id=f"{name}-{argument}-{other}")
    for name, (_, _, others) in MODULES.items()
    for argument, values in others.items()
    for other in values
]


def made(name: str, arguments: dict[str, Any]) -> Any:
    cls = getattr(pk.nn, name)
    given = [nn.Linear(D, OUT).requires_grad_(False)] if "Linear" in name else []
    m: Any = filled(cls(*given, **arguments)).train()
    rows = {"h": D, "x": D, "wide": D, "vision": D, "base": OUT}
    m.inputs = {k: draw(k, B, L, w).requires_grad_() for k, w in rows.items()}
    m.inputs["mask"] = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    m.inputs["domain"] = torch.arange(B * L).view(B, L) % 2
    return m


def results(name: str, arguments: dict[str, Any], fused: bool) -> tuple[Tensor, list[Tensor]]:
    run, m = MODULES[name][0], made(name, arguments)
    out = run(m, fused)
    wanted = [*m.parameters(), *(t for t in m.inputs.values() if t.requires_grad)]
    wanted = [t for t in wanted if t.requires_grad]
    dout = draw("dout", *out.shape).to(out.dtype)
    grads = torch.autograd.grad(out, wanted, dout, allow_unused=True)
    pairs = zip(grads, wanted, strict=True)
    return out.detach(), [torch.zeros_like(t) if g is None else g for g, t in pairs]


@pytest.mark.parametrize(("name", "argument", "other"), CASES)
def test_an_argument_does_what_the_published_form_does(
    name: str, argument: str, other: Any
) -> None:
    default = MODULES[name][1] | BESIDE.get((name, argument), {})
    got, grads = results(name, default | {argument: other}, True)
    want, exact = results(name, default | {argument: other}, False)
    near: dict[str, Any] = {"rtol": 1e-7, "atol": 1e-9} if got.dtype == torch.float64 else {}
    torch.testing.assert_close(got, want, **near)
    for a, b in zip(grads, exact, strict=True):
        zero = (
            torch.zeros(()) if a is None and b is None else torch.zeros_like(b if a is None else a)
        )
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b, **near)
    if default.get(argument) != other:
        before, _ = results(name, default, False)
        assert before.shape != want.shape or not torch.allclose(before, want), "it changes nothing"


TYPED = [
    name
    for name in MODULES
    if "dtype" in inspect.signature(getattr(pk.nn, name).__init__).parameters
]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("kept", DTYPES, ids=str)
@pytest.mark.parametrize("name", TYPED)
def test_parameters_of_any_dtype_serve_activations_of_any(name: str, kept: torch.dtype) -> None:
    """Near the fp64 result of the very same numbers; gradients in the parameters' own dtype."""
    run, arguments, _ = MODULES[name]
    for seen in DTYPES:
        m, exact = made(name, arguments), made(name, arguments)
        for p, e in zip(m.parameters(), exact.parameters(), strict=True):
            coarse = p.data.to(kept).to(seen).double() if p.requires_grad else p.data.to(seen)
            e.data = coarse.double()
            p.data = p.data.to(kept if p.requires_grad else seen)
        for each in (m, exact):
            rows = {k: t.detach().to(seen) for k, t in each.inputs.items() if t.requires_grad}
            each.inputs |= {k: t if each is m else t.double() for k, t in rows.items()}
        out, want = run(m, True), run(exact, True)
        assert out.dtype == seen
        near = 30 * max(torch.finfo(t).eps for t in (seen, kept))
        torch.testing.assert_close(out.double(), want, rtol=near, atol=near)
        trained = [p for p in m.parameters() if p.requires_grad]
        for p, g in zip(trained, torch.autograd.grad(out.sum(), trained), strict=True):
            assert g.dtype == p.dtype == kept
            assert bool(torch.isfinite(g).all())


@pytest.mark.parametrize("name", pk.nn.__all__)
def test_every_module_and_argument_is_here(name: str) -> None:
    cls = getattr(pk.nn, name)
    if name == "FrozenLinear" or not inspect.isclass(cls):
        return  # no argument but the base
    accepted = set(inspect.signature(cls.__init__).parameters) - ELSEWHERE
    assert accepted == set(MODULES[name][2])


@pytest.mark.parametrize("eps", [1e-5, 0.75])
@pytest.mark.parametrize("residual", ["none", "given", "x"])
@pytest.mark.parametrize("gate", ["none", *_GATES])
def test_what_follows_the_gate(gate: str, residual: str, eps: float) -> None:
    """residual, dropout and norm of ``forward``: the norm's eps, too."""
    m = made("GatedAdapter", {"features": D, "r": R, "gate": gate, "scale": 0.6})
    h, x = m.inputs["h"], m.inputs["x"]
    norm: Any = filled(nn.LayerNorm(D, eps=eps))
    r = {"none": None, "given": m.inputs["wide"], "x": x}[residual]
    reads = None if gate in ("none", "middleY") and residual != "x" else x
    got = m(h, reads, residual=r, norm=norm, dropout=0.5, training=False)
    want = published.published_adapter(m, h, x)
    want = norm(want if r is None else r + want)
    inputs = [h, *m.parameters(), *norm.parameters()]
    dout = draw("dout", *got.shape)
    pairs = zip(
        (got, *torch.autograd.grad(got, inputs, dout)),
        (want, *torch.autograd.grad(want, inputs, dout)),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    for training in (None, True):
        torch.manual_seed(0)
        dropped = m(h, reads, residual=r, dropout=0.5, training=training)
        rest = dropped if r is None else dropped - r
        assert 0.3 < float((rest.abs() < 1e-12).double().mean()) < 0.7
