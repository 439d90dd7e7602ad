"""A report asks for the very calls that the layers make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import petal_kernels as pk
from petal_kernels.hf.config import AdapterConfig
from petal_kernels.nn.gated_adapter import GatedAdapter
from petal_kernels.nn.routed_lora import RoutedLoRALinear
from tests.hf import tiny_text

CASES: dict[str, tuple[str, AdapterConfig, type[nn.Module]]] = {
    "vlpet-bart": ("bart", pk.VLPetConfig(r=6, value_r=4), GatedAdapter),
    "adapter-llama": ("llama", pk.RoutingConfig(r=4, kind="adapter"), GatedAdapter),
    "lora-gpt2": ("gpt2", pk.RoutingConfig(r=4), RoutedLoRALinear),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mixed", [False, True], ids=["one_mode", "mixed_modes"])
@pytest.mark.parametrize("name", CASES)
def test_a_report_asks_for_what_runs(
    name: str, mixed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kinds: another dtype than the base's, a norm left out, one answer for two kinds."""
    family, config, kind = CASES[name]
    model: Any = tiny_text.build(family, dtype).train()
    attachment = pk.attach(model, config)
    if mixed:
        attachment.found.layers[0].module.eval()
        next(m for m in attachment.adapter.modules() if isinstance(m, kind)).eval()
    calls: set[tuple[object, ...]] = set()
    forward: Any = kind.forward

    def watched(self: Any, x: Any, *args: Any, **more: Any) -> Any:
        modes = self.training, more.get("training")
        calls.add((x.dtype, type(more.get("norm")), self.extra_repr(), modes))
        return forward(self, x, *args, **more)

    monkeypatch.setattr(kind, "forward", watched)
    with torch.no_grad():
        model(**tiny_text.batch(family))
    ran = set(calls)
    calls.clear()
    attachment.report()
    assert calls == ran
