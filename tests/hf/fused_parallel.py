"""Two processes that train a fused model under an engine; run by the engines' tests of fuse()."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import petal_kernels as pk
from petal_kernels.hf.peft_layers import FusedLora
from tests.hf import fused, ranks


def _replicated(model: Any) -> Any:
    pk.fuse(model)
    return DistributedDataParallel(model)


def _replicated_first(model: Any) -> Any:
    whole = DistributedDataParallel(model)
    pk.fuse(whole)
    return whole


def _layers(model: Any) -> Any:
    """Every decoder layer a unit: within its forward the weights are whole."""
    pk.fuse(model)
    mesh = init_device_mesh("cpu", (ranks.RANKS,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _bases(model: Any) -> Any:
    """Every base a unit of its own, whose weight is whole within its own forward alone."""
    pk.fuse(model)
    mesh = init_device_mesh("cpu", (ranks.RANKS,))
    for module in model.modules():
        if isinstance(module, FusedLora):
            fully_shard(_base(module), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _factors(model: Any) -> Any:
    """And every factor: nothing of it can be read from outside."""
    pk.fuse(model)
    mesh = init_device_mesh("cpu", (ranks.RANKS,))
    for module in model.modules():
        if isinstance(module, FusedLora):
            for factor in (*_held(module, "lora_A"), *_held(module, "lora_B")):
                fully_shard(factor, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _base(layer: Any) -> nn.Module:
    found: nn.Module = layer.base_layer
    return found


def _held(layer: Any, name: str) -> list[nn.Module]:
    return list(getattr(layer, name).values())


# With the forwards of the linears' operator that a step takes: in two layers q, k and v, o, and an
# MLP of two; each of seven alone; none where PEFT's own forward must run.
KINDS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "replicated": (_replicated, 8),
    "replicated first": (_replicated_first, 8),
    "layers": (_layers, 8),
    "bases": (_bases, 14),
    "factors": (_factors, 0),
}


def _faults(kind: str, rank: int) -> list[str]:
    """This process's gradients are the mean of both batches', computed alone."""
    given = fused.batch("llama")
    given["inputs_embeds"] = given["inputs_embeds"] + rank
    alone = fused.step(fused.family("llama"), given)
    want = {name: value for name, value in alone.items() if name != "loss"}
    for value in want.values():
        dist.all_reduce(value)
        value /= ranks.RANKS
    wrap, count = KINDS[kind]
    whole = wrap(fused.family("llama"))
    with fused.operators() as calls:
        got = fused.step(whole, given)
    torch.testing.assert_close(got.pop("loss"), alone["loss"])
    got = {
        name.removeprefix("module."): value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in got.items()
    }
    fused.same(got, want, 1e-10)
    assert fused.forwards(calls).get("lowrank_linear", 0) == count, calls
    return []


if __name__ == "__main__":
    ranks.main(_faults)
