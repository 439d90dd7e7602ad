"""GPUs by name, and what of their memory a program can have."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

GIB = 2**30
# What a device shows to a program (torch.cuda.get_device_properties(0).total_memory, the "total
# capacity" of torch's out-of-memory messages), in GiB: less than it is sold with.
TOTALS = {
    "h200": 139.8,
    "h100": 79.1,
    "a100-80": 79.1,
    "a100-40": 39.3,
    "l40s": 44.3,
    "4090": 23.6,
    "3090": 23.6,
    "t4": 14.5,
}
# Not the allocator's: the CUDA context with the kernels that are loaded, and the workspaces of
# cuBLAS. An assumption; it differs between drivers, devices and libraries by some hundred MiB.
RESERVE = 0.75


@dataclass(frozen=True)
class Gpu:
    """A device, by the bytes that it shows."""

    name: str
    total: int

    def __str__(self) -> str:
        return f"{self.name} ({self.total / GIB:.1f} GiB)"


def gpu(text: str) -> Gpu:
    """A name of `TOTALS`, or a number of GiB."""
    name = text.lower()
    if name in TOTALS:
        return Gpu(name.upper(), int(TOTALS[name] * GIB))
    try:
        size = float(name.removesuffix("gib"))
    except ValueError:
        size = math.nan
    if not 0.0 < size <= 1024.0:
        raise argparse.ArgumentTypeError(
            f"want one of {', '.join(TOTALS)} or a number of GiB, at most 1024, got {text}"
        )
    return Gpu("a GPU", int(size * GIB))


def gibibytes(text: str) -> float:
    """A size in GiB, none included."""
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0.0 <= size < 1e6:
        raise argparse.ArgumentTypeError(f"want a number of GiB >= 0, got {text}")
    return size
