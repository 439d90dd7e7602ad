"""Mixtures of low-rank experts: dense, per instruction or top-k of each token."""

from petal_kernels.ops.expert_dispatch.op import expert_dispatch

__all__ = ["expert_dispatch"]
