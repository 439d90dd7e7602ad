"""Times a layer of one's own against its fused form, as `petal-kernels bench` does: both are held
against float64 first, then run in turns with a cold cache. `--device cuda` on a GPU."""

import argparse
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import petal_kernels as pk
from petal_kernels.tools.bench.timing import Step, Timing, compare, drift


class Eager(nn.Module):
    """LoRA as it is mostly written, over the parameters of the fused layer."""

    def __init__(self, fused: pk.nn.LoRALinear) -> None:
        super().__init__()
        self.base, self.down, self.up = fused.base, fused.down, fused.up
        self.scale, self.dropout = fused.scale, fused.dropout

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(F.dropout(x, self.dropout, self.training), self.down), self.up)
        return self.base(x) + self.scale * update


def step(layer: nn.Module, x: Tensor, _: object = None) -> None:
    layer(x).square().mean().backward()


def main(rows: int, width: int, rank: int, rounds: int, device: str) -> dict[str, Timing]:
    torch.manual_seed(0)
    base = nn.Linear(width, width, device=device).requires_grad_(False)
    fused = pk.nn.LoRALinear(base, rank, dropout=0.05, init=False)
    layers = {"eager": Eager(fused), "torch.compile": torch.compile(Eager(fused)), "fused": fused}
    x = torch.randn(rows, width, device=device, requires_grad=True)
    with torch.no_grad():
        own = [p.double() for p in (x, base.weight, base.bias, fused.down, fused.up)]
        exact = F.linear(*own[:3]) + fused.scale * own[0] @ own[3].T @ own[4].T
        errors = {k: float((m.eval()(x) - exact).norm() / exact.norm()) for k, m in layers.items()}
    if not errors["fused"] <= 2 * errors["eager"] + 1e-7:
        raise SystemExit(f"fused: want an error like eager's, got {errors}")
    steps = {name: Step(partial(step, layer.train(), x)) for name, layer in layers.items()}
    times = compare(steps, torch.device(device), rounds)
    for name, time in times.items():
        ratio = times["eager"].median / time.median
        print(f"{name:<14} {time.median:8.2f} ms  {ratio:5.2f}x  error {errors[name]:.1e}")
    print(f"drift {drift(times):.1%}: a ratio closer to 1 than that is noise")
    return times


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for option, default in (("rows", 4096), ("width", 768), ("rank", 16), ("rounds", 20)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    main(**vars(parser.parse_args()))
