"""Timing that survives a noisy machine: cold cache, providers interleaved sample by sample, medians
with spread.

Each round times every provider once, in an order that rotates, with the cache evicted before each.
The rounds are split in two halves; the largest relative difference between the halves' medians is
the drift of the run, and differences below it are equal.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one provider: median, 20th and 80th percentile, and the two halves' relative
    difference."""

    median: float
    p20: float
    p80: float
    drift: float
    samples: int

    def as_dict(self) -> dict[str, float]:
        return {k: round(v, 5) for k, v in asdict(self).items()}


class _Clock:
    """Seconds of one call, cache evicted first; CUDA work is waited for."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        size = 256 << 20 if self.cuda else 96 << 20
        self.buffer = torch.empty(size // 4, dtype=torch.float32, device=device)

    def __call__(self, run: Callable[[], object]) -> float:
        self.buffer.add_(1.0)
        if self.cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            return float(start.elapsed_time(end)) / 1e3
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin


def _quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


def compare(
    providers: dict[str, Callable[[], object]],
    device: torch.device,
    rounds: int = 20,
    warmup: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Time every provider ``rounds`` times, interleaved; at least four rounds."""
    if rounds < 4:
        raise ValueError(f"rounds: want at least 4, got {rounds}")
    clock = _Clock(device)
    names = list(providers)
    for name in names:
        for _ in range(warmup):
            providers[name]()
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
            samples[name].append(clock(providers[name]) * 1e3)
        if progress is not None:
            progress(i + 1, rounds)
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float]) -> Timing:
    half = len(values) // 2
    first, second = statistics.median(values[:half]), statistics.median(values[half:])
    return Timing(
        median=statistics.median(values),
        p20=_quantile(values, 0.2),
        p80=_quantile(values, 0.8),
        drift=abs(first - second) / min(first, second),
        samples=len(values),
    )


def drift(timings: dict[str, Timing]) -> float:
    """The run's drift: the largest half-to-half difference of any provider."""
    return max(t.drift for t in timings.values())
