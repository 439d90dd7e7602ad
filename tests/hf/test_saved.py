"""Adapters that users have on disk load, and compute what they computed when they were saved."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import petal_kernels as pk
from petal_kernels.hf import pair
from tests.hf.file_mutations import reseal
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


# -- its twins: what is not that adapter ----------------------------------------------------------


def _copied(name: str, tmp_path: Path) -> Path:
    """A stored adapter, to be changed; its json under today's name."""
    folder = shutil.copytree(write.HERE / name, tmp_path / name)
    (written,) = folder.glob("*.json")
    written.rename(folder / pair.CONFIG)
    return folder


def _refused(name: str, folder: Path, said: str) -> None:
    """Into a model that it leaves as it is, and into an attachment that keeps its values."""
    case = write.CASES[name]
    model = write.build(case)
    with pytest.raises(ValueError, match=said):
        pk.attach(model, folder)
    assert not hasattr(model, "petal")
    assert all(parameter.requires_grad for parameter in model.parameters())
    attachment = pk.attach(model, case.config())
    before = {key: value.clone() for key, value in attachment.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        attachment.load(folder)
    assert all(torch.equal(value, before[key]) for key, value in attachment.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_that_broke_off_is_refused(name: str, tmp_path: Path) -> None:
    folder = _copied(name, tmp_path)
    data = (folder / pair.TENSORS).read_bytes()
    (folder / pair.TENSORS).write_bytes(data[:-1])
    _refused(name, folder, f"want {len(data)} bytes")


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_of_another_shape_is_refused(name: str, tmp_path: Path) -> None:
    """Whichever it is, with digests that fit it."""
    whole = load_file(write.HERE / name / pair.TENSORS)
    matrices = [key for key, value in whole.items() if value.dim() > 1 and value.shape[-1] > 1]
    for key in {matrices[0], matrices[-1]}:
        folder = _copied(name, tmp_path / key)
        cut = whole[key][..., :-1].contiguous()
        save_file(whole | {key: cut}, folder / pair.TENSORS)
        reseal(folder)
        _refused(name, folder, re.escape(f"{key}: want shape {list(whole[key].shape)}"))


@pytest.mark.parametrize("name", NAMES)
def test_another_methods_adapter_is_refused(name: str) -> None:
    """Kind: tensors of one method read into another's, where names and shapes let them."""
    case = write.CASES[name]
    method = case.config().method
    other = next(n for n in NAMES if write.CASES[n].config().method != method)
    attachment = pk.attach(write.build(case), case.config())
    with pytest.raises(ValueError, match=rf"method: want '?{method}'?"):
        attachment.load(write.HERE / other)


def _linear_of_another_width() -> nn.Module:
    model = write.build(write.CASES["lora"])
    model.model.layers[1].mlp.down_proj = nn.Linear(40, 24, bias=False)  # type: ignore[union-attr,index]
    return model


def test_an_adapter_of_other_linears_is_refused() -> None:
    """LoRA's file says which linears it is of, by name and shape."""
    with pytest.raises(ValueError, match=r"base\.linears"):
        pk.attach(_linear_of_another_width(), write.HERE / "lora")
