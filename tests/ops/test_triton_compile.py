"""Every shipped Triton configuration compiles for its architecture, without a GPU, and is worth
shipping.

No spill and no stack, shared memory within the architecture's limit, tensor cores in 16-bit kernels
and none in IEEE fp32 ones, no atomics. The full table is marked ``cross_compile``; a few forms
are always compiled.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.ops import triton_audit

pytest.importorskip("triton")
LOWRANK, MODE, GATED, DISPATCH = (f"petal_kernels.ops.{m}" for m in triton_audit.MODULES)


def check(reports: list[dict[str, Any]]) -> None:
    assert reports, "no configuration matches"
    for r in reports:
        label = f"{r['name']} sm_{r['arch']}: {r}"
        assert r["stack"] == 0, label
        assert r["spills"] == 0, label
        assert r["shared"] <= triton_audit.SHARED_LIMIT[r["arch"]], label
        assert (r["tensor_cores"] > 0) == r["wants_tensor_cores"], label
        assert r["atomics"] == 0, label


@pytest.mark.parametrize(
    ("module", "pattern", "arch"),
    [
        (LOWRANK, "^expand bf16 r64 large has_base.drop_h$", 90),
        (MODE, "^fwd fp32 fold$", 80),
        (GATED, "^rows bf16 r128 large_gated large$", 90),
        (DISPATCH, "^fwd bf16 r64 large topk$", 90),
    ],
)
def test_one_form(module: str, pattern: str, arch: int) -> None:
    check(triton_audit.in_subprocess("compile", module, pattern, str(arch)))


@pytest.mark.cross_compile
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(
    ("module", "pattern"),
    [(LOWRANK, f"^{k} ") for k in ("shrink", "expand", "dh", "tn", "gemm_ext", "dx", "reduce")]
    + [(MODE, "^(fwd|bwd|sum)"), (MODE, "^cp")]
    + [(GATED, f"^{k} {e}") for k in ("fwd", "rows", "weights") for e in ("bf16", "fp32")]
    + [(GATED, "^reduce")]
    + [(DISPATCH, f"^{k}") for k in ("(route|shrink|slots|reduce)", "fwd", "rows", "weights")],
)
def test_every_form(module: str, pattern: str, arch: int) -> None:
    check(triton_audit.in_subprocess("compile", module, pattern, str(arch)))
