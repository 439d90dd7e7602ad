"""Every shipped Triton configuration compiles for its architecture, without a GPU, and is worth
shipping.

No spill and no stack, shared memory within the architecture's limit, tensor cores in 16-bit kernels
and none in IEEE fp32 ones, no atomics. The full table is marked ``cross_compile``; one form of each
operator is always compiled.
"""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest

from tests.ops import folders, triton_audit

pytest.importorskip("triton")

# Of an operator that is not here, the first form of its table.
ALWAYS = {
    "lowrank_linear": ("expand bf16 r64 large has_base+dropout", 90),
    "mode_contract": ("fwd fp32 fold", 80),
    "gated_bottleneck": ("rows bf16 r128 large_gated large", 90),
    "gated_mlp": ("down bf16 r64 silu no_rng", 80),
    "expert_dispatch": ("fwd bf16 r64 large topk", 90),
}
FORMS = {name: triton_audit.shipped_configs(name) for name in triton_audit.OPERATORS}
KERNELS = sorted(
    {
        (name, f.name.split()[0], arch)
        for name, forms in FORMS.items()
        for f in forms
        for arch in f.archs
    }
)


def check(reports: list[dict[str, Any]]) -> None:
    assert reports, "no configuration matches"
    for r in reports:
        label = f"{r['name']} sm_{r['arch']}: {r}"
        assert r["stack"] == 0, label
        assert r["spills"] == 0, label
        assert r["shared"] <= triton_audit.SHARED_LIMIT[r["arch"]], label
        assert (r["tensor_cores"] > 0) == r["wants_tensor_cores"], label
        assert r["atomics"] == 0, label


@pytest.mark.parametrize("operator", triton_audit.OPERATORS)
def test_one_form(operator: str) -> None:
    first = FORMS[operator][0]
    form, arch = ALWAYS.get(operator, (first.name, first.archs[0]))
    check(triton_audit.in_subprocess("compile", operator, f"^{re.escape(form)}$", str(arch)))


@pytest.mark.cross_compile
@pytest.mark.parametrize(("operator", "kernel", "arch"), KERNELS)
def test_every_form(operator: str, kernel: str, arch: int) -> None:
    check(triton_audit.in_subprocess("compile", operator, rf"^{kernel}\b", str(arch)))


@pytest.mark.parametrize("operator", folders.names("triton_impl"))
def test_every_kernel_is_in_the_table(operator: str) -> None:
    """What no form names is compiled by nobody here."""
    kernels = {
        node.name
        for path in sorted((folders.OPS / operator).glob("triton_*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    assert kernels == {form.kernel.fn.__name__ for form in FORMS[operator]}
    assert {arch for form in FORMS[operator] for arch in form.archs} == {80, 90, 100}
