"""Adapters that somebody freezes without a word: PEFT those of `attach`, and `attach` PEFT's.

Both freeze whatever a model holds before they put their own parameters in. What was trained before
then stays as it is while the loss goes down, which nothing else would say.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn

from petal_kernels.hf.context import now
from petal_kernels.hf.peft_layers import is_peft_layer

if TYPE_CHECKING:
    from petal_kernels.hf.method import Method

_MESSAGE = (
    "attach: every parameter of the adapter has requires_grad=False since, and this training "
    "forward does not train it: peft.get_peft_model and model.requires_grad_(False) do that. To "
    "train it, keep trained = list(att.parameters()) from before, and call requires_grad_(True) on "
    "each; to have another one in its place, call att.detach() first"
)


class Watch:
    """Warns once per adapter, at a training forward that finds all of it frozen.

    It looks once per forward, until it finds a parameter that requires grad: the first, mostly.
    """

    def __init__(self, method: Method) -> None:
        self.method, self.told = method, False

    def look(self, module: nn.Module) -> None:
        """At the adapter, where a layer of the model is called."""
        if self.told or not module.training or not torch.is_grad_enabled():
            return
        count = 0
        for parameter in self.method.adapter.parameters():
            if parameter.requires_grad:
                return
            count += 1
        if count and now(self.method).on:  # an engine may have taken all of them
            self.told = True
            warnings.warn(_MESSAGE, UserWarning, stacklevel=2)


def frozen_of_peft(model: nn.Module) -> str:
    """What `attach` freezes of PEFT's, in words; empty where nothing of it is trained."""
    trained = [
        path
        for path, module in model.named_modules()
        if is_peft_layer(module) and any(p.requires_grad for p in module.parameters())
    ]
    if not trained:
        return ""
    return (
        f"{len(trained)} layers of PEFT's were trained and are frozen now, {trained[0]} first; "
        "call merge_and_unload() or unload() of the PeftModel before attach unless that is meant"
    )
