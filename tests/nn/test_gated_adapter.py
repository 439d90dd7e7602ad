"""The adapter modules against plain torch written from the papers; initialisations and dtypes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petal_kernels.nn import (
    GatedAdapter,
    RoutedAdapter,
    RoutedLoRALinear,
    ValueAdapter,
    VLAdapter,
)
from petal_kernels.nn.published import published_lora

B, L, D, R = 3, 11, 24, 8


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(module: nn.Module, seed: int = 5) -> Any:
    """Every parameter drawn, in fp64: initial zeros would hide mistakes."""
    module = module.double()
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(draw(*p.shape, seed=seed + i) / max(p.shape[-1], 1) ** 0.5)
    return module


def bottleneck(m: GatedAdapter, h: Tensor, vision: Tensor | None = None) -> Tensor:
    z = F.linear(h, m.down, m.down_bias)
    if vision is not None:
        v = F.linear(vision, m.down, m.down_bias)
        z = {
            "add": lambda: z + v,
            "mul": lambda: z * v,
            "expand": lambda: z @ v.expand(-1, R, -1),
            "gram": lambda: z @ v.transpose(1, 2) @ v,
        }[m.route]()
    act = {"gelu_tanh": lambda t: F.gelu(t, approximate="tanh"), "gelu": F.gelu}[m.activation]
    return F.linear(act(z), m.up, m.up_bias)


def gate_of(m: GatedAdapter, x: Tensor, h: Tensor) -> Tensor | float:
    if m.gate == "large":
        middle = F.gelu(F.linear(x, m.gate_down, m.gate_down_bias), approximate="tanh")
        return torch.sigmoid(F.linear(middle, m.gate_up, m.gate_up_bias))
    if m.gate == "middleX":
        return torch.sigmoid((x + h) @ m.gate_weight.unsqueeze(1) + m.gate_bias)
    if m.gate == "middleY":
        return 1 + torch.sigmoid(m.gate_weight)
    if m.gate == "small":
        both = torch.cat((x, h), -1) @ m.gate_weight.unsqueeze(1) + m.gate_bias
        return torch.sigmoid(both).mean(1, keepdim=True)
    return 1.0


@pytest.mark.parametrize("gate", ["none", "large", "middleX", "middleY", "small"])
@pytest.mark.parametrize("post", [False, True], ids=["alone", "with-norm"])
def test_gated_adapter_is_the_published_formula(gate: str, post: bool) -> None:
    m = filled(GatedAdapter(D, R, gate=gate, scale=0.3))
    h, x = draw(B, L, D, seed=1).requires_grad_(), draw(B, L, D, seed=2).requires_grad_()
    norm = filled(nn.LayerNorm(D), seed=50)
    more = {"residual": x, "norm": norm} if post else {}
    got = m(h, x, **more)
    want = 0.3 * gate_of(m, x, h) * (h + bottleneck(m, h))
    want = norm(x + want) if post else want
    torch.testing.assert_close(got, want)
    inputs = [h, *([x] if post or gate in ("large", "middleX", "small") else []), *m.parameters()]
    inputs += list(norm.parameters()) if post else []
    dout = draw(B, L, D, seed=3)
    for a, b in zip(
        torch.autograd.grad(got, inputs, dout), torch.autograd.grad(want, inputs, dout), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("route", ["add", "mul", "expand", "gram"])
def test_routed_adapter_is_the_published_formula(route: str) -> None:
    m = filled(RoutedAdapter(D, R, route, activation="gelu"))
    h, v = draw(B, L, D, seed=1).requires_grad_(), draw(B, 1, D, seed=2).requires_grad_()
    got, want = m(h, vision=m.project(v)), h + bottleneck(m, h, v)
    torch.testing.assert_close(got, want)
    inputs = [h, v, *m.parameters()]
    dout = draw(B, L, D, seed=3)
    for a, b in zip(
        torch.autograd.grad(got, inputs, dout), torch.autograd.grad(want, inputs, dout), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_an_adapter_may_replace_its_input() -> None:
    m = filled(RoutedAdapter(D, R, "mul", add_input=False))
    h, v = draw(B, L, D, seed=1), draw(B, 1, D, seed=2)
    torch.testing.assert_close(m(h, vision=m.project(v)), bottleneck(m, h, v))


def test_beams_share_their_samples_vision() -> None:
    m = filled(RoutedAdapter(D, R, "gram"))
    h, v = draw(2 * B, L, D, seed=1), draw(B, 4, D, seed=2)
    want = m(h, vision=m.project(v.repeat_interleave(2, 0)))
    assert torch.equal(m(h, vision=m.project(v)), want)
    with pytest.raises(ValueError, match="batch that divides the hidden states' 6, got 4"):
        m(h, vision=m.project(draw(4, 1, D)))
    with pytest.raises(TypeError, match="vision: want a Tensor"):
        m(h)


def test_value_adapters_share_one_projection() -> None:
    m = filled(ValueAdapter(D, 16, R, layers=3))
    e, values = draw(B, L, D, seed=1), draw(B, L, 16, seed=2)
    middles = m.project(e)
    assert len(middles) == 3
    for layer in range(3):
        rows = slice(layer * R, (layer + 1) * R)
        z = F.linear(e, m.down[rows], m.down_bias[rows])
        a = F.gelu(z, approximate="tanh")
        want = values + F.linear(a, m.up[layer], m.up_bias[layer])
        torch.testing.assert_close(m(values, middles[layer], layer), want)


@pytest.mark.parametrize("parts", [3, (D, 5, 7)])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("groups", ["separate", "merged"])
@pytest.mark.parametrize("route", ["none", "add", "mul", "expand", "gram"])
def test_routed_lora_on_fused_projections(
    route: str, groups: str, own: bool, parts: int | tuple[int, ...]
) -> None:
    widths = (D, D, D) if parts == 3 else (D, 5, 7)
    base = nn.Linear(D, sum(widths)).double()
    m = filled(
        RoutedLoRALinear(base, R, route, parts=parts, targets=(0, 2), groups=groups, alpha=4.0)
    )
    x, v = draw(B, L, D, seed=1).requires_grad_(), draw(B, 1, D, seed=2)
    # A hook keeps the base's output from being written into.
    hook = None if own else base.register_forward_hook(lambda module, args, out: None)
    got = m(x, None if route == "none" else m.project(v))
    q, k, last = F.linear(x, base.weight, base.bias).split(widths, -1)
    ups = m.up.unbind() if parts == 3 else m.up.split((D, 7))
    assert m.up.shape == ((2, D, R) if parts == 3 else (D + 7, R))
    assert hook is None or base._forward_hooks

    def routed(z: Tensor, u: Tensor) -> Tensor:
        return {
            "none": lambda: z,
            "add": lambda: z + u,
            "mul": lambda: z * u,
            "expand": lambda: z.sum(-1, keepdim=True) * u,
            "gram": lambda: (z * u).sum(-1, keepdim=True) * u,
        }[route]()

    z, u = F.linear(x, m.down), F.linear(v, m.down)
    if groups == "merged":
        a, c = routed(z, u).split(R, -1)
    else:
        a, c = (routed(p, s) for p, s in zip(z.split(R, -1), u.split(R, -1), strict=True))
    want = torch.cat((q + 0.5 * F.linear(a, ups[0]), k, last + 0.5 * F.linear(c, ups[1])), -1)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(published_lora(m, base(x), x, None if route == "none" else v), want)
    if route == "none":
        folded = base.weight + m.delta(torch.float64)
        torch.testing.assert_close(F.linear(x, folded, base.bias), want)
    inputs = [x, m.down, m.up]
    dout = draw(B, L, sum(widths), seed=3)
    for a, b in zip(
        torch.autograd.grad(got, inputs, dout), torch.autograd.grad(want, inputs, dout), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_identities_of_one_vision_token() -> None:
    """add is a per-sample bias, mul a diagonal, expand and gram are rank one."""
    base = nn.Linear(D, D, bias=False).double()
    x, v = draw(B, L, D, seed=1), draw(B, 1, D, seed=2)
    for route in ("add", "mul", "expand", "gram"):
        m = filled(RoutedLoRALinear(base, R, route))
        a, u = m.down, m.up[0]
        av = v @ a.t()
        want = {
            "add": lambda a=a, u=u, av=av: x @ a.t() @ u.t() + av @ u.t(),
            "mul": lambda a=a, u=u, av=av: x @ (a.t() * av[:, 0].unsqueeze(1)) @ u.t(),
            "expand": lambda a=a, u=u, av=av: (x @ a.sum(0)).unsqueeze(-1) * (av @ u.t()),
            "gram": lambda a=a, u=u, av=av: x @ (av @ a).transpose(1, 2) * (av @ u.t()),
        }[route]()
        torch.testing.assert_close(m(x, m.project(v)) - base(x), want)


def test_initialisations() -> None:
    torch.manual_seed(0)
    h, x = torch.randn(B, L, D), torch.randn(B, L, D)
    normal = GatedAdapter(D, R, gate="large")
    assert 0.01 < float(normal.up.std()) < 0.03
    assert float(normal.up_bias.abs().sum()) == 0.0
    torch.testing.assert_close(normal(h, x), 0.5 * h, atol=0.05, rtol=0.05)
    for gate in ("large", "middleX", "small"):
        zero = GatedAdapter(D, R, gate=gate, scale=0.3, init="zero")
        torch.testing.assert_close(zero(h, x), 0.15 * h)
        torch.testing.assert_close(
            GatedAdapter(D, R, gate=gate, scale=2.0, init="identity")(h, x), h
        )
    linear = GatedAdapter(D, R, gate="middleY", variant="release", scale=0.3, init="identity")
    torch.testing.assert_close(linear(h), h)
    torch.testing.assert_close(GatedAdapter(D, R, gate="middleY", scale=0.6, init="identity")(h), h)
    with pytest.raises(ValueError, match=r"init: 'identity' cannot be reached by gate 'large'"):
        GatedAdapter(D, R, gate="large", init="identity")
    lora = RoutedLoRALinear(nn.Linear(D, D), R)
    assert torch.equal(lora(h), lora.base(h))


def test_heads_are_one_bottleneck() -> None:
    """VL-PET's four down-projections, concatenated, are one: the published identity."""
    m = filled(GatedAdapter(D, R))
    h = draw(B, L, D, seed=1)
    heads = [F.linear(h, w, b) for w, b in zip(m.down.chunk(4), m.down_bias.chunk(4), strict=True)]
    a = F.gelu(torch.cat(heads, -1), approximate="tanh")
    torch.testing.assert_close(m(h), h + F.linear(a, m.up, m.up_bias))


@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes(autocast: bool) -> None:
    """fp32 parameters beside 16-bit rows, or fp32 rows under autocast: gradients are fp32."""
    m = GatedAdapter(D, R, gate="large")
    dtype = torch.float32 if autocast else torch.bfloat16
    h = torch.randn(B, L, D, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = m(h, h.detach())
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert h.grad is not None
    assert h.grad.dtype == dtype
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in m.parameters())


def test_bad_input() -> None:
    for make, message in (
        (lambda: GatedAdapter(D, 0), "r: want an integer >= 1, got 0"),
        (lambda: GatedAdapter(D, R, gate="huge"), "gate: want one of"),
        (lambda: VLAdapter(D, activation="tanh"), "activation: want one of"),
        (lambda: ValueAdapter(D, D, R, init="identity"), "init: want one of"),
        (lambda: RoutedLoRALinear(nn.Linear(D, D), R, parts=5), "parts: want a divisor of 24"),
        (lambda: RoutedLoRALinear(nn.Linear(D, D), R, parts=(9, 9)), "parts: want widths that"),
        (lambda: RoutedLoRALinear(nn.Linear(D, D), R, parts=(D, 0)), "parts: want an integer >= 1"),
        (lambda: RoutedLoRALinear(nn.Linear(D, D), R, targets=(1,)), "targets: want ascending"),
        (lambda: RoutedLoRALinear(nn.ReLU(), R), "base: want a linear layer"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="x: want a Tensor with gate='large', got None"):
        GatedAdapter(D, R, gate="large")(torch.zeros(B, L, D))


def test_modules_are_copied_and_saved_like_any_other() -> None:
    m = GatedAdapter(D, R, gate="small")
    twin = copy.deepcopy(m)
    twin.load_state_dict(m.state_dict())
    h, x = torch.randn(B, L, D), torch.randn(B, L, D)
    assert torch.equal(m(h, x), twin(h, x))
    assert sum(p.numel() for p in VLAdapter(768).parameters()) == 148_320
