"""Adapters that users have on disk load, and compute what they computed when they were saved."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import petal_kernels as pk
from tests.hf.saved import write

NAMES = sorted(path.parent.name for path in write.HERE.glob(f"*/{write.OUTPUTS}"))
SAME = 1e-5  # of the largest output; they are stored in fp32


def _near(got: torch.Tensor, want: torch.Tensor) -> bool:
    return float((got - want).abs().max()) <= SAME * float(want.abs().max())


def test_every_case_is_stored() -> None:
    assert sorted(write.CASES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_adapter_loads_and_computes_the_same(name: str) -> None:
    case, want = write.CASES[name], load_file(write.HERE / name / write.OUTPUTS)
    model = write.build(case)
    attachment = pk.attach(model, write.HERE / name)
    got = write.outputs(case, model, attachment)
    assert _near(got["on"], want["on"])
    assert _near(got["off"], want["off"])
    assert not _near(want["on"], want["off"])
    config = case.config()
    assert attachment.config == config


@pytest.mark.parametrize("name", NAMES)
def test_every_stored_tensor_is_in_the_adapter(name: str) -> None:
    """The kind: a tensor of the file that is read and not used."""
    case = write.CASES[name]
    attachment = pk.attach(write.build(case), write.HERE / name)
    state, stored = attachment.state_dict(), load_file(write.HERE / name / "adapter.safetensors")
    assert state.keys() == stored.keys()
    for key, tensor in stored.items():
        assert torch.equal(state[key], tensor), key
