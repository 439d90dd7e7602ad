"""What this machine can do at best: bytes per second of a copy, flops per second of a product."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import torch

from benchmarks.gpu.journal import Journal, Record
from benchmarks.gpu.stopwatch import race
from benchmarks.gpu.suite import DTYPES, Case, Suite
from petal_kernels.tools import environment

SHARE, LIMIT, PARALLEL, CHECKS = 3.0, 120.0, False, True
_ROUNDS = 30
_ASKED = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit", "compute_mode")


def cases(suite: Suite, journal: Journal) -> list[Case]:
    """The machine's description, the copy, the products."""
    kinds = ("environment", "copy", *(f"gemm {d}" for d in DTYPES))
    return [{"id": f"ceilings/{kind}", "kind": kind} for kind in kinds]


def _card() -> dict[str, Any]:
    """What a figure depends on beside the card's name."""
    found = {"cuda": torch.version.cuda}
    if tool := shutil.which("nvidia-smi"):
        command = [tool, f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader", "--id=0"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        values = done.stdout.strip().split(", ")
        if len(values) == len(_ASKED):
            found |= dict(zip(_ASKED, values, strict=True))
    return found


def run(case: Case, suite: Suite) -> dict[str, Any]:
    """Measure one ceiling."""
    kind = case["kind"]
    if kind == "environment":
        card = {} if suite.dry else _card()
        return {"environment": environment.describe(torch.get_num_threads()) | card}
    if kind == "copy":
        count = (1 << 14) if suite.dry else (1 << 30)
        source = torch.randn(count // 4, device=suite.device)
        target = torch.empty_like(source)
        ms = race({"copy": lambda: target.copy_(source)}, suite.device, _ROUNDS)["copy"]
        return {"gb_per_s": round(2 * count / ms / 1e6, 2)}
    size = 64 if suite.dry else 8192
    dtype = DTYPES[kind.split()[1]]
    a, b = (torch.randn(size, size, device=suite.device).to(dtype) for _ in range(2))
    ms = race({"gemm": lambda: a @ b}, suite.device, _ROUNDS // 3)["gemm"]
    return {"tflop_per_s": round(2 * size**3 / ms / 1e9, 3)}


def report(records: list[Record]) -> list[str]:
    """One line for each."""
    units = (("gb_per_s", "GB/s"), ("tflop_per_s", "TFLOP/s"))
    return [f"- {r['kind']}: {r[key]} {unit}" for r in records for key, unit in units if key in r]
