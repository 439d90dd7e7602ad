"""Frozen linear(s) plus low-rank updates that share one down-projection."""

from petal_kernels.ops.lowrank_linear.op import lowrank_linear

__all__ = ["lowrank_linear"]
