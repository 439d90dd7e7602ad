"""Which plan is chosen where: by the cost model, with what this processor's library is good at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from petal_kernels._runtime import device
from petal_kernels.ops.lowrank_linear import planner
from petal_kernels.ops.lowrank_linear.planner import Problem

NATIVE = ("update", "extend")


def problem(kind: str, rows: int = 1024, width: int = 1024, **changes: object) -> Problem:
    given = {
        "rows": rows, "width": width, "rank": 16, "middle": 48, "outs": (width,) * 3,
        "itemsize": 4, "device": kind, "has_weights": True, "shares_hidden": False,
        "dropout": True, "has_core": False, "inference": False,
    }  # fmt: skip
    return Problem(**(given | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "itemsize", "plan"),
    [
        ("cpu", 4, "extend"),  # level: no second pass over y
        ("cpu mkl", 4, "update"),  # the library is ahead by more than that pass costs
        ("cpu", 2, "extend"),
        ("cpu native", 2, "update"),
    ],
)
def test_on_a_processor_the_faster_product_decides(kind: str, itemsize: int, plan: str) -> None:
    chosen = planner.rank_plans(NATIVE, problem(kind, itemsize=itemsize))
    assert chosen[0].plan == plan


def test_the_shrink_of_own_downs_counts_all_ranks() -> None:
    few = planner.estimate("update", problem("cpu", middle=16))
    many = planner.estimate("update", problem("cpu", middle=256))
    flops = 2 * 1024 * 1024 * (256 - 16)
    assert many.seconds - few.seconds >= 0.9 * flops / planner.MACHINES["cpu", 32].gemm


@pytest.mark.parametrize(
    ("vendor", "capability", "mkl", "leads"),
    [
        ("GenuineIntel", "AVX512", True, True),
        ("GenuineIntel", "AVX2", True, False),
        ("GenuineIntel", "AVX512", False, False),
        ("AuthenticAMD", "AVX512", True, False),
    ],
)
def test_where_the_library_leads(
    vendor: str, capability: str, mkl: bool, leads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(Path, "read_text", lambda _: f"vendor_id : {vendor}\n")
    assert device.library_leads.__wrapped__() is leads
