"""The roof: what this device copies and multiplies per second, measured in the same run.

Matrices are random numbers: products of zeros draw less power and run faster than any real ones.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from petal_kernels.tools.bench.timing import Clock, Step

_SECONDS = 2.0


@dataclass(frozen=True)
class Ceilings:
    """GB/s of a copy (read and written) and GFLOP/s of a square product in the run's dtype."""

    gigabytes: float
    gigaflops: float

    def __or__(self, other: Ceilings) -> Ceilings:
        """The best of two measurements."""
        gigabytes = max(self.gigabytes, other.gigabytes)
        return Ceilings(gigabytes, max(self.gigaflops, other.gigaflops))

    def share(self, moved: int, work: int, milliseconds: float) -> float:
        """The least time that bytes and flops could take, over the time they took."""
        least = max(moved / (self.gigabytes * 1e9), work / (self.gigaflops * 1e9))
        return least / (milliseconds * 1e-3)


def _sizes(device: torch.device, dtype: torch.dtype, quick: bool) -> tuple[int, int]:
    """Bytes of the copied buffer and the side of the square product."""
    if device.type == "cuda":
        return 1 << 30, 8192
    side = 1024 if dtype == torch.float32 else 512  # 16-bit products are slow on many processors
    return (64 << 20, side) if quick else (256 << 20, 2 * side)


def measure(device: torch.device, dtype: torch.dtype, quick: bool = False) -> Ceilings:
    """Both ceilings: the best of two seconds (`quick`: of nine samples), for a roof is what can be
    reached. On a machine with neighbours a row may still have had a better moment than the roof."""
    size, side = _sizes(device, dtype, quick)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    clock = Clock(device)
    steps = {
        2 * size: Step(lambda _: target.copy_(source)),
        2 * side**3: Step(lambda _: left @ right),
    }
    rates = []
    for amount, step in steps.items():
        step()
        samples, end = [clock(step)], time.monotonic() + (0.0 if quick else _SECONDS)
        while len(samples) < 9 or time.monotonic() < end:
            samples.append(clock(step))
        rates.append(amount / min(samples) / 1e9)
    return Ceilings(*rates)
