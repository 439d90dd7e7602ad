"""Benchmarks of operators, layers and whole models against their eager forms."""

from petal_kernels.tools.bench.app import main

__all__ = ["main"]
