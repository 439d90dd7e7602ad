"""Tiny BLIP models with Aurora attached, and batches for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import petal_kernels as pk
from tests.hf import tiny

SAME = 1e-9  # relative, in fp64
WIDTH, BATCH = 16, 3
TASKS = {
    "retrieval": "BlipForImageTextRetrieval",
    "vqa": "BlipForQuestionAnswering",
    "caption": "BlipForConditionalGeneration",
}


def build(task: str, dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    import transformers

    vision = {
        "hidden_size": changes.get("vision_width", WIDTH),
        "intermediate_size": changes.get("vision_inner", 4 * WIDTH),
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
        "initializer_range": 0.2,
    }
    text = {
        "vocab_size": 50,
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sep_token_id": 2,
        "pad_token_id": 0,
        "is_decoder": changes.get("is_decoder", True),
    }
    config = transformers.BlipConfig(
        vision_config=vision, text_config=text, image_text_hidden_size=8, initializer_range=0.2
    )
    torch.manual_seed(0)
    return getattr(transformers, TASKS[task])(config).to(dtype).eval()


def batch(task: str, seed: int = 0, size: int = BATCH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (size, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    image = torch.randn(size, 3, 28, 28, generator=generator, dtype=torch.float64)
    values = {"input_ids": ids, "attention_mask": mask, "pixel_values": image}
    if task == "vqa":
        values["labels"] = torch.randint(3, 50, (size, 4), generator=generator)
    if task == "caption":
        values["labels"] = ids
    return values


def forward(model: nn.Module, task: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(what the task reads, its loss)."""
    out = model(**batch(task, seed))
    if task == "retrieval":
        wanted = torch.arange(len(out.itm_score)) % 2
        return out.itm_score, F.cross_entropy(out.itm_score, wanted)
    return (out.logits if task == "caption" else out.image_embeds), out.loss


def config_of(**more: Any) -> pk.AuroraConfig:
    return pk.AuroraConfig(**{"r": 5, "dropout": 0.0, "scale": 0.8, **more})


def attached(
    task: str, config: pk.AuroraConfig, implementation: str = "fused", **changes: Any
) -> tuple[nn.Module, Any]:
    model = build(task, **changes)
    attachment = pk.attach(model, copy.deepcopy(config), implementation=implementation)
    tiny.randomise(attachment.adapter)
    model.to(torch.float64)
    return model, attachment


def gradients(attachment: Any) -> dict[str, Tensor]:
    missing = [name for name, p in attachment.named_parameters() if p.grad is None]
    assert not missing
    return {name: p.grad.clone() for name, p in attachment.named_parameters()}


def step(
    model: nn.Module, attachment: Any, task: str, seed: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    for p in attachment.parameters():
        p.grad = None
    out, loss = forward(model, task, seed)
    loss.backward()
    return out.detach(), gradients(attachment)


def close(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=SAME, atol=SAME)
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        error = float((got[1][name] - gradient).norm())
        assert error <= SAME * max(float(gradient.norm()), 1.0), name
