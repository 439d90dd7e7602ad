"""A small LLaVA learns here to name pieces of real photographs; then, frozen, LoRA on fused layers
teaches it a new question about them. The pictures come inside scikit-image; a minute or two."""

from pathlib import Path

import numpy as np
import skimage
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

import petal_kernels as pk

# Files of scikit-image's: what they show, and what kind of thing that is.
THINGS = {
    "astronaut": "woman person", "brick": "wall stone", "chelsea": "cat animal",
    "coffee": "coffee drink", "coins": "coins metal", "grass": "grass plant",
    "gravel": "gravel stone", "hubble_deep_field": "stars sky", "ihc": "tissue body",
    "motorcycle_left": "motorcycle machine",
}  # fmt: skip
QUESTIONS = ("what ?", "what kind ?")
WORDS = ["<pad>", "<image>", *QUESTIONS, *sorted(set(" ".join(THINGS.values()).split()))]
SIZE, PIECE, PATCHES = 32, 64, 16
Batch = dict[str, Tensor]


def photographs() -> list[Tensor]:
    """[3, height, width] from 0 to 1."""
    folder = Path(skimage.__file__).with_name("data")
    found = [Image.open(next(folder.glob(f"{name}.*"))) for name in THINGS]
    return [torch.tensor(np.array(p.convert("RGB"))).permute(2, 0, 1) / 255 for p in found]


def draw(photos: list[Tensor], count: int, question: int, seed: int, held_out: int = 0) -> Batch:
    """Pieces of 64 x 64 pixels; those held out lie in other stripes of the photographs."""
    rng, pieces, rows, words = np.random.default_rng(seed), [], [], [*THINGS.values()]
    for k in rng.integers(len(photos), size=count):
        _, high, wide = photos[k].shape
        y, x = rng.integers(high - PIECE), 2 * rng.integers(wide // PIECE // 2) + held_out
        pieces.append(photos[k][:, y : y + PIECE, x * PIECE : (x + 1) * PIECE])
        rows.append([*[1] * PATCHES, 2 + question, WORDS.index(words[k].split()[question])])
    ids = torch.tensor(rows)
    labels = torch.where(torch.arange(PATCHES + 2) <= PATCHES, -100, ids)
    pixels = 4 * nn.functional.avg_pool2d(torch.stack(pieces) - 0.45, PIECE // SIZE)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


def train(model: nn.Module, photos: list[Tensor], question: int, steps: int, lr: float) -> None:
    """What of the model requires grad."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in range(steps):
        model.train()(**draw(photos, 32, question, step)).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: nn.Module, photos: list[Tensor], question: int) -> float:
    batch = draw(photos, 400, question, seed=10**6, held_out=1)
    said = model.eval()(**batch).logits[:, -2].argmax(-1)
    return float((said == batch["input_ids"][:, -1]).float().mean())


def main(steps: int = 400) -> dict[str, float]:
    torch.manual_seed(0)
    size = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4}
    size["num_hidden_layers"] = 2
    tower = {**size, "model_type": "clip_vision_model", "image_size": SIZE, "patch_size": 8}
    text = {**size, "model_type": "llama", "vocab_size": len(WORDS)}
    parts = {"vision_config": tower, "text_config": text}
    config = LlavaConfig(**parts, image_token_index=1, vision_feature_layer=-1)
    photos, model = photographs(), LlavaForConditionalGeneration(config)
    train(model, photos, 0, steps, 2e-3)
    found = {"what ?": accuracy(model, photos, 0)}
    att = pk.attach(model, pk.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    found["what kind ?, before"] = accuracy(model, photos, 1)
    train(model, photos, 1, steps // 2, 1e-2)
    found["what kind ?, after"] = accuracy(model, photos, 1)
    with att.disabled():
        found["what ?, adapter off"] = accuracy(model, photos, 0)
    return found


if __name__ == "__main__":
    for name, share in main().items():
        print(f"{name:<20} {share:6.1%} of 400 held-out pieces")
