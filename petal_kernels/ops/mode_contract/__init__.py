"""All mode matrices of a model in one contraction."""

from petal_kernels.ops.mode_contract.op import mode_contract

__all__ = ["mode_contract"]
