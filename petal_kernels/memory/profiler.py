"""profile(model, batch): one training step under the recorders."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from petal_kernels.memory import gradients
from petal_kernels.memory.arguments import check_step
from petal_kernels.memory.behind import module_behind
from petal_kernels.memory.compiled import refused
from petal_kernels.memory.cuda_rules import RULE, unruled
from petal_kernels.memory.cuda_rules import cuda_rules as as_on_cuda
from petal_kernels.memory.fake import mode_of, named_failures
from petal_kernels.memory.leaves import Leaves, buffers_put_back, versions, without_gradients
from petal_kernels.memory.modules import ModuleStack, frozen_subtrees
from petal_kernels.memory.profile import Profile
from petal_kernels.memory.records import (
    MIB,
    Sizes,
    mib,
    plain_tensors,
    storage_bytes,
    storage_key,
    tensors_in,
)
from petal_kernels.memory.rest import Rest
from petal_kernels.memory.saved import SavedTensors
from petal_kernels.memory.timeline import Timeline

_NO_HOOKS = "support saved tensor hooks"
_LARGEST_BUFFER = 16 * MIB  # that is copied, to be put back
# One step at a time: torch counts modes for the whole process.
_ONE = threading.RLock()


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
    module      where `model` is a function: the module inside, whose parts the records name;
                default: the one that the function is bound to or closes over.
    parameters  tensors that do not count, beside those of the module: they stay anyway.
    cuda_rules  let attention and dropout keep what CUDA's operators keep; default: on fake tensors.

    Counted is whatever the forward leaves alive for the backward, by whichever way: saved tensors,
    what other hooks made of them (save_on_cpu), attributes of a custom function's ctx, caches of
    selective checkpoints, closures; not the generators' states that checkpoints keep (5 KB a
    region), nor scalars written in Python. A compiled model stays compiled: its graphs' saved
    tensors count; what compiled code allocates meanwhile is out of sight, and `notes` says so.

    Afterwards gradients (of the batch and of other leaves, too), torch's generators, and buffers of
    at most 16 MiB are what they were, also where the step raises. Hooks of the model run; `notes`
    says if they changed parameters. Other threads may run models meanwhile; two profiles at once
    take turns.

    Raises TypeError or ValueError for arguments that do not fit, and for fake tensors where a
    module asks for values.
    """
    parameters = check_step(model, loss, backward, module, parameters, cuda_rules, accumulate)
    batch = tree_map(_cut, batch)
    if module is None:
        module = model if isinstance(model, nn.Module) else module_behind(model)
    step = functools.partial(
        _profile, model, batch, loss, backward, module, parameters, cuda_rules, accumulate
    )
    try:
        return step(hooks=True)
    except RuntimeError as error:
        if _NO_HOOKS not in str(error):  # functions of torch.func do not run under any
            raise
        return step(hooks=False)


def _profile(
    model: Callable[..., Any],
    batch: Any,
    loss: Callable[[Any], Tensor] | None,
    backward: bool,
    module: nn.Module | None,
    parameters: list[Tensor],
    cuda_rules: bool | None,
    accumulate: bool | None,
    hooks: bool,
) -> Profile:
    own, buffers = _own_tensors(module, parameters)
    asking = {name: t for name, t in own.items() if t.requires_grad}
    trained = list(asking.values())
    mode = mode_of(module, batch)
    rules = mode is not None if cuda_rules is None else cuda_rules
    cuda = mode is None and any(t.is_cuda for t in [*own.values(), *tensors_in(batch)])
    sizes = _sizes(own, buffers, batch)
    stack = ModuleStack(module)
    timeline, meter, recorder = Timeline(stack), _Meter(cuda), SavedTensors(stack, hooks)
    for category, tensors in (("parameters", own), ("buffers", buffers)):
        for name, t in tensors.items():
            timeline.add(t, category, name)
    for t in tensors_in(batch):
        timeline.add(t, "batch", "batch")
    leaves = Leaves(module, set(_storages(own | buffers)) | _keys(batch), timeline)
    with contextlib.ExitStack() as contexts:
        contexts.enter_context(_ONE)
        contexts.callback(timeline.close)
        devices = _devices([*own.values(), *tensors_in(batch)])
        contexts.enter_context(torch.random.fork_rng(devices=devices))
        there = contexts.enter_context(gradients.put_back(trained, accumulate))
        gradients.add_earlier(asking, timeline)
        changed = contexts.enter_context(buffers_put_back(module, _LARGEST_BUFFER))
        written = versions(own)
        if mode is not None:
            contexts.enter_context(mode)
        contexts.enter_context(named_failures(stack, mode))
        if rules:
            contexts.enter_context(refused())
            contexts.enter_context(as_on_cuda())
        contexts.enter_context(timeline)
        timeline.begin("forward")
        with meter.measure("forward"), recorder, leaves:
            output = _call(model, batch)
            objective = _objective(output) if loss is None else _checked(loss(output))
        results = [objective, *tensors_in(output)]
        met = leaves.parameters
        _count(met, sizes, set(_storages(own | buffers)))
        saved, sizes.saved_parameters = recorder.records(
            results,
            _storages(own | buffers | leaves.parameters | leaves.gathered),
            _keys(batch),
            {id(t) for t in [*own.values(), *met.values()] if t.requires_grad},
            timeline,
        )
        rest = Rest(timeline, results, objective, module, recorder.regions, stack)
        if backward and recorder.before:
            raise ValueError(
                f"model: the step goes back into a graph made before it ({recorder.before}), which "
                "its backward would use up; detach what the step reads, or give backward=False"
            )
        # What an optimizer moves: parameters of no given module are trained all the same.
        asking |= {name: t for name, t in met.items() if t.requires_grad}
        others = leaves.trained(recorder.nodes)
        contexts.enter_context(without_gradients(others, trained))
        del output, results
        rest.outputs_dropped()
        recorder.nodes = {}
        if backward and objective.requires_grad:
            _backward(objective, asking.values(), timeline, meter)
            if accumulate:
                gradients.forget_the_unreached(there, trained, timeline)
        del objective
        gradients.count(asking, there, sizes)
        moved = [gradients.as_moved(*each) for each in asking.items()]
        saved += rest.graph_dropped(sizes)
        changed += [name for name, count in versions(own).items() if written[name] != count]
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
        compiled=recorder.compiled,
        notes=[*_notes(recorder, leaves, changed), *(unruled(model, module) if rules else [])],
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


def _backward(
    objective: Tensor, trained: Iterable[Tensor], timeline: Timeline, meter: _Meter
) -> None:
    gradient = torch.ones_like(objective)
    timeline.begin("backward")
    with meter.measure("backward"):
        torch.autograd.backward(objective, gradient)
    # Gradients may be pieces of one storage, as engines that shard or bucket them make them.
    parts = [part for t in trained if t.grad is not None for part in plain_tensors(t.grad)]
    for key in {storage_key(part): part for part in parts}:
        timeline.categorise(key, "gradients")


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
    sizes, seen = Sizes(), set[int]()
    _count(parameters, sizes, seen)
    sizes.buffers = _fresh(buffers.values(), seen)
    sizes.batch = _fresh(tensors_in(batch), seen)
    return sizes


def _count(parameters: dict[str, Tensor], sizes: Sizes, seen: set[int]) -> None:
    """Adds parameters to the sizes: storages once, numbers of each that is trained."""
    trained = list({id(t): t for t in parameters.values() if t.requires_grad}.values())
    sizes.trainable += _fresh(trained, set(seen))
    sizes.trainable_numbers += sum(part.numel() for t in trained for part in plain_tensors(t))
    sizes.parameters += _fresh(parameters.values(), seen)


def _fresh(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Bytes of the storages that are not in `seen`, which has them afterwards."""
    parts = {storage_key(part): part for t in tensors for part in plain_tensors(t)}
    new = [part for key, part in parts.items() if key not in seen]
    seen.update(parts)
    return sum(storage_bytes(part) for part in new)


def _cut(value: Any) -> Any:
    """A tensor of the batch without the caller's graph behind it, which a backward would use up."""
    if isinstance(value, Tensor) and value.grad_fn is not None:
        return value.detach().requires_grad_()
    return value


def _checked(objective: Any) -> Tensor:
    if not isinstance(objective, Tensor) or not objective.is_floating_point():
        got = objective.dtype if isinstance(objective, Tensor) else type(objective).__name__
        raise TypeError(f"loss: want a function that returns a floating-point tensor, got {got}")
    return objective


def _devices(tensors: Iterable[Tensor]) -> list[int]:
    """The GPUs that a step draws from generators of: a model may lie on several."""
    return sorted({t.get_device() for t in tensors if t.is_cuda})


def _notes(recorder: SavedTensors, leaves: Leaves, changed: list[str]) -> list[str]:
    """What limits these figures, in words."""
    notes = []
    if recorder.compiled:
        notes.append(
            "compiled code runs as it is: what its graphs keep is counted, what it allocates "
            "meanwhile is not seen, so that the peak is at least this; for the eager model's "
            'figures profile it under torch.compiler.set_stance("force_eager")'
        )
    if leaves.parameters:
        size = _fresh(leaves.parameters.values(), set())
        notes.append(
            f"{len(leaves.parameters)} parameters ({mib(size)}) are of no module that was given: "
            "they do not count as kept; give module= for the names of who keeps what"
        )
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        notes.append(
            "the step itself changed what is not put back (an optimizer in a hook, a buffer of "
            f"more than {mib(_LARGEST_BUFFER)}): {', '.join(changed[:3])}{more}"
        )
    return notes
