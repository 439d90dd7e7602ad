"""The modules: parameters and initialisation; their forward is one call into `ops`."""

from petal_kernels.nn.compacter import CompacterAdapter, CompacterValueAdapter
from petal_kernels.nn.dora import DoRALinear
from petal_kernels.nn.experts import ExpertAdapter, ExpertLoRALinear, InstructionExperts
from petal_kernels.nn.frozen_linear import FrozenLinear, frozen_lowrank
from petal_kernels.nn.gated_adapter import GatedAdapter, RoutedAdapter, VLAdapter
from petal_kernels.nn.kronecker import PHMRule
from petal_kernels.nn.lora import LoRALinear
from petal_kernels.nn.mode_approximation import ModeApproximation
from petal_kernels.nn.mutual_information import MutualInformationLoss
from petal_kernels.nn.residual import ScaleShift, batch_context
from petal_kernels.nn.routed_lora import RoutedLoRALinear
from petal_kernels.nn.value_adapter import ValueAdapter

__all__ = [
    "CompacterAdapter",
    "CompacterValueAdapter",
    "DoRALinear",
    "ExpertAdapter",
    "ExpertLoRALinear",
    "FrozenLinear",
    "GatedAdapter",
    "InstructionExperts",
    "LoRALinear",
    "ModeApproximation",
    "MutualInformationLoss",
    "PHMRule",
    "RoutedAdapter",
    "RoutedLoRALinear",
    "ScaleShift",
    "VLAdapter",
    "ValueAdapter",
    "batch_context",
    "frozen_lowrank",
]
