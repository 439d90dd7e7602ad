"""What one step is watched by: everything that is there before it is on the timeline, and is put
back after it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from petal_kernels.memory import gradients
from petal_kernels.memory.compiled import refused
from petal_kernels.memory.cuda_rules import cuda_rules as as_on_cuda
from petal_kernels.memory.fake import mode_of, named_failures, running
from petal_kernels.memory.leaves import Leaves, buffers_put_back, versions
from petal_kernels.memory.modules import ModuleStack
from petal_kernels.memory.records import (
    MIB,
    Sizes,
    plain_tensors,
    storage_bytes,
    storage_key,
    tensors_in,
)
from petal_kernels.memory.saved import SavedTensors
from petal_kernels.memory.timeline import Timeline

LARGEST_BUFFER = 16 * MIB  # that is copied, to be put back
# One step at a time: torch counts modes for the whole process.
_ONE = threading.RLock()


class Meter:
    """Seconds of each phase and, on CUDA, what the allocator says it took."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self.seconds: dict[str, float] = {}
        self.bytes: dict[str, int] = {}

    @contextlib.contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.bytes.setdefault("before", before)
        began = time.perf_counter()
        yield
        if self._cuda:
            torch.cuda.synchronize()
            self.bytes[f"{phase} kept"] = torch.cuda.memory_allocated() - self.bytes["before"]
            peak = torch.cuda.max_memory_allocated() - self.bytes["before"]
            self.bytes[f"{phase} peak"] = peak
        self.seconds[phase] = time.perf_counter() - began


@dataclass
class Recorders:
    """What watches one step, and what there was before it."""

    own: dict[str, Tensor]  # parameters
    buffers: dict[str, Tensor]
    asking: dict[str, Tensor]  # parameters that want a gradient
    fake: bool
    rules: bool
    sizes: Sizes
    stack: ModuleStack
    timeline: Timeline
    meter: Meter
    recorder: SavedTensors
    leaves: Leaves
    contexts: contextlib.ExitStack
    there: gradients.Earlier
    changed: list[str]  # what the step changed and is not put back


@contextlib.contextmanager
def recording(
    module: nn.Module | None,
    batch: Any,
    parameters: list[Tensor],
    cuda_rules: bool | None,
    accumulate: bool | None,
    hooks: bool,
) -> Iterator[Recorders]:
    """Everything that is there before the step is on the timeline, and is put back after it."""
    own, buffers = _own_tensors(module, parameters)
    asking = {name: t for name, t in own.items() if t.requires_grad}
    mode = mode_of(module, batch)
    rules = mode is not None if cuda_rules is None else cuda_rules
    cuda = mode is None and any(t.is_cuda for t in [*own.values(), *tensors_in(batch)])
    stack = ModuleStack(module)
    timeline, meter, recorder = Timeline(stack), Meter(cuda), SavedTensors(stack, hooks)
    for category, tensors in (("parameters", own), ("buffers", buffers)):
        for name, t in tensors.items():
            timeline.add(t, category, name)
    for t in tensors_in(batch):
        timeline.add(t, "batch", "batch")
    leaves = Leaves(module, set(storages(own | buffers)) | keys(batch), timeline)
    with contextlib.ExitStack() as contexts:
        contexts.enter_context(_ONE)
        contexts.callback(timeline.close)
        devices = _devices([*own.values(), *tensors_in(batch)])
        contexts.enter_context(torch.random.fork_rng(devices=devices))
        there = contexts.enter_context(gradients.put_back(list(asking.values()), accumulate))
        gradients.add_earlier(asking, timeline)
        changed = contexts.enter_context(buffers_put_back(module, LARGEST_BUFFER))
        written = versions(own)
        if mode is not None:
            contexts.enter_context(running(mode, batch))
        contexts.enter_context(named_failures(stack, mode))
        if rules:
            contexts.enter_context(refused())
            contexts.enter_context(as_on_cuda())
        contexts.enter_context(timeline)
        yield Recorders(
            own,
            buffers,
            asking,
            mode is not None,
            rules,
            _sizes(own, buffers, batch),
            stack,
            timeline,
            meter,
            recorder,
            leaves,
            contexts,
            there,
            changed,
        )
        changed += [name for name, count in versions(own).items() if written[name] != count]


def _own_tensors(
    module: nn.Module | None, more: Iterable[Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters, those given by hand among them, and buffers, by name."""
    parameters: dict[str, Tensor] = {f"parameter {i}": t for i, t in enumerate(more)}
    if module is None:
        return parameters, {}
    return parameters | dict(module.named_parameters()), dict(module.named_buffers())


def keys(tree: Any) -> set[int]:
    """The storages of the tensors in a tree."""
    return {storage_key(part) for t in tensors_in(tree) for part in plain_tensors(t)}


def storages(own: dict[str, Tensor]) -> dict[int, str]:
    """Names by storage."""
    return {storage_key(part): name for name, t in own.items() for part in plain_tensors(t)}


def _sizes(parameters: dict[str, Tensor], buffers: dict[str, Tensor], batch: Any) -> Sizes:
    """Bytes of the model's and the batch's storages, each once."""
    sizes, seen = Sizes(), set[int]()
    count(parameters, sizes, seen)
    sizes.buffers = fresh(buffers.values(), seen)
    sizes.batch = fresh(tensors_in(batch), seen)
    return sizes


def count(parameters: dict[str, Tensor], sizes: Sizes, seen: set[int]) -> None:
    """Adds parameters to the sizes: storages once, numbers of each that is trained."""
    trained = list({id(t): t for t in parameters.values() if t.requires_grad}.values())
    sizes.trainable += fresh(trained, set(seen))
    sizes.trainable_numbers += sum(part.numel() for t in trained for part in plain_tensors(t))
    sizes.parameters += fresh(parameters.values(), seen)


def fresh(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Bytes of the storages that are not in `seen`, which has them afterwards."""
    parts = {storage_key(part): part for t in tensors for part in plain_tensors(t)}
    new = [part for key, part in parts.items() if key not in seen]
    seen.update(parts)
    return sum(storage_bytes(part) for part in new)


def _devices(tensors: Iterable[Tensor]) -> list[int]:
    """The GPUs that a step draws from generators of: a model may lie on several."""
    return sorted({t.get_device() for t in tensors if t.is_cuda})
