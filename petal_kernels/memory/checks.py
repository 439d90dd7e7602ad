"""assert_saved_bytes: a budget for a test."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from petal_kernels.memory.arguments import check_count
from petal_kernels.memory.profile import Profile
from petal_kernels.memory.profiler import profile


def assert_saved_bytes(
    model: nn.Module | Callable[..., Any],
    batch: Any = (),
    *,
    at_most: int | None = None,
    exactly: int | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    module: nn.Module | None = None,
    parameters: Iterable[Tensor] = (),
) -> Profile:
    """Raises AssertionError, with the table of who keeps what, unless a forward keeps at most or
    exactly so many bytes for backward; the profile otherwise. Arguments as in `profile`.
    """
    if (at_most is None) == (exactly is None):
        got = "neither" if at_most is None else "both"
        raise ValueError(f"at_most: want one of at_most and exactly, got {got}")
    for name, budget in (("at_most", at_most), ("exactly", exactly)):
        if budget is not None:
            check_count(name, budget)
    found = profile(model, batch, loss=loss, backward=False, module=module, parameters=parameters)
    kept = found.saved_bytes
    if at_most is not None and kept > at_most:
        raise AssertionError(f"{kept} bytes kept for backward, want at most {at_most}\n{found}")
    if exactly is not None and kept != exactly:
        raise AssertionError(f"{kept} bytes kept for backward, want exactly {exactly}\n{found}")
    return found
