"""Whether all processes of a group hold one adapter.

Engines do not ask. DDP compares shapes and sends rank 0's values to all; FSDP2 compares nothing,
and shards in each process what that has. So a rank that loaded another file, or was attached with
another alpha or to other layers of the same widths, trains something that nobody meant, silently.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Size, Tensor

from petal_kernels.hf.files import flat

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_REMEDY = (
    "give every process the same config and file, and seed them alike before attach, or load "
    "one file everywhere"
)
_SHOWN = 60  # characters of a setting


@dataclass
class Held:
    """What a process tells the others of its adapter."""

    settings: dict[str, Any]  # flat: what it computes, and of what base
    values: dict[str, str]  # digests of its tensors; empty for one that is not whole here
    loaded: str  # a digest of what came from a file last; empty where nothing did


def held(
    state: Mapping[str, Tensor],
    shapes: Mapping[str, Size],
    *,
    settings: Mapping[str, Any],
    trained: list[str],
    loaded: str,
) -> Held:
    """Of an adapter's stored tensors; `shapes`: theirs before any engine came, by which one in
    pieces is known."""
    told = flat(settings)
    values = {}
    for name, tensor in state.items():
        shape = shapes.get(name, tensor.shape)
        told[f"shape of {name}"], told[f"dtype of {name}"] = list(shape), str(tensor.dtype)
        values[name] = digest({name: tensor}) if _is_whole(tensor, shape) else ""
    told["trained parameters"] = trained
    return Held(told, values, loaded)


def digest(values: Mapping[str, Tensor]) -> str:
    """Of the tensors' names, shapes, dtypes and bits."""
    found = hashlib.sha256()
    for name in sorted(values):
        value = values[name].detach().cpu().contiguous()
        found.update(f"{name} {list(value.shape)} {value.dtype} ".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def check(mine: Callable[[], Held], group: ProcessGroup | None) -> None:
    """RuntimeError, the same in every process of the group, that names the first whose adapter is
    another than that of its rank 0."""
    from torch import distributed as dist

    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        got = type(group).__name__
        raise TypeError(f"group: want None or a torch.distributed.ProcessGroup, got a {got}")
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, mine(), group)
    found = {rank: what for rank in range(1, len(told)) if (what := _other(told[0], told[rank]))}
    if not found:
        return
    rank, what = next(iter(found.items()))
    more = f" (and {len(found) - 1} other ranks differ)" if len(found) > 1 else ""
    raise RuntimeError(
        f"check_ranks: want one adapter in every process, got another on rank {rank} than on rank "
        f"0: {what}{more}; {_REMEDY}"
    )


def _other(want: Held, got: Held) -> str:
    """How an adapter differs from rank 0's; empty where it does not."""
    for name in {**want.settings, **got.settings}:
        ours, theirs = (each.settings.get(name, "nothing") for each in (want, got))
        if ours != theirs:
            return f"{name}: {_short(ours)} on rank 0, {_short(theirs)} there"
    whole = [name for name in want.values if want.values[name] and got.values[name]]
    changed = [name for name in whole if want.values[name] != got.values[name]]
    if changed:
        return f"other values of {changed[0]} ({len(changed)} of {len(whole)} tensors differ)"
    # One that loads nothing may get rank 0's values from an engine: then they are equal by now.
    compared = len(whole) == len(want.values)
    if want.loaded != got.loaded and (not compared or (want.loaded and got.loaded)):
        return "other values were loaded last"
    return ""


def _is_whole(tensor: Tensor, shape: Size) -> bool:
    """Whether all its values are here: no piece of an engine's, no promise of values."""
    return type(tensor.data) is Tensor and not tensor.is_meta and tensor.shape == shape


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
