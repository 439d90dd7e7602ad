"""profile(model, batch): one training step under the recorders."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from petal_kernels.memory import gradients
from petal_kernels.memory.arguments import check_step
from petal_kernels.memory.behind import module_behind
from petal_kernels.memory.cuda_rules import RULE, unruled
from petal_kernels.memory.leaves import Leaves, without_gradients
from petal_kernels.memory.modules import frozen_subtrees
from petal_kernels.memory.optimizer import Trained
from petal_kernels.memory.profile import Profile
from petal_kernels.memory.recording import (
    LARGEST_BUFFER,
    Meter,
    Recorders,
    count,
    fresh,
    keys,
    recording,
    storages,
)
from petal_kernels.memory.records import Saved, mib, plain_tensors, storage_key, tensors_in
from petal_kernels.memory.rest import Rest
from petal_kernels.memory.saved import SavedTensors
from petal_kernels.memory.timeline import Timeline

_NO_HOOKS = "support saved tensor hooks"


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
                the model (`fake_tensors`); beside a fake model real ones keep their values, which
                its shapes may depend on (ids among which are those of images, sizes of images).
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
    with recording(module, batch, parameters, cuda_rules, accumulate, hooks) as r:
        timeline, recorder, leaves, asking = r.timeline, r.recorder, r.leaves, r.asking
        trained = list(asking.values())
        timeline.begin("forward")
        with r.meter.measure("forward"), recorder, leaves:
            output = _call(model, batch)
            objective = _objective(output) if loss is None else _checked(loss(output))
        results = [objective, *tensors_in(output)]
        saved = _saved(r, results, batch)
        rest = Rest(timeline, results, objective, module, recorder.regions, r.stack)
        if backward and recorder.before:
            raise ValueError(
                f"model: the step goes back into a graph made before it ({recorder.before}), which "
                "its backward would use up; detach what the step reads, or give backward=False"
            )
        # What an optimizer moves: parameters of no given module are trained all the same.
        asking |= {name: t for name, t in leaves.parameters.items() if t.requires_grad}
        others = leaves.trained(recorder.nodes)
        r.contexts.enter_context(without_gradients(others, trained))
        del output, results
        rest.outputs_dropped()
        recorder.nodes = {}
        if backward and objective.requires_grad:
            _backward(objective, asking.values(), timeline, r.meter)
            if accumulate:
                gradients.forget_the_unreached(r.there, trained, timeline)
        del objective
        gradients.count(asking, r.there, r.sizes)
        moved = [gradients.as_moved(*each) for each in asking.items()]
        saved += rest.graph_dropped(r.sizes)
    return _result(r, model, module, saved, moved, backward)


def _saved(r: Recorders, results: list[Tensor], batch: Any) -> list[Saved]:
    """The records of what the forward leaves; parameters of no given module count from here on."""
    met = r.leaves.parameters
    count(met, r.sizes, set(storages(r.own | r.buffers)))
    saved, r.sizes.saved_parameters = r.recorder.records(
        results,
        storages(r.own | r.buffers | met | r.leaves.gathered),
        keys(batch),
        {id(t) for t in [*r.own.values(), *met.values()] if t.requires_grad},
        r.timeline,
    )
    return saved


def _result(
    r: Recorders,
    model: Callable[..., Any],
    module: nn.Module | None,
    saved: list[Saved],
    moved: list[Trained],
    backward: bool,
) -> Profile:
    peak = r.timeline.peak_step()
    notes = _notes(r.recorder, r.leaves, r.changed)
    return Profile(
        saved=saved,
        sizes=r.sizes,
        live=r.timeline.live,
        phases=r.timeline.phases,
        peak_step=peak,
        peak_phase=r.timeline.phase_at(peak),
        blocks=r.timeline.blocks,
        recomputed=r.timeline.recomputed,
        checkpointed=r.recorder.checkpointed,
        compiled=r.recorder.compiled,
        notes=[*notes, *(unruled(model, module) if r.rules else [])],
        training=module is None or module.training,
        fake=r.fake,
        rule=RULE if r.rules else "",
        frozen=frozen_subtrees(r.stack.roles),
        trained=frozenset(r.asking),
        seconds=r.meter.seconds,
        device_bytes=r.meter.bytes,
        parameters=moved,
        backward=backward,
    )


def _backward(
    objective: Tensor, trained: Iterable[Tensor], timeline: Timeline, meter: Meter
) -> None:
    gradient = torch.ones_like(objective)
    timeline.begin("backward")
    with meter.measure("backward"):
        torch.autograd.backward(objective, gradient)
    # Gradients may be pieces of one storage, as engines that shard or bucket them make them.
    parts = [part for t in trained if t.grad is not None for part in plain_tensors(t.grad)]
    for key in {storage_key(part): part for part in parts}:
        timeline.categorise(key, "gradients")


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
        size = fresh(leaves.parameters.values(), set())
        notes.append(
            f"{len(leaves.parameters)} parameters ({mib(size)}) are of no module that was given: "
            "they do not count as kept; give module= for the names of who keeps what"
        )
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        notes.append(
            "the step itself changed what is not put back (an optimizer in a hook, a buffer of "
            f"more than {mib(LARGEST_BUFFER)}): {', '.join(changed[:3])}{more}"
        )
    return notes
