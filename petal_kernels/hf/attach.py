"""attach(model, config) -> Attachment: adapted layers in one model instance.

The way of a call:

1. here: a config is read (`formats`, `peft_config`), copied and checked; what is already adapted or
   wrapped is refused, before anything is changed;
2. `method_of(config)` (`methods/`) makes the `Method`: its `find` gives the places to adapt
   (`found.py` by the table of models and `roles.py`, or `linears.py` by names), its `build` the
   trainable `adapter`;
3. `Attachment` (`attachment.py`) freezes the model, and the method's `install` calls it: `wrap`
   puts a wrapper where a linear stands, `take` puts a part (`parts.py`) on a layer, stack or block
   by a class of its own; the adapter becomes `model.petal`;
4. where a file gives values they are loaded, else the adapter keeps those it began with.

From then on the model runs itself: parts and wrappers call the method, which calls `nn` and `ops`.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import warnings
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from petal_kernels.hf import formats, tensors
from petal_kernels.hf.attachment import Attachment
from petal_kernels.hf.config import AdapterConfig
from petal_kernels.hf.files import Saved, path_of
from petal_kernels.hf.merging import HANDLE, NAME
from petal_kernels.hf.methods import method_of
from petal_kernels.hf.peft_config import from_peft, is_peft
from petal_kernels.hf.peft_files import PeftSaved
from petal_kernels.hf.released.load import check_config as check_released
from petal_kernels.hf.report import Report
from petal_kernels.hf.twins import skeleton
from petal_kernels.nn.arguments import check_choice

IMPLEMENTATIONS = ("fused", "published")
# Engines that registered the parameters they found when they wrapped the model.
_ENGINES = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")


def attach(
    model: nn.Module,
    config: AdapterConfig | str | os.PathLike[str] | Any,
    *,
    implementation: str = "fused",
    checkpoint: str | os.PathLike[str] | None = None,
) -> Attachment:
    """Freezes `model`, adapts its layers in place and returns the handle of what was done.

    `config` is a config of one of the methods, a LoraConfig of PEFT's, or the directory of a saved
    adapter, this package's or a LoRA adapter that PEFT saved; or its repository on the Hugging Face
    Hub ("user/name", where there is no directory of that name).
    `checkpoint` is a state dict that the method's authors trained with their own code, for a config
    with variant="release" (`Attachment.load_checkpoint`).
    `implementation` is "fused" or "published" (the eager form of the papers over the same
    parameters: the reference). Raises ValueError where nothing matches, leaving the model as it
    was.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: want a torch.nn.Module, got a {type(model).__name__}")
    _check_free(model)
    saved = None
    if checkpoint is not None:
        path_of(checkpoint, "checkpoint")
    if checkpoint is not None and isinstance(config, (str, os.PathLike)):
        raise ValueError("checkpoint: want None beside a saved adapter, which has its own values")
    if isinstance(config, (str, os.PathLike)):
        saved = formats.read(config)
        config = saved.config_for(model)
    config = _checked(config, model)
    if checkpoint is not None:
        check_released(config)
    _check_holders(model)
    if saved is None:
        made = _attach(model, config, implementation)
        if checkpoint is not None:
            _load_checkpoint(made, checkpoint)
    else:
        made = _attach_saved(model, saved, config, implementation)
    for note in made.method.found.notes:
        warnings.warn(f"attach: {note}", stacklevel=2)
    return made


def plan(
    model: nn.Module,
    config: AdapterConfig | str | os.PathLike[str] | Any,
    *,
    tokens: tuple[int, int] = (8, 128),
) -> Report:
    """The report that `attach(model, config)` would give here; print it.

    The model is not touched: not one attribute of it changes, nothing is allocated and no random
    number is drawn. What attach refuses is refused here too; of a saved adapter its config counts.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: want a torch.nn.Module, got a {type(model).__name__}")
    _check_free(model)
    if isinstance(config, (str, os.PathLike)):
        config = formats.read(config).config_for(model)
    config = _checked(config, model)
    _check_wrapped(model, [])
    twin = skeleton(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return _attach(twin, config, "fused").report(tokens)


def attachment(model: nn.Module) -> Attachment:
    """The handle of an adapted model, of its copy or of what was unpickled; ValueError if it has
    none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: want a torch.nn.Module, got a {type(model).__name__}")
    for module in model.modules():
        handle = module.__dict__.get(HANDLE)
        if isinstance(handle, Attachment):
            return handle
    raise ValueError(
        f"model: want a model that attach has adapted, got a {type(model).__name__} without one"
    )


def _checked(config: Any, model: nn.Module) -> AdapterConfig:
    """A copy, checked again: the caller's object may have been changed since it was made, and may
    be changed for the next run."""
    if is_peft(config):
        return from_peft(config, model)
    if not isinstance(config, AdapterConfig):
        raise TypeError(
            f"config: want a PetalConfig, another method's config or a path, got a "
            f"{type(config).__name__}"
        )
    return dataclasses.replace(config)


def _attach(
    model: nn.Module, config: AdapterConfig, implementation: str, *, loads: bool = False
) -> Attachment:
    """The attachment; what fails on the way gives the model back as it was. `loads`: its values
    come from a file."""
    published = implementation == "published"
    method = method_of(config)(model, config, published=published, loads=loads)
    made = Attachment.__new__(Attachment)
    try:
        made.__init__(model, method, implementation)  # type: ignore[misc]
        made.shapes = tensors.shapes_of(made.state_dict())
    except BaseException:
        if made.__dict__.get("_attached"):
            made.detach()
        raise
    return made


def _load_checkpoint(made: Attachment, checkpoint: str | os.PathLike[str]) -> None:
    try:
        made.load_checkpoint(checkpoint)
    except BaseException:
        made.detach()
        raise


def _attach_saved(
    model: nn.Module, saved: Saved | PeftSaved, config: AdapterConfig, implementation: str
) -> Attachment:
    try:
        made = _attach(model, config, implementation, loads=True)
    except (ValueError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
        # Not what the caller wrote, but what stands in the file.
        raise ValueError(f"{saved.path}: config: {error}") from error
    try:
        saved.check_base(made.signature())
        made._load(saved)
    except BaseException:
        made.detach()
        raise
    return made


def _check_free(model: nn.Module) -> None:
    """ValueError where the model or a part of it has an adapter."""
    if getattr(model, NAME, None) is not None:
        raise ValueError(
            f"model: want a model without a {NAME!r} module, got one that has it (already "
            "attached? detach it first)"
        )
    for path, part in model.named_modules():
        if path and isinstance(getattr(part, NAME, None), nn.Module):
            raise ValueError(
                f"model: want a model whose parts have no adapter yet, got one at {path!r}, which "
                "would be frozen; attach to the whole model first, then to its part"
            )


def _check_holders(model: nn.Module) -> None:
    """ValueError where an engine holds the model already: it would not know the adapter's
    parameters. A warning where the model is a part of one that stays trainable."""
    if not _holders(model):
        _check_wrapped(model, [])
        return
    gc.collect()  # one that nobody has any more may wait for that
    holders = _holders(model)
    _check_wrapped(model, holders)
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
            stacklevel=3,
        )


def _check_wrapped(model: nn.Module, holders: list[nn.Module]) -> None:
    engine = next((m for m in (*model.modules(), *holders) if _is_engine(m)), None)
    if engine is not None:
        raise ValueError(
            f"model: want a model that is not wrapped yet, got one in a {type(engine).__name__}, "
            "which would not know the adapter's parameters; attach first, then wrap"
        )


def _is_engine(module: nn.Module) -> bool:
    return any(cls.__name__ in _ENGINES for cls in type(module).__mro__)


def _holders(model: nn.Module) -> list[nn.Module]:
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
