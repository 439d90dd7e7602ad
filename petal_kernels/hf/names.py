"""The name of a module wherever its model stands: bare, under a head, or inside wrappers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

from torch import nn

# torch.compile, DDP and DataParallel, FSDP1, torch's checkpoint_wrapper.
WRAPPERS = frozenset(("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))

ValueT = TypeVar("ValueT")


def canonical(path: str, prefixes: Sequence[str]) -> str:
    """`path` without wrappers, wherever they stand in it, and without the name under which a model
    with a head holds its base model (`prefixes`: transformers' base_model_prefix): "" is the root.
    """
    parts = [part for part in path.split(".") if part not in WRAPPERS]
    for prefix in sorted(prefixes, key=len, reverse=True):
        front = prefix.split(".") if prefix else []
        if front and parts[: len(front)] == front:
            return ".".join(parts[len(front) :])
    return ".".join(parts)


def prefixes_of(model: nn.Module) -> tuple[str, ...]:
    """The base_model_prefix of the outermost module that has one; of its parts none counts, since
    theirs are not in front."""
    for module in model.modules():
        prefix = getattr(module, "base_model_prefix", None)
        if isinstance(prefix, str):
            return (prefix,) if prefix else ()
    return ()


def renamed(
    given: Mapping[str, ValueT], wanted: Collection[str], prefixes: Sequence[str], within: str
) -> dict[str, ValueT]:
    """`given` under the `wanted` names: below `within`, one that is not wanted gets the name with
    which it is one by `canonical`, if exactly one is free. All others stay as they are."""
    free: dict[str, list[str]] = {}
    for name in wanted:
        if name.startswith(within) and name not in given:
            free.setdefault(canonical(name.removeprefix(within), prefixes), []).append(name)
    strange: dict[str, list[str]] = {}
    for name in set(given) - set(wanted):
        if name.startswith(within):
            strange.setdefault(canonical(name.removeprefix(within), prefixes), []).append(name)
    names = {
        olds[0]: free[root][0]
        for root, olds in strange.items()
        if len(olds) == 1 and len(free.get(root, ())) == 1
    }
    return {names.get(name, name): value for name, value in given.items()}
