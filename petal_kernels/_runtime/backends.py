"""Which implementation of an operator runs: an ordered list of backends, each stating all its
reasons against.

``auto`` takes the first backend without a reason. A backend asked for by name that cannot run
raises and says why. A missing optional package is a reason; any other exception while importing an
implementation is a bug and propagates.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from petal_kernels._runtime import device

AUTO = "auto"
NONE = "none"  # in an explanation: a backend was named and cannot run
NAMES = ("cuda", "triton", "native", "torch")
ENVIRONMENT_VARIABLE = "PETAL_BACKEND"

_MISSING: dict[str, Callable[[], str | None]] = {
    "cuda": device.cuda_library_reason,
    "triton": device.triton_reason,
    "native": device.cpu_library_reason,
    "torch": lambda: None,
}
_DEVICES = {"cuda": ("cuda",), "triton": ("cuda",), "native": ("cpu",)}

_default: str | None = None


class BackendUnavailable(RuntimeError):  # noqa: N818 - it says what is, as a RuntimeError
    """A backend that was asked for by name cannot run this call."""


def _interpreted(name: str, args: Sequence[Any]) -> bool:
    """Triton on CPU tensors is its interpreter, for tests: it runs only when named."""
    return name == "triton" and not any(a.is_cuda for a in args if hasattr(a, "is_cuda"))


@functools.cache
def _import(module: str) -> ModuleType:
    return importlib.import_module(module)


@functools.cache
def _exists(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _wrong_device(name: str, args: Sequence[Any]) -> str | None:
    wanted = _DEVICES.get(name)
    if wanted is None or (name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    found = next(a.device.type for a in args if isinstance(a, torch.Tensor) or hasattr(a, "device"))
    if found in wanted:
        return None
    hint = " (or TRITON_INTERPRET=1)" if name == "triton" else ""
    return f"needs tensors on {wanted[0]}{hint}, got {found}"


@dataclass(frozen=True)
class Backend:
    """One implementation: its name and the module that holds it, imported on first use."""

    name: str
    module: str

    def missing(self) -> str | None:
        """Why this backend cannot run on this machine at all, or None."""
        if not _exists(self.module):
            return f"the operator has no {self.name} implementation"
        return _MISSING[self.name]()

    def load(self) -> ModuleType:
        """The implementation module."""
        return _import(self.module)

    def reasons(self, *args: Any) -> list[str]:
        """Every reason why this backend cannot run on these arguments; empty if it can.

        The device is looked at first, so that CPU tensors never cause Triton to be imported.
        """
        reason = _wrong_device(self.name, args) or self.missing()
        if reason is not None:
            return [reason]
        found: list[str] = self.load().unsupported(*args)
        return found


@dataclass(frozen=True)
class Candidate:
    """A backend with its reasons for not running on particular inputs."""

    backend: Backend
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found: every backend with its reasons, the choice, and the operator's own
    notes."""

    operator: str
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    backend: str
    plan: str | None = None
    notes: tuple[str, ...] = field(default=())
    requested: str = AUTO
    refusal: str | None = None  # why the backend that was asked for by name cannot run

    @property
    def choice(self) -> str:
        """The chosen backend, and plan where the operator has several, in words."""
        if self.refusal is not None:
            return "cannot run"
        return f"runs on {self.backend}" + (f", plan {self.plan}" if self.plan else "")

    @property
    def why(self) -> str:
        """Why not a backend that comes before the chosen one; empty where the first was chosen."""
        if self.refusal is not None:
            return self.refusal
        if self.requested != AUTO:
            return f"{self.backend}: asked for by name"
        better = itertools.takewhile(lambda row: row[0] != self.backend, self.rows)
        return "; ".join(
            f"{name}: {', '.join(reasons) or 'can run, but is only taken by name here'}"
            for name, reasons in better
        )

    def __str__(self) -> str:
        lines = [f"{self.operator}: {self.choice}"]
        for name, reasons in self.rows:
            lines.append(f"  {name:<7} {'can run' if not reasons else 'no: ' + '; '.join(reasons)}")
        lines.extend(f"  {note}" for note in (self.refusal, *self.notes) if note)
        return "\n".join(lines)


def check_name(name: str) -> str:
    """Raise ValueError unless ``name`` is ``auto`` or a backend's name."""
    if not isinstance(name, str) or name not in (AUTO, *NAMES):
        got = repr(name) if isinstance(name, str) else f"a {type(name).__name__}"
        raise ValueError(f"backend: want one of {', '.join((AUTO, *NAMES))}, got {got}")
    return name


def default_backend() -> str:
    """The name set by ``use_backend``, else ``PETAL_BACKEND``, else ``auto``."""
    if _default is not None:
        return _default
    return check_name(os.environ.get(ENVIRONMENT_VARIABLE, AUTO))


def name_of(backend: str | None) -> str:
    """The backend that a call names, or the default's."""
    return default_backend() if backend is None else check_name(backend)


class use_backend:  # noqa: N801 - used like a function, and as a context manager
    """Set the default backend, at once; as a context manager, until the block ends.

    ``use_backend("triton")`` or ``with use_backend("torch"): ...``. Raises ValueError for an
    unknown name.
    """

    def __init__(self, name: str) -> None:
        global _default
        check_name(name)
        self._previous = _default
        _default = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _default
        _default = self._previous


def candidates(backends: Sequence[Backend], *args: Any) -> list[Candidate]:
    """Every backend with its reasons on these arguments, in order of preference."""
    return [Candidate(b, tuple(b.reasons(*args))) for b in backends]


def select(operator: str, backends: Sequence[Backend], requested: str, *args: Any) -> Backend:
    """The backend to run: the named one, or the first that can.

    Raises ValueError for an unknown name, BackendUnavailable for a named backend that cannot run,
    with all its reasons.
    """
    check_name(requested)
    for backend in backends:
        if requested not in (AUTO, backend.name):
            continue
        if requested == AUTO and _interpreted(backend.name, args):
            continue
        reasons = backend.reasons(*args)
        if not reasons:
            return backend
        if requested == backend.name:
            raise BackendUnavailable(
                f"{operator}: backend {requested!r} cannot run here: {'; '.join(reasons)}"
            )
    raise RuntimeError(f"{operator}: no backend can run on these inputs")


def explanation(
    operator: str,
    backends: Sequence[Backend],
    requested: str,
    choose: Callable[[], tuple[Backend, str | None]],
    *args: Any,
    notes: tuple[str, ...] = (),
) -> Explanation:
    """What ``choose``, the operator's own choice, says of a call whose ``reasons`` take ``args``.

    A named backend that cannot run is told, not raised. The arguments may be fake tensors: nothing
    but their kind is looked at, outside their mode, so that what is imported, loaded or asked of a
    device for the first time here is real.
    """
    with _disable_current_modes():
        rows = tuple((c.backend.name, c.reasons) for c in candidates(backends, *args))
        try:
            chosen, plan = choose()
        except BackendUnavailable as error:
            return Explanation(operator, rows, NONE, None, notes, requested, str(error))
    return Explanation(operator, rows, chosen.name, plan, notes, requested)


# Of each public function: the record of its arguments, and what explains a call of it.
_explainers: dict[Callable[..., Any], tuple[Any, Callable[[Any], Explanation]]] = {}


def register_explainer(
    public: Callable[..., Any], record: Any, explainer: Callable[[Any], Explanation]
) -> None:
    """Tell ``explain`` how to explain the public function of an operator, whose arguments are the
    fields of ``record``."""
    assert tuple(inspect.signature(public).parameters) == record._fields
    _explainers[public] = record, explainer


def bound(operator: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The record of a call's arguments, as the public function makes it."""
    found = inspect.signature(operator).bind(*args, **kwargs)
    found.apply_defaults()
    return _explainers[operator][0](**found.arguments)


def explain(operator: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backends can run ``operator`` on these inputs, which one ``auto`` takes, and why not
    the others.

    Takes the operator's own arguments; nothing is computed. ``print()`` the result for a table.
    Raises TypeError if ``operator`` is not one of this package's operators, BackendUnavailable for
    a named backend that cannot run.
    """
    # By identity: what is asked about may have no hash.
    if not any(known is operator for known in _explainers):
        known = ", ".join(sorted(f.__name__ for f in _explainers))
        raise TypeError(f"operator: want one of {known}, got {operator!r}")
    found = _explainers[operator][1](bound(operator, *args, **kwargs))
    if found.refusal is not None:
        raise BackendUnavailable(found.refusal)
    return found
