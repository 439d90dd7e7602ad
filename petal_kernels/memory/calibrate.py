"""What the profiler says beside what CUDA's allocator says: the margin to add to a prediction.

The profiler counts the bytes of storages. The allocator rounds blocks up, and kernels allocate
workspace inside an operation, which nobody outside sees.
"""

from __future__ import annotations

from dataclasses import dataclass

from petal_kernels.memory.profile import Profile
from petal_kernels.memory.records import mib


@dataclass(frozen=True)
class Margin:
    """One figure, predicted and as the allocator counts it."""

    what: str
    predicted: int
    allocated: int

    @property
    def percent(self) -> float:
        """By how much the allocator's figure is larger."""
        return 100.0 * (self.allocated / self.predicted - 1.0) if self.predicted else 0.0

    def __str__(self) -> str:
        return (
            f"{self.what}: predicted {mib(self.predicted)}, allocated {mib(self.allocated)}, "
            f"margin {self.percent:+.1f} %"
        )


def margins(measured: Profile, predicted: Profile | None = None) -> list[Margin]:
    """The allocator's figures of a run on CUDA beside those of the same run's profile, or of
    `predicted`: a profile of the same step on fake tensors. Empty where nothing ran on CUDA.
    """
    if not measured.device_bytes:
        return []
    source = measured if predicted is None else predicted
    allocated = measured.device_bytes
    found = [Margin("kept after the forward", source.kept_bytes, allocated["forward kept"])]
    for phase in source.phases:
        if f"{phase} peak" in allocated:
            peak = source.peak_of(phase)
            found.append(Margin(f"peak in {phase}", peak, allocated[f"{phase} peak"]))
    return found
