"""The norm of rows by a frozen weight."""

from petal_kernels.ops.frozen_norm.op import frozen_norm

__all__ = ["frozen_norm"]
