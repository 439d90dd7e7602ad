"""Without a GPU, Triton kernels run in Triton's interpreter; it must be chosen before Triton is
first imported."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests import one_in
from tests.ops import triton_audit

if os.environ.get("TRITON_INTERPRET") == "1":
    with contextlib.suppress(ImportError):
        triton_audit.hasten_interpreter()

torch.set_num_threads(int(os.environ.get("PETAL_TEST_THREADS", "2")))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Before ``-m`` chooses by markers."""
    one_in.mark_others(items)
