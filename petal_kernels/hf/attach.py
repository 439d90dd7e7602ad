"""attach(model, config) -> Attachment: adapted layers in one model instance.

The way of a call:

1. here: what is already adapted or wrapped is refused (`holders.py`), and a config is read, copied
   and checked (`asked.py`), before anything is changed;
2. `method_of(config)` (`methods/`) makes the `Method`: its `find` gives the places to adapt
   (`found.py` by the table of models and `roles.py`, or `linears.py` by names), its `build` the
   trainable `adapter`;
3. `Attachment` (`attachment.py`) freezes the model, and the method's `install` calls `Installed`
   (`installed.py`): `wrap` puts a wrapper where a linear stands, `take` puts a part (`parts.py`) on
   a layer, stack or block by a class of its own; the adapter becomes `model.petal`;
4. where a file gives values they are loaded, else the adapter keeps those it began with.

From then on the model runs itself: parts and wrappers call the method, which calls `nn` and `ops`.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from petal_kernels._runtime import keywords
from petal_kernels.hf import formats, tensors
from petal_kernels.hf.asked import Read, asked, checked, in_file
from petal_kernels.hf.attachment import Attachment
from petal_kernels.hf.config import METHODS, AdapterConfig
from petal_kernels.hf.frozen import frozen_of_peft
from petal_kernels.hf.holders import check_holders, check_wrapped
from petal_kernels.hf.merging import HANDLE, NAME
from petal_kernels.hf.methods import method_of
from petal_kernels.hf.report import Report
from petal_kernels.hf.several import DEFAULT, IMPLEMENTATIONS, check_name
from petal_kernels.hf.twins import skeleton
from petal_kernels.nn.arguments import check_choice


def _of_configs() -> dict[str, str]:
    """What is said of a config's field that is given to `attach` itself."""
    having: dict[str, list[str]] = {}
    for config in METHODS.values():
        for field in dataclasses.fields(config):
            having.setdefault(field.name, []).append(config.__name__)
    return {
        name: f"a field of {', '.join(configs)}: want it in the config, {configs[0]}({name}=...)"
        for name, configs in having.items()
    }


@keywords.checked(_of_configs)
def attach(
    model: nn.Module,
    config: AdapterConfig | str | os.PathLike[str] | Any,
    *,
    implementation: str = "fused",
    checkpoint: str | os.PathLike[str] | None = None,
    name: str = DEFAULT,
) -> Attachment:
    """Freezes `model`, adapts its layers in place and returns the handle of what was done.

    `config` is a config of one of the methods, a LoraConfig of PEFT's, or the directory of a saved
    adapter, this package's or a LoRA adapter that PEFT saved; or its repository on the Hugging Face
    Hub ("user/name", where there is no directory of that name).
    `checkpoint` is a state dict that the method's authors trained with their own code, for a config
    with variant="release" (`Attachment.load_checkpoint`).
    `implementation` is "fused" or "published" (the eager form of the papers over the same
    parameters: the reference). `name` is by what `Attachment.switch` finds this adapter among
    others. Raises ValueError where nothing matches, leaving the model as it was.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: want a torch.nn.Module, got a {type(model).__name__}")
    _check_free(model)
    check_name(name)
    config, saved = asked(config, model, checkpoint)
    check_holders(model)
    frozen = frozen_of_peft(model)
    if saved is None:
        made = _attach(model, config, implementation, name)
        if checkpoint is not None:
            _load_checkpoint(made, checkpoint)
    else:
        made = _attach_saved(model, saved, config, implementation, name)
    for note in filter(None, (*made.method.found.notes, frozen)):
        warnings.warn(f"attach: {note}", stacklevel=3)
    return made


@keywords.checked(_of_configs)
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
    config = checked(config, model)
    check_wrapped(model, [])
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


def _attach(
    model: nn.Module,
    config: AdapterConfig,
    implementation: str,
    name: str = DEFAULT,
    *,
    loads: bool = False,
) -> Attachment:
    """The attachment; what fails on the way gives the model back as it was. `loads`: its values
    come from a file."""
    published = implementation == "published"
    method = method_of(config)(model, config, published=published, loads=loads)
    made = Attachment.__new__(Attachment)
    try:
        made.__init__(model, method, implementation, name)  # type: ignore[misc]
        made.installed.shapes.update(tensors.shapes_of(made.state_dict()))
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
    model: nn.Module, saved: Read, config: AdapterConfig, implementation: str, name: str
) -> Attachment:
    with in_file(saved):
        made = _attach(model, config, implementation, name, loads=True)
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
            "attached? detach it first: pk.attachment(model).detach(); or give it a second adapter "
            "beside this one: pk.attachment(model).add(name, config))"
        )
    for path, part in model.named_modules():
        if path and isinstance(getattr(part, NAME, None), nn.Module):
            raise ValueError(
                f"model: want a model whose parts have no adapter yet, got one at {path!r}, which "
                "would be frozen; attach to the whole model first, then to its part"
            )
