"""A user's own step: his function, what it takes, what it returns."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from petal_kernels import memory
from petal_kernels.memory.behind import module_behind
from petal_kernels.tools.exits import Refusal
from petal_kernels.tools.memory.options import Options
from petal_kernels.tools.memory.presets import Step

_WANTED = "want (model, batch), (model, batch, loss) or (step, batch, loss or None, module)"


@dataclasses.dataclass(frozen=True)
class Script:
    """A function `build`, by what it takes."""

    text: str  # as it was given
    function: Callable[..., Any]
    options: Options  # given ones, else the function's own defaults, else None
    given: frozenset[str]
    known: frozenset[str]

    def build(self, options: Options) -> Step:
        """The step with these options: those that are given and those that differ are passed on."""
        passed = {
            name: getattr(options, name)
            for name in self.known
            if name in self.given or getattr(options, name) != getattr(self.options, name)
        }
        with _no_exit(self.text):
            result = self.function(**passed)
        return step_of(result, self.text)


@contextlib.contextmanager
def _no_exit(place: str) -> Iterator[None]:
    """A script that leaves the interpreter would give its own exit code for this command's."""
    try:
        yield
    except SystemExit as error:
        raise Refusal(f"--script: {place} left with sys.exit({error.code!r})") from error


def load(text: str, given: dict[str, Any]) -> Script:
    """The function of `FILE[:FUNCTION]`. Raises Refusal where there is none, or where it takes none
    of what is given; what the script itself raises is the script's.
    """
    place, _, name = text.partition(":")
    name = name or "build"
    function = getattr(_module(place), name, None)
    if not callable(function):
        raise Refusal(f"--script: want a function {name}() in {place}, found none")
    known, defaults, anything = _takes(function, name, given)
    unheeded = sorted(set(given) - known)
    if unheeded and not anything:
        raise Refusal(
            f"--{unheeded[0].replace('_', '-')}: {name}() of {place} takes no argument "
            f"{unheeded[0]!r}" + (f", it takes {', '.join(sorted(known))}" if known else "")
        )
    names = [f.name for f in dataclasses.fields(Options)]
    options = Options(**{**dict.fromkeys(names), **defaults, **given})
    return Script(text, function, options, frozenset(given), frozenset(known | set(unheeded)))


def _module(place: str) -> Any:
    if place.endswith(".py"):
        path = Path(place)
        spec = importlib.util.spec_from_file_location(path.stem, place)
        if spec is None or spec.loader is None or not path.is_file():
            raise Refusal(f"--script: want a Python file, got {place!r}")
        module = importlib.util.module_from_spec(spec)
        # A script finds what lies beside it, as if it were run.
        sys.path.insert(0, str(path.resolve().parent))
        with _no_exit(place):
            spec.loader.exec_module(module)
        return module
    sys.path.insert(0, "")
    try:
        found = importlib.util.find_spec(place) is not None
    except (ImportError, ValueError):  # a package around it that is missing; no name at all
        found = False
    if not found:
        raise Refusal(f"--script: want FILE.py or a module that can be imported, got {place!r}")
    with _no_exit(place):
        return importlib.import_module(place)


def _takes(
    function: Callable[..., Any], name: str, given: dict[str, Any]
) -> tuple[set[str], dict[str, Any], bool]:
    """Options that a function takes, its defaults of them, and whether it takes any at all."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # written in C
        return set(), {}, False
    options = {f.name for f in dataclasses.fields(Options)}
    known: set[str] = set()
    defaults: dict[str, Any] = {}
    for each in parameters.values():
        if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
            continue
        by_name = each.kind != each.POSITIONAL_ONLY and each.name in options
        if by_name:
            known.add(each.name)
        if each.default is not each.empty:
            defaults |= {each.name: each.default} if by_name else {}
        elif not by_name:
            raise Refusal(
                f"--script: want defaults for what is no option ({', '.join(sorted(options))}), "
                f"got {name}({each.name}) without one"
            )
        elif each.name not in given:
            raise Refusal(
                f"--{each.name}: {name}({each.name}) of the script has no default, so it must be "
                "given"
            )
    return known, defaults, any(p.kind == p.VAR_KEYWORD for p in parameters.values())


def step_of(result: Any, text: str) -> Step:
    """What a function returned as a step; fake tensors where the model is on the meta device."""
    if not isinstance(result, tuple) or not 2 <= len(result) <= 4:
        got = f"{len(result)} values" if isinstance(result, tuple) else type(result).__name__
        raise Refusal(f"--script: {_WANTED} from {text}, got {got}")
    model, batch, loss, module = (*result, None, None)[:4]
    if not callable(model):
        raise Refusal(f"--script: {_WANTED} from {text}, got {type(model).__name__} as model")
    if not (loss is None or callable(loss)):
        raise Refusal(f"--script: want a function of the output as loss, got {loss!r}")
    if not (module is None or isinstance(module, nn.Module)):
        raise Refusal(f"--script: want a torch.nn.Module as module, got a {type(module).__name__}")
    if module is None:
        module = model if isinstance(model, nn.Module) else module_behind(model)
    if module is None:
        raise Refusal(
            f"--script: the step that {text} returns refers to no torch.nn.Module: return (step, "
            "batch, loss or None, module), else its parameters would count as activations"
        )
    if any(p.is_meta for p in module.parameters()):
        _, batch = memory.fake_tensors(module, batch)
    return Step(model, batch, loss, None if model is module else module)
