"""profile(model, batch): one training step under the recorders."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from petal_kernels.memory import gradients
from petal_kernels.memory.arguments import check_step
from petal_kernels.memory.cuda_rules import RULE
from petal_kernels.memory.cuda_rules import cuda_rules as as_on_cuda
from petal_kernels.memory.fake import mode_of
from petal_kernels.memory.modules import ModuleStack, frozen_subtrees
from petal_kernels.memory.profile import Profile
from petal_kernels.memory.records import (
    Sizes,
    plain_tensors,
    storage_bytes,
    storage_key,
    tensors_in,
)
from petal_kernels.memory.saved import SavedTensors
from petal_kernels.memory.timeline import Timeline


def profile(
    model: nn.Module | Callable[..., Any],
    batch: Any = (),
    *,
    loss: Callable[[Any], Tensor] | None = None,
    backward: bool = True,
    module: nn.Module | None = None,
    parameters: Iterable[Tensor] = (),
    cuda_rules: bool | None = None,
    accumulate: bool | None = None,
) -> Profile:
    """Runs `model` on `batch` once and says what it keeps for backward and what is alive when.

    model       a module in the mode it trains in (dropout keeps nothing in evaluation mode), or a
                function.
    batch       a mapping is given as keyword arguments, a tuple or a list as positional ones,
                anything else as the only argument. Real tensors, on CPU or CUDA, or fake ones, like
                the model (`fake_tensors`).
    loss        of the model's output; default: its `loss`, or the sum of the tensors that it
                returns, which keeps nothing.
    backward    also run the backward, for the timeline; gradients that were there are put back.
    accumulate  whether gradients are there before the step and are added to, as in a micro-batch
                after the first, or after zero_grad(set_to_none=False): True of every
                parameter that the backward reaches, False of none; default: of those that have one
                now.
    module      where `model` is a function: the module inside, whose parts the records name.
    parameters  tensors that do not count, beside those of the module: they stay anyway.
    cuda_rules  let attention and dropout keep what CUDA's operators keep; default: on fake tensors.

    The step draws from torch's generators and gives them back as they were; statistics of batch
    norms move on. Tensors that other saved-tensor hooks take away (save_on_cpu) are not seen.
    """
    parameters = check_step(model, loss, backward, module, parameters, cuda_rules, accumulate)
    module = model if isinstance(model, nn.Module) else module
    own, buffers = _own_tensors(module, parameters)
    asking = {name: t for name, t in own.items() if t.requires_grad}
    trained = list(asking.values())
    mode = mode_of(module, batch)
    rules = mode is not None if cuda_rules is None else cuda_rules
    cuda = mode is None and any(t.is_cuda for t in [*own.values(), *tensors_in(batch)])
    sizes = _sizes(own, buffers, batch)
    stack = ModuleStack(module)
    timeline, meter, recorder = Timeline(stack), _Meter(cuda), SavedTensors(stack)
    for category, tensors in (("parameters", own), ("buffers", buffers)):
        for name, t in tensors.items():
            timeline.add(t, category, name)
    for t in tensors_in(batch):
        timeline.add(t, "batch", "batch")
    with contextlib.ExitStack() as contexts:
        contexts.callback(timeline.close)
        devices = [torch.cuda.current_device()] if cuda else []
        contexts.enter_context(torch.random.fork_rng(devices=devices))
        there = contexts.enter_context(gradients.put_back(trained, accumulate))
        gradients.add_earlier(asking, timeline)
        if mode is not None:
            contexts.enter_context(mode)
        if rules:
            contexts.enter_context(as_on_cuda())
        contexts.enter_context(stack)
        contexts.enter_context(timeline)
        timeline.begin("forward")
        with meter.measure("forward"), recorder:
            output = _call(model, batch)
            objective = (loss or _objective)(output)
        results = [objective, *tensors_in(output)]
        saved, sizes.saved_parameters = recorder.records(
            results, _storages(own | buffers), _keys(batch), {id(t) for t in trained}, timeline
        )
        _account_for_the_rest(timeline, results, sizes)
        del output, results
        if backward and objective.requires_grad:
            _backward(objective, trained, timeline, meter)
            if accumulate:
                gradients.forget_the_unreached(there, trained, timeline)
        del objective
        gradients.count(asking, there, sizes)
        moved = [gradients.as_moved(*each) for each in asking.items()]
    peak = timeline.peak_step()
    return Profile(
        saved=saved,
        sizes=sizes,
        live=timeline.live,
        phases=timeline.phases,
        peak_step=peak,
        peak_phase=timeline.phase_at(peak),
        blocks=timeline.blocks,
        recomputed=timeline.recomputed,
        checkpointed=recorder.checkpointed,
        training=module is None or module.training,
        fake=mode is not None,
        rule=RULE if rules else "",
        frozen=frozen_subtrees(stack.roles),
        trained=frozenset(asking),
        seconds=meter.seconds,
        device_bytes=meter.bytes,
        parameters=moved,
        backward=backward,
    )


def _backward(objective: Tensor, trained: list[Tensor], timeline: Timeline, meter: _Meter) -> None:
    gradient = torch.ones_like(objective)
    timeline.begin("backward")
    with meter.measure("backward"):
        objective.backward(gradient)
    for t in trained:
        if t.grad is not None:
            for part in plain_tensors(t.grad):
                timeline.categorise(storage_key(part), "gradients")


class _Meter:
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


def _call(model: Callable[..., Any], batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def _objective(output: Any) -> Tensor:
    found = getattr(output, "loss", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("loss")
    if isinstance(found, Tensor):
        return found
    parts = [t.sum() for t in tensors_in(output) if t.requires_grad]
    if not parts:
        tensors = [t for t in tensors_in(output) if t.is_floating_point()]
        if not tensors:
            raise ValueError(
                "model: want an output with tensors in it to derive, got "
                f"{type(output).__name__}; give loss=function of the output"
            )
        parts = [t.sum() for t in tensors]
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.dtype)
    return total


def _own_tensors(
    module: nn.Module | None, more: Iterable[Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters, those given by hand among them, and buffers, by name."""
    parameters: dict[str, Tensor] = {f"parameter {i}": t for i, t in enumerate(more)}
    if module is None:
        return parameters, {}
    return parameters | dict(module.named_parameters()), dict(module.named_buffers())


def _keys(tree: Any) -> set[int]:
    return {storage_key(part) for t in tensors_in(tree) for part in plain_tensors(t)}


def _storages(own: dict[str, Tensor]) -> dict[int, str]:
    return {storage_key(part): name for name, t in own.items() for part in plain_tensors(t)}


def _sizes(parameters: dict[str, Tensor], buffers: dict[str, Tensor], batch: Any) -> Sizes:
    """Bytes of the model's and the batch's storages, each once."""
    sizes = Sizes()
    seen: set[int] = set()

    def fresh(t: Tensor) -> int:
        total = 0
        for part in plain_tensors(t):
            if storage_key(part) not in seen:
                seen.add(storage_key(part))
                total += storage_bytes(part)
        return total

    for t in parameters.values():
        size = fresh(t)
        sizes.parameters += size
        if t.requires_grad and size:
            sizes.trainable += size
            sizes.trainable_numbers += t.numel()
    sizes.buffers = sum(fresh(t) for t in buffers.values())
    sizes.batch = sum(fresh(t) for t in tensors_in(batch))
    return sizes


def _account_for_the_rest(timeline: Timeline, outputs: list[Tensor], sizes: Sizes) -> None:
    """What lives at the end of the forward and is not kept by the graph: results, and whatever
    Python holds (a checkpoint's keyword arguments, a cache).
    """
    for t in outputs:
        for part in plain_tensors(t):
            timeline.categorise(storage_key(part), "outputs")
    for block in timeline.alive():
        if block.category == "outputs":
            sizes.outputs += block.bytes
        elif block.category == "temporary":
            block.category = "elsewhere"
            sizes.elsewhere += block.bytes
