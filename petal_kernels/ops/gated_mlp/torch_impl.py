"""What lies between the linears of ``gated_mlp``, on the torch backend: library calls, on every
device and dtype.

    forward   p = act(g) * u
    backward  du = act(g) * dp,  dg = act'(g) * (u * dp),  dA = dh^T (mask * p), p formed again

Numerics are torch's: act(g), p and u * dp are rounded to their dtype, dA is summed in the library's
product. In backward the buffers of act(g) and of dp become du and dg.
"""

from __future__ import annotations

from torch import Tensor

from petal_kernels._runtime import philox
from petal_kernels._runtime.numerics import activate, activate_backward
from petal_kernels.ops.gated_mlp.arguments import Call, Gradients, Product


def unsupported(call: Call) -> list[str]:
    """Runs everywhere."""
    return []


def forward(call: Call) -> Tensor:
    """p [N, F]."""
    a = activate(call.activation, call.g)
    if call.u is None:
        return a.clone() if a is call.g else a
    return a * call.u if a is call.g else a.mul_(call.u)


def _down(p: Tensor, of: Product) -> Tensor:
    if of.rng is not None:
        rows, width = p.shape
        p = p * philox.scaled_mask(of.rng, of.dropout, 0, rows, width, p.dtype)
    return (of.dh.t() @ p).to(of.down.dtype)


def backward(call: Call, dp: Tensor | None, product: Product | None) -> Gradients:
    """dg, in dp's place, and du where dp is given, dA where ``product`` is."""
    g, u, name = call
    a = activate(name, g)
    ddown = None
    if product is not None:
        ddown = _down(a if u is None else a * u, product)
    if dp is None:
        return Gradients(down=ddown)
    du = None
    if u is not None:
        du = a * dp if a is g else a.mul_(dp)
        dp.mul_(u)
    activate_backward(name, g, dp, inplace=True)
    return Gradients(du, ddown)
