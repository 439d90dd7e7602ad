"""Hooks of others on a layer, and layers that own what is trained whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import petal_kernels as pk
from tests.hf import tiny, tiny_text

WIDTH = tiny.instructblip().config.vision_config.hidden_size  # type: ignore[union-attr]
IDS = torch.arange(5, 11)[None]


def _brighter(module: nn.Module, args: Any, kwargs: Any) -> Any:
    args = [1.5 * x if _is_image(x) else x for x in args]
    return tuple(args), {n: 1.5 * x if _is_image(x) else x for n, x in kwargs.items()}


def test_a_hook_that_replaces_the_image_is_heard() -> None:
    """The kind: a product of the image that came, for the one that a hook put there."""
    outputs = []
    for implementation in ("fused", "published"):
        model: Any = tiny.instructblip()
        config = pk.PetalConfig(r=4, dropout=0.0)
        attachment = pk.attach(model, config, implementation=implementation)
        tiny.randomise(attachment.adapter)
        for module in model.modules():
            if type(module).__name__ == "InstructBlipQFormerLayer":
                module.register_forward_pre_hook(_brighter, with_kwargs=True)
        outputs.append(model(**tiny.batch("instructblip")).logits)
    torch.testing.assert_close(*outputs)


def _is_image(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dim() == 3 and x.shape[-1] == WIDTH


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_that_owns_a_trained_parameter_binds_its_call(
    reentrant: bool, dtype: torch.dtype
) -> None:
    """The kind: a recompute outside the block that runs the copy, where its forward did not; or
    under autocast, which a wider copy needs."""
    model: Any = tiny_text.build("llama", dtype)
    layer: Any = model.model.layers[1]

    class Scaled(type(layer)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs) * self.gamma

    layer.gamma = nn.Parameter(torch.ones((), dtype=layer.mlp.up_proj.weight.dtype))
    layer.__class__ = Scaled
    config = pk.RoutingConfig(
        r=2, modules_to_save=["layers.1"], target_modules=r".*layers\.0\..*q_proj"
    )
    attachment = pk.attach(model.train(), config)
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.add_(0.5)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
        with attachment.disabled():
            loss = model(inputs_embeds=embeds, use_cache=False).logits.pow(2).sum()
        loss.backward()
        gradients.append(embeds.grad)
    torch.testing.assert_close(*gradients)
