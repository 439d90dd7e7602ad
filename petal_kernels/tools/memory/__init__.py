"""`petal-kernels memory`: what a training step keeps in memory, per module and over time."""

from petal_kernels.tools.memory.app import main

__all__ = ["main"]
