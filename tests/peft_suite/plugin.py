"""A pytest plugin: whatever PEFT's tests adapt is fused at once, as if `pk.fuse` were the line
behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from peft.tuners.tuners_utils import BaseTuner

import petal_kernels as pk
from petal_kernels.hf.peft_layers import FusedLora

_COUNTS = {"models fused": 0, "layers' calls run by our operators": 0}
_NOTHING = "want a model with LoRA layers"


@pytest.fixture(scope="session", autouse=True)
def _fused() -> Iterator[None]:
    inject, member = BaseTuner.inject_adapter, FusedLora.member

    def injected(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        found = inject(self, model, *args, **kwargs)
        try:
            pk.fuse(model)
            _COUNTS["models fused"] += 1
        except ValueError as error:
            if _NOTHING not in str(error):
                raise
        return found

    def asked(self: Any) -> Any:
        found = member(self)
        _COUNTS["layers' calls run by our operators"] += not isinstance(found, str)
        return found

    with (
        mock.patch.object(BaseTuner, "inject_adapter", injected),
        mock.patch.object(FusedLora, "member", asked),
    ):
        yield


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How much of it went through the package."""
    for what, count in _COUNTS.items():
        terminalreporter.write_line(f"{what}: {count}")
