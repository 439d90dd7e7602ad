"""Which exact plan ``lowrank_linear`` runs, by a cost model that can be printed.

All plans compute the same function; they differ in what they move and how often they call the
library:

    update   library GEMM of the base, then one read-modify-write pass for the update
    extend   one GEMM whose inner loop runs on from D to D + R: no second pass over y
    augment  the same with the library: [x | m_k] is copied first
    merge    W_k + scale * P_k U is formed once, then the base GEMM alone: inference without dropout

The time of a plan is modelled as ``max(flops / rate, bytes / bandwidth) + launches * latency``
summed over its steps, with the constants of a device class below. ``MEASURED`` holds rows that a
measurement decided otherwise; it is written by hand from the tables in ``benchmarks/results`` and
wins over the model.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

PLANS = ("update", "extend", "augment", "merge")


@dataclass(frozen=True)
class Machine:
    """Constants of a device class: FLOP/s of a library GEMM, of a generated GEMM, bytes/s, seconds
    per launch."""

    gemm: float
    generated_gemm: float
    bandwidth: float
    latency: float


# GPU: an H200's 0.8 x 788 TFLOP/s and 4.3 TB/s for 16-bit, its fp32 pipe otherwise; not yet
# measured.
# CPU: two cores, where the generated fp32 GEMM is level with the library's, and 1.3 to 1.4 times
# behind MKL's on an Intel processor with AVX-512. In 16 bits the library is far behind it, or far
# ahead where the processor multiplies 16-bit matrices itself.
MACHINES = {
    ("cuda", 16): Machine(630e12, 0.93 * 630e12, 4.3e12, 5e-6),
    ("cuda", 32): Machine(45e12, 40e12, 4.3e12, 5e-6),
    ("cpu", 16): Machine(1.8e10, 1.4e11, 1.5e10, 6e-6),
    ("cpu", 32): Machine(1.47e11, 1.47e11, 1.5e10, 6e-6),
    ("cpu mkl", 32): Machine(1.4e11, 1.0e11, 1.5e10, 6e-6),
    ("cpu native", 16): Machine(4.2e11, 1.4e11, 1.5e10, 6e-6),
}


_KNOWN = {device for device, _ in MACHINES}


@dataclass(frozen=True)
class Problem:
    """The sizes a plan's cost depends on."""

    rows: int
    width: int
    rank: int  # of one output, the largest
    middle: int  # columns of h: the rank, or the sum of all where every output has its own
    outs: tuple[int, ...]
    itemsize: int
    # "cuda", "cpu", "cpu mkl" where the library's fp32 product is ahead, or "cpu native": one that
    # multiplies this 16-bit dtype itself
    device: str
    has_weights: bool
    shares_hidden: bool
    dropout: bool
    has_core: bool
    inference: bool


@dataclass(frozen=True)
class Estimate:
    """Modelled forward seconds of a plan, or why it does not apply."""

    plan: str
    seconds: float
    reason: str | None = None

    def __str__(self) -> str:
        if self.reason is not None:
            return f"plan {self.plan:<7} no: {self.reason}"
        return f"plan {self.plan:<7} {self.seconds * 1e6:10.1f} us modelled"


def not_applicable(plan: str, p: Problem) -> str | None:
    """Why a plan cannot compute this problem, or None."""
    if plan == "update":
        return None
    if not p.has_weights:
        return "needs the base's weights, not its outputs"
    if plan == "merge":
        if p.dropout:
            return "dropout is on"
        if p.has_core:
            return "a core between the projections is folded by mode_contract first"
        if p.shares_hidden:
            return "the bottleneck is given, not the down-projection"
    return None


def estimate(plan: str, p: Problem) -> Estimate:
    """The modelled cost of one forward."""
    reason = not_applicable(plan, p)
    if reason is not None:
        return Estimate(plan, float("inf"), reason)
    m = MACHINES[p.device if p.device in _KNOWN else "cpu", 16 if p.itemsize == 2 else 32]
    n, d, r, e, k = p.rows, p.width, p.rank, p.itemsize, len(p.outs)
    columns = p.middle
    wide = sum(p.outs)

    def step(flops: float, traffic: float, launches: int, rate: float) -> float:
        return max(flops / rate, traffic / m.bandwidth) + launches * m.latency

    base = step(2 * n * d * wide, (k * n * d + n * wide + d * wide) * e, k, m.gemm)
    shrink = (
        0.0 if p.shares_hidden else step(2 * n * d * columns, (n * d + n * columns) * e, 1, m.gemm)
    )
    if plan == "update":
        passes = 2 if p.has_weights else 1 + (p.itemsize > 0)
        update = step(2 * n * r * wide, (passes * n * wide + n * columns) * e, 1, m.gemm)
        return Estimate(plan, shrink + update + (base if p.has_weights else 0.0))
    extended = 2 * n * (d + r) * wide
    if plan == "extend":
        traffic = (k * n * (d + r) + n * wide + (d + r) * wide) * e
        return Estimate(plan, shrink + step(extended, traffic, 1, m.generated_gemm))
    if plan == "augment":
        copy = step(0, (2 * n * (d + r) + (k - 1) * n * r + 2 * (d + r) * wide) * e, 2 + k, m.gemm)
        traffic = (k * n * (d + r) + n * wide + (d + r) * wide) * e
        return Estimate(plan, shrink + copy + step(extended, traffic, k, m.gemm))
    copied = step(0, 2 * d * wide * e, k, m.gemm)
    merged = copied + step(2 * d * r * wide, 3 * d * wide * e, k, m.gemm)
    hidden = 0.0 if p.inference else shrink
    return Estimate(plan, merged + base + hidden)


def bucket(rows: int) -> int:
    """log2 of the row count, rounded up: the granularity of the measured table."""
    return max(rows - 1, 0).bit_length()


# (device, bits, bucket(rows), width, rank, outputs) -> plan
MEASURED: dict[tuple[str, int, int, int, int, int], str] = {}


@functools.lru_cache(maxsize=4096)
def rank_plans(plans: tuple[str, ...], p: Problem) -> tuple[Estimate, ...]:
    """The plans that may be chosen automatically, best first; a measured row comes before the
    model.

    ``merge`` is only ever chosen for inference: in training it would form the merged weights anew
    each step.
    """
    estimates = [estimate(plan, p) for plan in plans if plan != "merge" or p.inference]
    usable = sorted((e for e in estimates if e.reason is None), key=lambda e: e.seconds)
    key = (p.device, 16 if p.itemsize == 2 else 32, bucket(p.rows), p.width, p.rank, len(p.outs))
    measured = MEASURED.get(key)
    return tuple(sorted(usable, key=lambda e: e.plan != measured) if measured else usable)
