"""Bottleneck adapters with routing, gates, and the dropout, residual and norm after them."""

from petal_kernels.ops.gated_bottleneck.op import gated_bottleneck

__all__ = ["gated_bottleneck"]
