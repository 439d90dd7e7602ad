"""Who holds a model: an engine would not know parameters that come, or change, behind its back."""

from __future__ import annotations

import gc
import warnings

from torch import nn

from petal_kernels.hf.merging import HANDLE

# Engines that registered the parameters they found when they wrapped the model.
_ENGINES = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")


def check_holders(model: nn.Module) -> None:
    """ValueError where an engine holds the model already: it would not know the adapter's
    parameters. A warning where the model is a part of one that stays trainable."""
    if not holders_of(model):
        check_wrapped(model, [])
        return
    gc.collect()  # one that nobody has any more may wait for that
    holders = holders_of(model)
    check_wrapped(model, holders)
    if not holders:
        return
    meant = [model, *(m for m in holders[-1].modules() if HANDLE in m.__dict__)]
    own = {id(parameter) for module in meant for parameter in module.parameters()}
    loose = [
        name
        for name, parameter in holders[-1].named_parameters()
        if parameter.requires_grad and id(parameter) not in own
    ]
    if loose:
        warnings.warn(
            f"attach: {len(loose)} parameters of the {type(holders[-1]).__name__} that holds this "
            f"{type(model).__name__} stay trainable, {loose[0]} first; freeze them "
            "(requires_grad_(False) on the whole model before attach) unless that is meant",
            stacklevel=4,
        )


def check_wrapped(model: nn.Module, holders: list[nn.Module]) -> None:
    """ValueError where an engine is in the model or among its holders."""
    engine = next((m for m in (*model.modules(), *holders) if _is_engine(m)), None)
    if engine is not None:
        raise ValueError(
            f"model: want a model that is not wrapped yet, got one in a {type(engine).__name__}, "
            "which would not know the adapter's parameters; attach first, then wrap"
        )


def _is_engine(module: nn.Module) -> bool:
    return any(cls.__name__ in _ENGINES for cls in type(module).__mro__)


def holders_of(model: nn.Module) -> list[nn.Module]:
    """The modules that hold this one, the nearest first. Modules do not know them: the collector
    does. For a model that nothing holds it is asked once."""
    found: list[nn.Module] = []
    nearest = [model]
    while nearest:
        known = {id(module) for module in (model, *found)}
        nearest = [p for each in nearest for p in _parents(each) if id(p) not in known]
        found += nearest
    return found


def _parents(module: nn.Module) -> list[nn.Module]:
    """The modules whose child `module` is."""

    def owners(value: object) -> list[object]:
        return [each for each in gc.get_referrers(value) if each is not value]

    children = [
        each
        for each in owners(module)
        if type(each) is dict
        and all(child is None or isinstance(child, nn.Module) for child in each.values())
    ]
    parents: list[nn.Module] = []
    for held in children:
        for owner in owners(held):
            # Python keeps attributes in a dictionary of their own, or in the object itself.
            holders = owners(owner) if type(owner) is dict else [owner]
            parents += [
                each
                for each in holders
                if isinstance(each, nn.Module) and each.__dict__.get("_modules") is held
            ]
    return parents
