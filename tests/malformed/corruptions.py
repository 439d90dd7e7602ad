"""What can be wrong with an argument, by the kind of value that is right there.

Nothing here knows an operator or a module: a call that is right and a signature give every
malformed call, so that a new argument is covered without a line here.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

JUNK: dict[str, Any] = {
    "string": "nonsense",
    "object": object(),
    "numpy": np.zeros((2, 3), dtype=np.float32),
    "list": [1.0, 2.0],
    "dict": {"a": 1},
    "complex": 1j,
}
HUGE = 10**400  # an int that is no float
ONE_OF_TWO = Tensor([1.0, 2.0])


@dataclass(frozen=True)
class Corruption:
    """One way to spoil one argument. `own`: the error must name this very argument; otherwise it is
    a contradiction between two, and may name either."""

    label: str
    value: Any
    own: bool = True


def of_tensor(t: Tensor) -> Iterator[Corruption]:
    """Types, layouts, dtypes, devices, ranks and sizes."""
    for label, value in JUNK.items():
        yield Corruption(label, value)
    yield Corruption("number", 1.0)
    yield Corruption("bool", True)
    yield Corruption("nested list", t.tolist())
    yield Corruption("complex dtype", torch.zeros(t.shape, dtype=torch.complex64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Corruption("quantized", torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8))
        yield Corruption("sparse", t.to_sparse())
        if t.dim() > 0:
            yield Corruption("nested", torch.nested.nested_tensor([t, t]))
    if t.is_floating_point():
        yield Corruption("int64", t.to(torch.int64))
        yield Corruption("bool dtype", t.bool())
        yield Corruption("float8", t.to(torch.float8_e4m3fn))
        yield Corruption("half", t.half(), own=False)
    else:
        yield Corruption("float32", t.float())
    yield Corruption("meta", t.to("meta"), own=False)
    yield Corruption("0-d", t.new_zeros(()), own=False)
    yield Corruption("rank+1", t.unsqueeze(0), own=False)
    if t.dim() > 1:
        yield Corruption("rank-1", t[0], own=False)
    for d in range(t.dim()):
        larger, empty = list(t.shape), list(t.shape)
        larger[d], empty[d] = larger[d] + 1, 0
        yield Corruption(f"size+1@{d - t.dim()}", t.new_zeros(larger), own=False)
        yield Corruption(f"size=0@{d - t.dim()}", t.new_zeros(empty), own=False)


def of_sequence(values: Any) -> Iterator[Corruption]:
    """Another count, another type, and each way to spoil an entry."""
    values = list(values)
    for label, value in JUNK.items():
        yield Corruption(label, value)
    yield Corruption("number", 1)
    if not values:
        return
    yield Corruption("empty", [], own=False)
    yield Corruption("one less", values[:-1], own=False)
    yield Corruption("one more", [*values, values[-1]], own=False)
    for each in spoil(values[0]):
        yield Corruption(f"first {each.label}", [each.value, *values[1:]], each.own)


def of_bool(value: bool) -> Iterator[Corruption]:
    for label, junk in (JUNK | {"int": 1, "none": None, "tensor": torch.tensor(True)}).items():
        yield Corruption(label, junk)


def of_int(value: int) -> Iterator[Corruption]:
    others = {
        "bool": True,
        "float": 1.5,
        "nan": math.nan,
        "tensor": torch.ones((), dtype=torch.int64),
        "tensor of two": ONE_OF_TWO,
        "negative": -1,
    }
    for label, junk in (JUNK | others).items():
        yield Corruption(label, junk)
    yield Corruption("zero", 0)
    yield Corruption("none", None)


def of_float(value: float) -> Iterator[Corruption]:
    others = {
        "bool": True,
        "nan": math.nan,
        "inf": math.inf,
        "-inf": -math.inf,
        "huge": HUGE,
        "tensor": torch.ones(()),
        "tensor of two": ONE_OF_TWO,
        "none": None,
    }
    for label, junk in (JUNK | others).items():
        yield Corruption(label, junk)
    yield Corruption("negative", -0.5)
    yield Corruption("one", 1.0)


def of_choice(value: str) -> Iterator[Corruption]:
    others = {"empty": "", "number": 3, "none": None, "tensor of two": ONE_OF_TWO, "bytes": b"x"}
    for label, junk in (JUNK | others).items():
        yield Corruption(label, junk)


def of_dtype(value: torch.dtype) -> Iterator[Corruption]:
    others = {"int64": torch.int64, "complex64": torch.complex64, "number": 32, "class": float}
    for label, junk in (JUNK | others).items():
        yield Corruption(label, junk)


def of_device(value: torch.device) -> Iterator[Corruption]:
    for label, junk in (JUNK | {"number": 1.5, "bool": True}).items():
        yield Corruption(label, junk)


def of_object(value: object) -> Iterator[Corruption]:
    """A module, a path, a config, an operator, an optional argument that is not given."""
    for label, junk in (JUNK | {"number": 3.5, "bool": True, "tensor": ONE_OF_TWO}).items():
        yield Corruption(label, junk)


KINDS: list[tuple[type | tuple[type, ...], Callable[[Any], Iterator[Corruption]]]] = [
    (Tensor, of_tensor),
    (bool, of_bool),
    (int, of_int),
    (float, of_float),
    (str, of_choice),
    (torch.dtype, of_dtype),
    (torch.device, of_device),
    ((list, tuple), of_sequence),
]


def spoil(value: Any) -> Iterator[Corruption]:
    """Every corruption of a value that is right."""
    for kind, corrupt in KINDS:
        if isinstance(value, kind) and not isinstance(value, nn.Module):
            yield from corrupt(value)
            return
    yield from of_object(value)


@dataclass(kw_only=True)
class Case:
    """A callable and a call of it that is right."""

    name: str
    call: Callable[..., Any]
    valid: Callable[[], dict[str, Any]]
    legal: tuple[str, ...] = ()  # "argument: corruption", shell patterns: calls that are right too
    elsewhere: tuple[str, ...] = ()  # and those that somebody else judges: the user's own model
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # further bad values
    names: tuple[str, ...] = ()  # by which an error may name what is no argument
    watched: Callable[[], nn.Module] | None = None  # the model that must stay as it is
    signature_of: Callable[..., Any] | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def target(self) -> Any:
        """The public function, class or method that is called."""
        found = inspect.unwrap(self.signature_of or self.call)
        return getattr(found, "__func__", found)

    def matches(self, patterns: tuple[str, ...], argument: str, corruption: Corruption) -> bool:
        label = f"{argument}: {corruption.label}"
        return any(fnmatchcase(label, pattern) for pattern in patterns)

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """Of the signature, without the variadic ones."""
        found = inspect.signature(self.signature_of or self.call).parameters
        return {
            name: p
            for name, p in found.items()
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and name != "self"
        }


def malformed(case: Case) -> Iterator[tuple[str, Corruption, dict[str, Any]]]:
    """(argument, corruption, the arguments of the call) of every malformed call of a case."""
    given = case.valid()
    for name, parameter in case.parameters.items():
        value = given.get(name, parameter.default)
        if value is inspect.Parameter.empty:
            raise AssertionError(f"{case.name}: the valid call lacks {name}")
        optional = parameter.default is None
        corruptions = list(spoil(value))
        if value is None:  # not given here: another one may be what is wrong beside it
            corruptions = [replace(each, own=False) for each in corruptions]
        if not (optional and name not in given) and value is not None:
            corruptions.append(Corruption("None", None, own=False))
        for label, bad in case.more.get(name, {}).items():
            corruptions.append(Corruption(label, bad, own=False))
        for each in corruptions:
            if (each.value is None and optional) or case.matches(case.elsewhere, name, each):
                continue
            yield name, each, given | {name: each.value}
        if parameter.default is inspect.Parameter.empty:
            rest = {k: v for k, v in given.items() if k != name}
            yield name, Corruption("missing", None), rest
    yield "surplus", Corruption("unknown", 1), given | {"surplus": 1}
