"""Bytes of quantised weights and of 8-bit optimizer states, against bitsandbytes itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from petal_kernels import memory
from petal_kernels.tools.memory.quantised import weight_bytes

bnb: Any = pytest.importorskip("bitsandbytes")
SHAPES = pytest.mark.parametrize(("outs", "width"), [(64, 96), (100, 130), (1, 7)])


@SHAPES
@pytest.mark.parametrize("kind", ["nf4", "nf4-double"])
def test_four_bits(outs: int, width: int, kind: str) -> None:
    weight = torch.randn(outs, width, dtype=torch.bfloat16)
    double = kind == "nf4-double"
    codes, state = bnb.functional.quantize_4bit(
        weight, quant_type="nf4", compress_statistics=double
    )
    kept = [codes, state.absmax, state.code]
    if double:
        kept += [state.offset, state.state2.absmax, state.state2.code]
    assert len({t.data_ptr() for t in kept}) == len(kept)
    assert weight_bytes(outs, width, kind) == sum(t.nbytes for t in kept)


@SHAPES
def test_eight_bits(outs: int, width: int) -> None:
    weight = torch.randn(outs, width, dtype=torch.float16)
    numbers, scales, _ = bnb.functional.int8_vectorwise_quant(weight)
    assert weight_bytes(outs, width, "int8") == numbers.nbytes + scales.nbytes


@pytest.mark.parametrize("name", ["AdamW8bit", "Adam8bit"])
def test_states_of_an_optimizer(name: str) -> None:
    """Large parameters in blocks, small ones in float32; tables that all parameters share."""
    model = nn.Sequential(nn.Linear(100, 60), nn.Linear(60, 7))
    x = torch.randn(3, 100)
    found = memory.profile(model, x)
    optimizer = getattr(bnb.optim, name)(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values()]
    kept = {t.data_ptr(): t.nbytes for t in states if isinstance(t, Tensor)}
    assert sum(kept.values()) > 0
    assert found.with_optimizer(optimizer).sizes.states == sum(kept.values())
    assert found.with_optimizer(name.lower()).sizes.states == sum(kept.values())
