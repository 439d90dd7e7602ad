"""What the general suite cannot see in ``mode_contract``'s Triton kernels: traffic, double writes,
program order, dtypes that differ.

Runs in the interpreter; numerics over the shape grid are in ``test_ops.py``.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from petal_kernels._runtime import device
from tests.ops import triton_audit

if device.triton_reason() is not None or torch.cuda.is_available():
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

from petal_kernels.ops.mode_contract import reference
from petal_kernels.ops.mode_contract import triton_impl as mode
from petal_kernels.ops.mode_contract.arguments import Call
from tests.ops.interpreted import clean, close, draw, expect

triton_audit.hasten_interpreter()

pytestmark = pytest.mark.usefixtures("poisoned")


def contraction(
    core: Tensor, modes: Tensor, up: Tensor | None, dtype: torch.dtype = torch.float32
) -> Call:
    return Call(core, modes, up, 0.5, dtype)


@pytest.mark.parametrize(
    ("fold", "k", "r", "o"), [(True, 70, 19, 140), (False, 70, 19, 19), (True, 5, 35, 20)]
)
def test_traffic(fold: bool, k: int, r: int, o: int) -> None:
    core, modes = draw(r, r, r), draw(k, r)
    up = draw(o, r) if fold else None
    out = k * r * (o if fold else r) * 4
    v = o * r * 4 if fold else 0
    with triton_audit.Audit() as audit:
        call = contraction(core, modes, up)
        mode.forward(call)
        mode.backward(call, draw(*call.shape), frozenset(("core", "modes", "up")))
    clean(audit)
    expect(audit, "_fwd", (r**3 + k * r) * 4 + v + out)
    part = r * -(-r // 32) * k * r * 4  # a share of every dp_k from each slab and b tile
    expect(audit, "bwd_slab", out + (2 * r**3 + k * r) * 4 + v + part)
    if fold:
        groups = audit.of("bwd_up")[0].grid[1]
        assert groups > 1
        expect(audit, "bwd_up", out + (r**3 + k * r) * 4 + groups * v)
        expect(audit, "bwd_sum", part + k * r * 4, groups * v + v)


def test_cp_traffic() -> None:
    k, r, o = 5, 35, 140
    core, modes, up = draw(r), draw(k, r), draw(o, r)
    with triton_audit.Audit() as audit:
        call = contraction(core, modes, up)
        mode.forward(call)
        mode.backward(call, draw(k, r, o), frozenset(("core", "modes", "up")))
    clean(audit)
    expect(audit, "cp_fwd", (r + k * r + o * r + k * r * o) * 4)
    backward_bytes = sum(launch.moved() for launch in audit.of("bwd"))
    stated = (2 * k * r * o + 2 * o * r + 3 * k * r + 3 * r) * 4 + 8 * k * r
    assert abs(backward_bytes - stated) <= 0.02 * stated


def everything() -> list[Tensor]:
    """Output and gradients of one odd problem."""
    core, modes, up = draw(19, 19, 19), draw(70, 19), draw(140, 19)
    call = contraction(core, modes, up)
    grads = mode.backward(call, draw(*call.shape), frozenset(("core", "modes", "up")))
    return [mode.forward(call), *[g for g in grads if g is not None]]


def test_program_order_changes_no_bit() -> None:
    first = everything()
    with triton_audit.Audit(reverse=True):
        second = everything()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("core_dims", [3, 1])
def test_dtypes(core_dims: int) -> None:
    """Output of another dtype than the parameters, and gradients that come back in it."""
    core, modes, up = draw(*[19] * core_dims), draw(70, 19), draw(140, 19)
    for store, given in ((torch.float16, torch.float32), (torch.float32, torch.float16)):
        c, p, v = core.to(given), modes.to(given), up.to(given)
        call = contraction(c, p, v, store)
        pt = mode.forward(call)
        want = reference.forward(c.double(), p.double(), v.double(), scale=0.5)[0]
        assert pt.dtype == store
        close(pt.transpose(1, 2), want, 6e-4 if store == torch.float16 else 2e-6)
        dout = draw(70, 19, 140).to(store)
        grads = mode.backward(call, dout, frozenset(("core", "modes", "up")))
        exact_grads = reference.backward(
            dout.double().transpose(1, 2), c.double(), p.double(), v.double(), scale=0.5
        )
        for name in ("core", "modes", "up"):
            g = getattr(grads, name)
            assert g is not None
            assert g.dtype == given
            close(g, exact_grads[name], 1e-3 if given == torch.float16 else 4e-6)


def test_reasons() -> None:
    bf16 = draw(4, 4).bfloat16()
    assert "bfloat16" in mode.unsupported(contraction(bf16, bf16, None))[0]
