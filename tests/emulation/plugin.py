"""Fixtures of the tests that execute the CUDA kernels under the emulation."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.emulation import build
from tests.ops.discovery import OPERATORS


@pytest.fixture(scope="module")
def lib() -> ctypes.CDLL:
    _, loaded = build.library()
    loaded.petal_emulation_configure.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int]
    loaded.probe_scale.restype = ctypes.c_float
    loaded.probe_reverse.restype = ctypes.c_char_p
    return loaded


@pytest.fixture
def emulated(lib: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Every operator's cuda_impl on the emulated kernels; fresh tensors are NaN; four
    multiprocessors."""
    ops = torch.ops.petal_cuda_emulated
    for op in OPERATORS.values():
        monkeypatch.setattr(op.module("cuda_impl"), "_ops", lambda: ops)
    lib.petal_emulation_configure(0, 0, 4)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield ops
    torch.use_deterministic_algorithms(before)
