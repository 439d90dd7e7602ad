"""Model tests run on the backends a user gets, not in Triton's interpreter, and on one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


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
