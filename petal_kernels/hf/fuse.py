"""fuse(model): LoRA layers that PEFT has put into a model, run by our operators; and unfuse.

The classes of the layers change, and of the modules around them whose linears may run in one call;
nothing else does: no parameter, name, hook or option, so that PEFT, optimizers and engines find
what they found before. What a call does is decided by PEFT's state at that time.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from torch import nn

from petal_kernels._runtime import checks, keywords
from petal_kernels.hf.fuse_report import fuse_report
from petal_kernels.hf.linears import Seen, walk
from petal_kernels.hf.methods.lora_parts import fused_mlp, one_input_parts
from petal_kernels.hf.parts import Adapted, Both, Part, adapted_class, own_class
from petal_kernels.hf.peft_layers import (
    Around,
    FusedLora,
    fused_class,
    is_peft_layer,
    leave,
    plain_class,
    why_not_fused,
)
from petal_kernels.hf.report import Report, check_tokens
from petal_kernels.hf.wrappers import AdaptedLinear
from petal_kernels.nn.arguments import check_module


@keywords.checked()
def fuse(
    model: nn.Module, *, recompute_mlp: bool = False, tokens: tuple[int, int] = (8, 128)
) -> Report:
    """Lets PEFT's LoRA layers in `model`, a PeftModel or any module that holds some, run through
    this package's operators, and says what runs how; print it.

    Each layer keeps its parameters, its place, its hooks and the name of its class (a subclass by
    the same name is put in front), and goes on being PEFT's: adapters are added, switched, merged
    or saved as before. Calls that the operators do not cover run PEFT's own forward: while adapters
    are merged or disabled, with several active at once or one for each sample, with a variant such
    as DoRA. A base that is quantised, sharded or hooked is called and its update fused. Linears
    that read one tensor run in one call, and so does an MLP; with `recompute_mlp` only what it
    reads is kept for backward. Dropout draws other masks than PEFT's from the same seed. The update
    is computed in autocast's dtype, else in x's, with fp32 sums; of fp32 adapters on a 16-bit base
    without autocast PEFT computes it in fp32 (`peft_layers.py`). There is no second derivative.

    Layers that PEFT adds later are not fused: call it again, which changes nothing else. `tokens`
    (samples, tokens of each) are the input that the report speaks of.

    Raises TypeError or ValueError where there is no layer to fuse, leaving the model as it was.
    """
    check_module("model", model)
    checks.check_bool("recompute_mlp", recompute_mlp)
    check_tokens(tokens)
    layers = {seen.path: seen for seen in walk(model) if is_peft_layer(seen.module)}
    if is_peft_layer(model):
        layers = {"": Seen("", model, "language", model)}
    declined = {path: why for path, seen in layers.items() if (why := why_not_fused(seen.module))}
    _check_some(model, layers, declined)
    unfuse(model)
    fused = [seen for path, seen in layers.items() if path not in declined]
    for seen in fused:
        seen.module.__class__ = fused_class(type(seen.module))
    for parent in dict.fromkeys(seen.parent for seen in fused):
        _join(parent, recompute_mlp)
    return fuse_report(model, layers, declined, tokens)


def unfuse(model: nn.Module) -> nn.Module:
    """Gives every module its own class back, and returns the model; a model that `fuse` has not
    touched stays as it is."""
    check_module("model", model)
    around = [m for m in model.modules() if isinstance(m, Around)]
    fused = [m for m in model.modules() if isinstance(m, FusedLora)]
    own = [adapted_class(own_class(m), Around) for m in around]
    own += [fused_class(plain_class(m)) for m in fused]
    for module, cls in zip((*around, *fused), own, strict=True):
        if type(module) is not cls:
            raise RuntimeError(
                f"unfuse: the class of a module was changed since fuse (a "
                f"{type(module).__name__}); undo that first"
            )
    for module in around:
        leave(module)
    for module in fused:
        module.__class__ = plain_class(module)
    return model


def _check_some(model: nn.Module, layers: Mapping[str, Seen], declined: Mapping[str, str]) -> None:
    """ValueError where nothing can be fused."""
    if len(declined) < len(layers):
        return
    what = "none"
    if layers:
        path, why = next(iter(declined.items()))
        what = f"{len(layers)} others, {path or 'itself'} first: {why}"
    if any(_is_attached(module) or isinstance(module, Adapted) for module in model.modules()):
        what += "; pk.attach has adapted it, and runs by these operators already: leave fuse out"
    raise ValueError(
        f"model: want a model with LoRA layers of PEFT's, got a {type(model).__name__} with {what}"
    )


def _join(parent: nn.Module, recompute: bool) -> None:
    """Lets a module around fused layers run several in one call, where its code says so."""
    if "_petal" in parent.__dict__ or is_peft_layer(parent):
        return
    mlp = fused_mlp(None, parent, recompute)
    found = one_input_parts(None, parent) if mlp is None else [mlp]
    # What an attachment says of its linears, on or off, is not known here.
    parts: list[Part] = [p for p in found if not any(map(_is_attached, p.members.values()))]
    if parts:
        parent.__dict__["_petal"] = functools.reduce(Both, parts)
        parent.__class__ = adapted_class(type(parent), Around)


def _is_attached(member: nn.Module) -> bool:
    return isinstance(member, AdaptedLinear)
