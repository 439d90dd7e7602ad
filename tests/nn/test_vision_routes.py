"""Routes that join as many vision tokens as there are of text, and what is refused there."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels.nn import GatedAdapter, RoutedLoRALinear

B, L, D, R = 3, 5, 12, 4
JOINED: dict[tuple[str, str], Any] = {
    ("xt", "paper"): lambda z, v: z @ z.mT @ v,
    ("xt", "release"): lambda z, v: z @ z.mT @ v,
    ("add", "release"): lambda z, v: z + v,
    ("mul", "release"): lambda z, v: z * v,
}
EVERY = pytest.mark.parametrize(("route", "variant"), JOINED)


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def filled(module: nn.Module) -> Any:
    module = module.double()
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(draw(*p.shape, seed=i + 5))
    return module


def same(got: Tensor, want: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(got, want)
    dout = draw(*got.shape, seed=3)
    for a, b in zip(
        torch.autograd.grad(got, inputs, dout), torch.autograd.grad(want, inputs, dout), strict=True
    ):
        torch.testing.assert_close(a, b)


@EVERY
@pytest.mark.parametrize("add_input", [True, False])
@pytest.mark.parametrize("beams", [1, 2])
def test_adapters_join_token_by_token(
    route: str, variant: str, add_input: bool, beams: int
) -> None:
    m = filled(GatedAdapter(D, R, route=route, variant=variant, add_input=add_input, scale=0.6))
    h, v = draw(B * beams, L, D, seed=1).requires_grad_(), draw(B, L, D, seed=2).requires_grad_()
    z, u = F.linear(h, m.down, m.down_bias), F.linear(v, m.down, m.down_bias)
    q = JOINED[route, variant](z, u.repeat_interleave(beams, 0))
    y = F.linear(F.gelu(q, approximate="tanh"), m.up, m.up_bias)
    want = 0.6 * (h + y if add_input else y)
    same(m(h, vision=m.project(v)), want, [h, v, *m.parameters()])


@EVERY
@pytest.mark.parametrize("groups", ["separate", "merged"])
def test_updates_join_token_by_token(route: str, variant: str, groups: str) -> None:
    base = nn.Linear(D, 3 * D).double()
    m = filled(
        RoutedLoRALinear(
            base, R, route, parts=3, targets=(0, 2), groups=groups, variant=variant, own_base=False
        )
    )
    x, v = draw(B, L, D, seed=1).requires_grad_(), draw(B, L, D, seed=2).requires_grad_()
    z, u = F.linear(x, m.down), F.linear(v, m.down)
    if groups == "merged":
        a, c = JOINED[route, variant](z, u).split(R, -1)
    else:
        pairs = zip(z.split(R, -1), u.split(R, -1), strict=True)
        a, c = (JOINED[route, variant](*pair) for pair in pairs)
    up = m.up
    update = torch.cat((a @ up[0].mT, torch.zeros(B, L, D).double(), c @ up[1].mT), -1)
    same(m(x, m.project(v)), base(x) + update, [x, v, m.down, m.up])


@pytest.mark.parametrize("route", ["add", "mul", "expand"])
def test_of_one_vision_token_both_variants_are_one(route: str) -> None:
    h, v = draw(B, L, D, seed=1), draw(B, 1, D, seed=2)
    paper, release = (
        filled(GatedAdapter(D, R, route=route, variant=variant)) for variant in ("paper", "release")
    )
    assert torch.equal(paper(h, vision=paper.project(v)), release(h, vision=release.project(v)))


@pytest.mark.parametrize(
    ("route", "variant", "tokens", "wanted"),
    [
        ("xt", "paper", 1, "5"),
        ("xt", "release", 4, "5"),
        ("add", "release", 3, "1 or 5"),
        ("mul", "release", 6, "1 or 5"),
        ("expand", "release", 5, "1"),
    ],
)
def test_other_numbers_of_tokens_are_refused(
    route: str, variant: str, tokens: int, wanted: str
) -> None:
    """Kind: features that are averaged in silence where the released code joins or fails."""
    h, v = draw(B, L, D, seed=1), draw(B, tokens, D, seed=2)
    message = re.escape(f"vision: want V = {wanted} tokens with route={route!r}")
    adapter = filled(GatedAdapter(D, R, route=route, variant=variant))
    update = filled(RoutedLoRALinear(nn.Linear(D, D), R, route, variant=variant))
    for module in (adapter, update):
        vision = module.project(v)
        with pytest.raises(ValueError, match=f"{message}.* for L = 5 .*, got {tokens}"):
            module(h, vision=vision)
    if route != "xt":
        with pytest.raises(ValueError, match=re.escape("vision: want V = 1 with route=")):
            pk.gated_bottleneck(
                h, adapter.down, adapter.up, route=route, variant=variant, vision=draw(B, tokens, R)
            )
