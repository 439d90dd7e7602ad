"""A frozen MLP, gated or plain, with low-rank updates of its linears."""

from petal_kernels.ops.gated_mlp.op import gated_mlp

__all__ = ["gated_mlp"]
