"""The tensors of an adapter on their way to a file and back: all of them, whole, and as wanted.

A DTensor, as FSDP2's `fully_shard` makes them, is gathered here, which takes every process of its
mesh. FSDP1 and DeepSpeed leave a piece of a parameter or nothing in its place, which only they can
gather, inside a block of theirs; outside of it they are refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Size, Tensor

from petal_kernels._runtime.checks import FLOATING

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

EXTRA = "modules_to_save"  # prefix of the tensors of modules trained whole

_WAY_OUT = (
    "sharded by an engine: on every process {call} inside `with FullyShardedDataParallel."
    "summon_full_params(model{more}):` (FSDP, use_orig_params=True) or `with deepspeed.zero."
    "GatheredParameters(list(att.adapter.parameters()){rank}):` (DeepSpeed)"
)
_SAVE = _WAY_OUT.format(call="save", more=", writeback=False", rank="")
_LOAD = _WAY_OUT.format(call="load", more="", rank=", modifier_rank=0") + ", or before sharding"
_SHOWN = 120  # characters of a list of names


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, Size]:
    """Names and shapes, by which a state is later known to be whole."""
    return {name: tensor.shape for name, tensor in state.items()}


def gathered(
    what: str, state: Mapping[str, Tensor], shapes: Mapping[str, Size] | None = None
) -> dict[str, Tensor]:
    """`state` with every tensor whole; ValueError for one without values and, by the `shapes` that
    it had before any engine came, for one that is missing or in pieces."""
    _check_whole(what, state, shapes, _SAVE)
    return {name: _full(what, name, tensor) for name, tensor in state.items()}


def check_loadable(
    what: str, state: Mapping[str, Tensor], shapes: Mapping[str, Size] | None = None
) -> None:
    """ValueError unless the tensors of `state` can take values, as `gathered` says it."""
    _check_whole(what, state, shapes, _LOAD)


def _check_whole(
    what: str, state: Mapping[str, Tensor], shapes: Mapping[str, Size] | None, way_out: str
) -> None:
    lost = sorted(set(shapes or ()) - set(state))
    if lost:
        raise ValueError(f"{what}: want the parameter {lost[0]}, got none of that name; {way_out}")
    for name, tensor in state.items():
        if tensor.is_meta:
            raise ValueError(
                f"{what}: want tensors with values, got {name} on the meta device; give the model "
                "its weights first"
            )
        want = (shapes or {}).get(name)
        if not tensor.numel() or (want is not None and tensor.shape != want):
            wanted = f"shape {list(want)}" if want else "all its values"
            got = list(tensor.shape)
            raise ValueError(f"{what}: {name}: want {wanted}, got shape {got}; {way_out}")


def is_sharded(tensor: Tensor | None) -> TypeGuard[DTensor]:
    """Whether it is a DTensor."""
    # Where nobody imported it there is none.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _full(what: str, name: str, tensor: Tensor) -> Tensor:
    if is_sharded(tensor):
        if not torch.distributed.is_initialized():
            raise RuntimeError(
                f"{what}: {name}: want the process group that it is sharded over, got none; call "
                "it on every process, before destroy_process_group()"
            )
        # Offloaded parameters are sent by the mesh's devices, too.
        there = cast("DTensor", tensor.to(tensor.device_mesh.device_type))
        return there.full_tensor()
    return tensor


@torch.no_grad()
def copy_in(what: str, state: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copies `values` into the tensors of `state`, into each its own part where it is sharded."""
    whole = {name: _full(what, name, values[name]) for name in state}
    for name, tensor in state.items():
        tensor.copy_(_part_of(whole[name], tensor) if is_sharded(tensor) else whole[name])


def _part_of(value: Tensor, like: DTensor) -> Any:
    from torch.distributed.tensor import distribute_tensor

    value = value.to(like.device, like.dtype)
    # Every process has read all of it: nothing is sent.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def check_tensors(where: str, got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    """ValueError unless `got` has the names and shapes of `want`, and dtypes that fit."""
    missing, unexpected = sorted(set(want) - set(got)), sorted(set(got) - set(want))
    if missing or unexpected:
        raise ValueError(
            f"{where}: missing keys {_some(missing)}, unexpected keys {_some(unexpected)}"
            f"{_another_root(missing, unexpected)}"
        )
    for name, tensor in want.items():
        if got[name].shape != tensor.shape:
            raise ValueError(
                f"{where}: {name}: want shape {list(tensor.shape)}, got {list(got[name].shape)}"
            )
        if not _fits(name, got[name].dtype, tensor.dtype):
            raise ValueError(
                f"{where}: {name}: want {tensor.dtype} (or what converts to it exactly), "
                f"got {got[name].dtype}"
            )


def _fits(name: str, got: torch.dtype, want: torch.dtype) -> bool:
    """Adapters are only ever widened; modules trained whole follow the dtype of their base."""
    if name.startswith(EXTRA + "."):
        return got.is_floating_point == want.is_floating_point
    if not want.is_floating_point:
        return got == want
    return got in FLOATING and torch.promote_types(got, want) == want


def _some(names: list[str]) -> str:
    """A list of names in words; of a long one the count and its first ones."""
    if len(str(names)) <= _SHOWN:
        return str(names)
    shown: list[str] = []
    for name in names:
        name = name if len(name) <= _SHOWN else f"{name[: _SHOWN // 2]}...{name[-_SHOWN // 2 :]}"
        if shown and len(str([*shown, name])) > _SHOWN:
            break
        shown.append(name)
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"{shown}{more}"


def _another_root(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """A word on keys that are all there with something more, or less, in front."""
    head = f"{EXTRA}."
    ours, theirs = ({name.removeprefix(head) for name in each} for each in (missing, unexpected))
    for mine, others, how in ((ours, theirs, "with"), (theirs, ours, "without")):
        for prefix in _prefixes(mine, others):
            if all(prefix + name in others for name in mine):
                return f"; another root: they are there {how} {prefix!r} in front"
    return ""


def _prefixes(names: set[str], longer: set[str]) -> set[str]:
    """What may stand in front of each of `names` among `longer`."""
    if not names:
        return set()
    first = min(names)
    found = {each.removesuffix(first) for each in longer if each.endswith(f".{first}")}
    return {prefix for prefix in found if len(prefix) <= _SHOWN}
