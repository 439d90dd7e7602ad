"""What real calls of the operators run on: every backend's own `forward`, watched, and every call
that was prepared for compiled code."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from petal_kernels._runtime import front
from tests.ops.discovery import Operator, operators


@dataclass(frozen=True)
class Used:
    """One forward: the operator, the backend that computed it and its plan, if there are any."""

    operator: str
    backend: str
    plan: str | None


@contextlib.contextmanager
def record_backends() -> Iterator[list[Used]]:
    """The list grows by one entry for each forward that a backend computes in this block."""
    used: list[Used] = []
    with contextlib.ExitStack() as stack:
        for op in operators():
            for backend in op.backends:
                if backend.missing() is None:
                    watch = _watched(op, backend.name, backend.load().forward, used)
                    stack.enter_context(mock.patch.object(backend.load(), "forward", watch))
            calls = op.module("op")
            if calls is not None and hasattr(calls, "prepared"):
                stack.enter_context(mock.patch.object(calls, "_KNOWN", front.Known()))
                watch = _watched_calls(op, calls.prepared, used)
                stack.enter_context(mock.patch.object(calls, "prepared", watch))
        yield used


def _watched_calls(op: Operator, prepared: Callable[..., Any], used: list[Used]) -> Any:
    """Compiled code takes the C++ kernels alone; one that runs other operators' too goes the whole
    way here, so that each is seen."""
    choose: Callable[..., Any] | None = getattr(op.module("function"), "choose", None)
    if choose is None:
        return lambda *_: None

    def watch(call: Any, trains: bool, plan: str, backend: str) -> Any:
        run = prepared(call, trains, plan, backend)
        if run is None:
            return None
        found = Used(op.name, "native", choose(call, not trains, plan, backend)[1])

        def watched(*tensors: Any) -> Any:
            ys = run(*tensors)
            if ys is not None:
                used.append(found)
            return ys

        return watched

    return watch


def _watched(
    op: Operator, backend: str, forward: Callable[..., Any], used: list[Used]
) -> Callable[..., Any]:
    planned = op.module("planner") is not None

    @functools.wraps(forward)
    def watch(call: Any, *rest: Any) -> Any:
        # A plan is a setting of the call, or the last argument beside it.
        settings = getattr(call, "settings", None)
        plan = getattr(settings, "plan", rest[-1] if rest else None) if planned else None
        used.append(Used(op.name, backend, plan))
        return forward(call, *rest)

    return watch
