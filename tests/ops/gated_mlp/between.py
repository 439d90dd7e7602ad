"""What lies between the linears, on one backend by itself: inputs, every result, distances."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from petal_kernels.ops.gated_mlp.arguments import Call, Product

DROPOUT, RNG = 0.3, torch.tensor([5, 6])


class Sizes(NamedTuple):
    """Rows, width between the linears, rank of the last one's update."""

    rows: int
    width: int
    rank: int


def results(
    impl: ModuleType,
    sizes: Sizes,
    dtype: torch.dtype = torch.float32,
    name: str = "silu",
    gated: bool = True,
    exact: bool = False,
    pad: int = 0,
) -> dict[str, Tensor]:
    """Everything there is to compute, of numbers that ``dtype`` holds; rows ``pad`` further apart,
    with NaN between them."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        t = torch.randn(shape, generator=generator).to(torch.float64 if exact else dtype)
        wide = t.new_full((shape[0], shape[1] + pad), float("nan"))
        wide[:, : shape[1]] = t.to(dtype)
        return wide[:, : shape[1]]

    def again(t: Tensor) -> Tensor:
        return t.new_empty(t.shape[0], t.stride(0))[:, : t.shape[1]].copy_(t)

    n, f, r = sizes
    call = Call(draw(n, f), draw(n, f) if gated else None, name)
    dp, dh, down = draw(n, f), draw(n, r), draw(r, f)
    product = Product(dh, down if exact else down.float(), RNG, DROPOUT)
    kept = {"p": impl.forward(call)}
    dg = again(dp)
    found = impl.backward(call, dg, product)
    kept |= {"g": dg, "down": found.down}
    if gated:
        kept["u"] = found.u
    # What is not wanted changes no bit of the rest.
    alone = impl.backward(call, None, product)
    assert torch.equal(alone.down, found.down)
    assert alone.u is None
    dg = again(dp)
    rows = impl.backward(call, dg, None)
    assert rows.down is None
    assert torch.equal(dg, kept["g"])
    assert rows.u is None if not gated else torch.equal(rows.u, found.u)
    return kept


def apart(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference of each result, as a share of its largest element."""
    assert got.keys() == want.keys()
    return {
        part: float((got[part].double() - t.double()).abs().max() / t.double().abs().max())
        for part, t in want.items()
    }


def as_torch_where_not_finite(impl: ModuleType, plain: ModuleType, name: str) -> None:
    """Infinities and NaN come out where torch's do. -inf left out: its own silu of it is NaN, now
    and then."""
    g = torch.tensor([[float("inf"), float("nan"), 0.0, 88.0, -88.0, 200.0, -200.0, 1e-30]])
    call = Call(g, torch.full((1, 8), 2.0), name)
    found = []
    for each in (impl, plain):
        dg = torch.ones(1, 8)
        du = each.backward(call, dg, None).u
        found.append((each.forward(call), dg, du))
    for a, b in zip(*found, strict=True):
        finite = b.isfinite()
        torch.testing.assert_close(a[finite], b[finite], rtol=1e-5, atol=1e-35)
        assert not a.isfinite()[b.isnan()].any()
