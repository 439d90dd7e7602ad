"""plan() says what attach would report, and touches nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import petal_kernels as pk
from petal_kernels.hf.twins import skeleton
from tests.hf import tiny_text
from tests.hf.methods import Row, every, first, fresh


def _everything(model: nn.Module) -> dict[str, Any]:
    """Every attribute of every module by identity, dictionaries and parameters looked into."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        found[path] = (id(module), type(module), id(module.__dict__))
        for name, value in module.__dict__.items():
            inside = None
            if isinstance(value, dict):
                inside = [(key, id(each)) for key, each in value.items()]
            elif isinstance(value, set):
                inside = sorted((str(each), 0) for each in value)
            plain = value if isinstance(value, (bool, int, float, str)) else id(value)
            found[f"{path}: {name}"] = (plain, inside)
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        facts = (tensor.requires_grad, tensor._version, tensor.data_ptr(), sorted(vars(tensor)))
        found[name] = (id(tensor), id(tensor.grad), facts)
    return found


@every("plan", quick=first)
def test_a_plan_is_attachs_report_and_changes_nothing(row: Row) -> None:
    model = fresh(row).train()
    next(model.parameters()).requires_grad_(False)
    hook = next(model.children()).register_forward_hook(lambda *given: None)
    before, state = _everything(model), torch.get_rng_state()
    planned = pk.plan(model, row.config(), tokens=(2, 9))
    assert _everything(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    report = pk.attach(model, row.config()).report((2, 9))
    assert str(planned) == str(report)
    assert planned == report
    hook.remove()


def test_a_skeleton_shares_values_and_no_objects() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.append(model[0])
    twin: Any = skeleton(model)
    assert twin[0] is twin[2]
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert twin[0].weight is not model[0].weight
    assert twin[0].weight.data_ptr() == model[0].weight.data_ptr()  # type: ignore[operator]
    before = _everything(model)
    twin.register_forward_hook(lambda *given: None)
    twin[1].register_buffer("running_mean", None)
    twin.requires_grad_(False)
    twin[0] = nn.Identity()
    assert _everything(model) == before
    x = torch.randn(3, 2)
    assert torch.equal(twin[2](x), model[0](x))


def test_a_plan_of_a_large_model_allocates_nothing() -> None:
    """All that is there of it are the shapes."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(8192, 8192, bias=False) for _ in range(64)))
    config = pk.LoraConfig(r=64, target_modules="all-linear")
    assert pk.plan(model, config).trainable == 64 * 64 * 2 * 8192
    real = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    huge = pk.LoraConfig(r=1 << 40, target_modules="all-linear")
    assert pk.plan(real, huge).trainable == 2 * 2 * 64 * (1 << 40)


def test_what_attach_refuses_is_refused(tmp_path: Path) -> None:
    model = tiny_text.build("llama", torch.float32)
    with pytest.raises(ValueError, match=r"target_modules: \['c_attn'\] match nothing"):
        pk.plan(model, pk.LoraConfig(target_modules=["c_attn"]))
    with pytest.raises(TypeError, match="config: want a PetalConfig"):
        pk.plan(model, {})
    with pytest.raises(TypeError, match=r"model: want a torch.nn.Module"):
        pk.plan(7, pk.LoraConfig())  # type: ignore[arg-type]
    attachment = pk.attach(model, pk.LoraConfig(r=3))
    attachment.save(tmp_path / "a")
    with pytest.raises(ValueError, match="model: want a model without a 'petal' module"):
        pk.plan(model, pk.LoraConfig())
    want = str(attachment.report())
    attachment.detach()
    assert str(pk.plan(model, tmp_path / "a")) == want
