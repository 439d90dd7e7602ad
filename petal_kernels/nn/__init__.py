"""The modules: parameters and initialisation; their forward is one call into `ops`."""

from petal_kernels.nn.frozen_linear import FrozenLinear, frozen_lowrank
from petal_kernels.nn.mode_approximation import ModeApproximation
from petal_kernels.nn.residual import ScaleShift, batch_context

__all__ = ["FrozenLinear", "ModeApproximation", "ScaleShift", "batch_context", "frozen_lowrank"]
