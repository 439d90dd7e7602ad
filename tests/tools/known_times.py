"""Samples of a clock, and what providers and tables of them must be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from petal_kernels.tools.bench import timing
from petal_kernels.tools.bench.ceilings import Ceilings
from petal_kernels.tools.bench.correctness import Errors
from petal_kernels.tools.bench.fresh import Fresh
from petal_kernels.tools.bench.scenarios import Inputs, Provider, Scenario

FINE = Errors(1.0, 1.5)
ROOF = Ceilings(gigabytes=10.0, gigaflops=100.0)
ENVIRONMENT = {
    "cpu": "a CPU",
    "gpu": None,
    "threads": 1,
    "torch": "2.13",
    "triton": None,
    "petal_kernels": "0.1",
    "commit": "abc",
    "date": "2026-01-02T03:04:05Z",
}
# Milliseconds of four rounds, in the order in which they are taken.
SAMPLES = {
    "published": [8.0, 12.0, 10.0, 10.0],
    "eager": [5.0, 5.0, 5.0, 5.0],
    "compile": [8.0, 8.0, 8.0, 8.0],
    "base": [1.0, 1.0, 1.0, 1.0],
    "petal native": [4.0, 4.0, 4.0, 4.0],
    "petal torch": [9.8, 9.8, 10.0, 10.0],
}
COUNTS = {
    "published": (30, 5_250_000, 9_000_000),
    "eager": (20, 4_500_000, 8_000_000),
    "compile": (None, None, 7_000_000),
    "base": (1, 0, 1_000_000),
    "petal native": (2, 2_250_000, 3_500_000),
    "petal torch": (9, 2_250_000, 4_000_000),
}


class Script:
    """Providers that say when they run, and a clock that reads their times from a list."""

    def __init__(self, samples: dict[str, list[float]]) -> None:
        self.samples = {label: list(values) for label, values in samples.items()}
        self.last = ""

    def forward(self, label: str) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            self.last = label
            return x.square()

        return run

    def clock(self, device: torch.device, wall: bool = False) -> Callable[[timing.Step], float]:
        def read(step: timing.Step) -> float:
            step()
            return self.samples[self.last].pop(0) / 1e3

        return read


def scenario(script: Script, errors: dict[str, Errors], name: str = "s") -> Scenario:
    x, dout = torch.arange(6.0).requires_grad_(), torch.arange(1.0, 7.0)
    providers = {}

    def found(label: str) -> Callable[..., Errors]:
        return lambda *_: errors.get(label, FINE)

    for label in script.samples:
        ours = label.startswith("petal")
        providers[label] = Provider(
            script.forward(label),
            check=None if label == "base" else found(label),
            ours=ours,
            chosen=label == "petal native",
            compiled=label == "compile",
            floor=label == "base",
        )
    return Scenario(
        name,
        Inputs({"x": x}, ("x",), [dout]),
        providers,
        ["op", "mode_contract", "--shape", "a shape"],
        moved=(10_000_000, 30_000_000),
        work=(100_000_000, 200_000_000),
        swept=8.0,
        notes=["auto runs on native"],
        fresh=Fresh([x, dout]),
    )


def rows(text: str) -> dict[str, str]:
    """What the terminal says in place of the speed-up, by provider."""
    lines = [line.split("  ") for line in text.splitlines() if line.startswith("  ")]
    cells = [[c.strip() for c in line if c.strip()] for line in lines]
    return {c[0]: c[4] for c in cells if c[0] in SAMPLES}
