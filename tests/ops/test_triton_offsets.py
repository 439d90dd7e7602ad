"""No Triton kernel forms an address from a 32-bit product: tensors may exceed 2^31 elements."""

from __future__ import annotations

import pytest

from tests.ops import triton_audit

pytest.importorskip("triton")

# A selection where there are many forms; of an operator that is not here, all.
SOME = {
    "lowrank_linear": "r64(x3)? (large|fp32)|reduce",
    "gated_bottleneck": "r128 (large|fp32)|reduce",
    "expert_dispatch": "r64 (large|fp32)|reduce",
}


@pytest.mark.parametrize("operator", triton_audit.OPERATORS)
def test_addresses_are_64_bit(operator: str) -> None:
    """The IR of one architecture's forms; the front end does not depend on the architecture."""
    pattern = SOME.get(operator, ".")
    reports = triton_audit.in_subprocess("offsets", operator, pattern, "80")
    assert len(reports) > 10
    narrow = {r["name"]: r["narrow"] for r in reports if r["narrow"]}
    assert not narrow


def test_lint_sees_a_narrow_product() -> None:
    """The lint on IR written here: a row times a stride in 32 bits, and the same in 64."""
    bad = """
    %c = arith.constant 64 : i32
    %pid = tt.get_program_id x : i32
    %row = arith.muli %pid, %c : i32
    %off = arith.muli %row, %stride : i32
    %sum = arith.addi %off, %row : i32
    %p = tt.addptr %x, %sum : !tt.ptr<f32>, i32
    """
    good = bad.replace("%off = arith.muli %row, %stride : i32", "%off = arith.muli %w, %v : i64")
    assert len(triton_audit.narrow_offsets(bad)) == 1
    assert not triton_audit.narrow_offsets(good)
