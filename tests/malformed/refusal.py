"""Whether a call is refused as it should be: by a TypeError or ValueError that names the argument,
before any operator of this package ran and before anything was drawn, with the model as it was."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import petal_kernels  # noqa: F401 - defines the operators
from tests.malformed.corruptions import Case, Corruption, malformed

# The check of indices' values is an operator, so that a compiled graph makes it too.
CHECK = torch.ops.petal.expert_dispatch_choice.default


class Watch(TorchDispatchMode):
    """Which of this package's raw operators ran."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "petal" and func is not CHECK:
            self.ran.append(str(func))
        return func(*args, **(kwargs or {}))


def fingerprint(model: nn.Module) -> list[Any]:
    """Objects, values' versions, flags, hooks, classes and modes of a model."""
    found: list[Any] = []
    for path, module in model.named_modules():
        hooks = [len(h) for h in (module._forward_hooks, module._forward_pre_hooks)]
        found.append((path, id(module), type(module), module.training, hooks, set(vars(module))))
        for tensors in (module._parameters, module._buffers):
            for name, t in tensors.items():
                if t is not None:
                    found.append((name, id(t), t._version, t.requires_grad, t.grad is None))
    return found


def wrong(
    case: Case, argument: str, corruption: Corruption, arguments: dict[str, Any]
) -> str | None:
    """What is wrong with how a malformed call was refused; None where nothing is."""
    model = None if case.watched is None else case.watched()
    before = None if model is None else fingerprint(model)
    state = torch.random.get_rng_state()
    watch = Watch()
    try:
        with watch:
            case.call(**arguments)
    except (TypeError, ValueError) as error:
        message = str(error)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:120]}"
    else:
        return "accepted"
    if watch.ran:
        return f"after {watch.ran[0]} had run: {message[:80]}"
    if not torch.equal(state, torch.random.get_rng_state()):
        return f"after something was drawn: {message[:80]}"
    if model is not None and fingerprint(model) != before:
        return f"and changed the model: {message[:80]}"
    if corruption.label in ("missing", "unknown") and f"'{argument}'" in message:
        return None  # Python's own
    wanted = [argument] if corruption.own else [*case.parameters, *case.names]
    named = re.match(r"(\w+)(\[\d+\])?(\.\w+)*: (want|missing|unknown)", message)
    if named is None or named[1] not in wanted + list(case.names):
        return f"not by its name: {message[:120]}"
    if not re.search(r"got|missing", message):
        return f"without what came: {message[:120]}"
    return None


def failures(case: Case) -> tuple[list[str], int]:
    """(what was refused wrongly, the number of malformed calls). A call that is said to be right is
    made too: it is accepted, or refused like any other."""
    found, count = [], 0
    for argument, corruption, arguments in malformed(case):
        legal = case.matches(case.legal, argument, corruption)
        what = wrong(case, argument, corruption, arguments)
        if what is not None and not (legal and what == "accepted"):
            found.append(f"{argument}: {corruption.label}: {what}")
        count += not legal
    return found, count
