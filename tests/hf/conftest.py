"""Model tests run on the backends a user gets, not in Triton's interpreter, and on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import petal_kernels as pk
from petal_kernels.hf import norms


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    # Tensors of a few hundred elements: a second thread only waits at barriers.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of the norms that the operator ran, one after the other."""
    seen: list[str] = []
    real = pk.frozen_norm

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs["kind"])
        return real(*args, **kwargs)

    monkeypatch.setattr(norms, "frozen_norm", counted)
    return seen
