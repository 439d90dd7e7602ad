"""The methods as PEFT's: `peft.get_peft_model(model, petal_kernels.peft.PetalConfig(...))`.

Importing this module registers them with PEFT, which loads their files from then on. LoRA is PEFT's
own (`peft.LoraConfig`): `petal_kernels.fuse(model)` runs it by these operators.
"""

from petal_kernels.hf.tuners import (
    AuroraConfig,
    CompacterConfig,
    ExpertConfig,
    PetalConfig,
    RoutingConfig,
    VLAdapterConfig,
    VLPetConfig,
)

__all__ = [
    "AuroraConfig",
    "CompacterConfig",
    "ExpertConfig",
    "PetalConfig",
    "RoutingConfig",
    "VLAdapterConfig",
    "VLPetConfig",
]
