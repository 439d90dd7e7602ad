"""Fused adapter layers in a model of one's own: LoRA on its projections, and a gated adapter behind
its feed-forward that computes dropout, the residual and the norm in the same call; then a training.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import petal_kernels as pk


class Block(nn.Module):
    """A block as one may have it; with a rank r frozen, and adapted."""

    def __init__(self, width: int, heads: int, r: int = 0) -> None:
        super().__init__()
        self.heads, self.adapter = heads, None
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        if r:
            self.requires_grad_(False)
            self.qkv = pk.nn.LoRALinear(self.qkv, r, dropout=0.05)
            self.out = pk.nn.LoRALinear(self.out, r, dropout=0.05)
            self.adapter = pk.nn.GatedAdapter(width, r, gate="large", scale=2.0, init="identity")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        joined = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.out(joined))
        h = self.down(F.gelu(self.up(x)))
        if self.adapter is None:
            return self.norm2(x + F.dropout(h, 0.1, self.training))
        return self.adapter(h, x, dropout=0.1, residual=x, norm=self.norm2)


def main(steps: int = 200, width: int = 128, r: int = 16) -> list[float]:
    torch.manual_seed(0)
    teacher = nn.Sequential(*(Block(width, 4) for _ in range(2))).eval().requires_grad_(False)
    model = nn.Sequential(*(Block(width, 4, r) for _ in range(2)))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, 3e-3), []
    for _ in range(steps):
        x = torch.randn(16, 24, width)
        losses.append(F.mse_loss(model(x), teacher(x)))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    share = sum(p.numel() for p in trained) / sum(p.numel() for p in model.parameters())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {share:.1%} of the parameters trained")
    return [loss.item() for loss in losses]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
