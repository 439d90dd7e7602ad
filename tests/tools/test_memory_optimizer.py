"""Which optimizer a step is reckoned with: instances, 8-bit states, settings, what is refused."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from petal_kernels import memory
from petal_kernels.memory.optimizer import TAKES, Settings, settings_of
from tests.tools.test_memory_step import CLASSES, linears


def test_an_instance_is_read_by_group() -> None:
    """Kind: one group's settings taken for all; torch's choice by device; parameters left out."""
    model, x = linears(torch.float32)
    found = memory.profile(model, x)
    size = model[0].weight.nbytes + model[0].bias.nbytes
    groups = [
        {"params": list(model[0].parameters()), "amsgrad": True},
        {"params": list(model[1].parameters()), "foreach": True},
    ]
    step = found.with_optimizer(torch.optim.AdamW(groups))
    assert step.sizes.states == (3 + 2) * size
    assert step.optimizer == "AdamW (loop, amsgrad) and AdamW (foreach)"
    fake = memory.profile(*memory.fake_tensors(model, x))
    own = torch.optim.SGD(model.parameters(), momentum=0.5)
    assert fake.with_optimizer(own).optimizer == "SGD with momentum (foreach)"
    with pytest.raises(ValueError, match=r"with 2 others, the first of shape \[3, 2\]"):
        found.with_optimizer(torch.optim.SGD(nn.Linear(2, 3).parameters()))


def test_a_parameter_at_the_place_of_one_that_is_gone_is_another() -> None:
    """Kind: what was profiled known by an address that somebody else has now."""
    model, x = linears(torch.float32)
    found = memory.profile(model, x)
    gone = {id(p) for p in model.parameters()}
    del model
    gc.collect()
    made: list[nn.Parameter] = []
    while not any(id(p) in gone for p in made[-1000:]) and len(made) < 300_000:
        made += [nn.Parameter(torch.zeros(3)) for _ in range(1000)]
    there = [p for p in made if id(p) in gone]
    assert there, "no address was used again"
    with pytest.raises(ValueError, match=r"others, the first of shape \[3\]"):
        found.with_optimizer(torch.optim.SGD(there))


def test_eight_bit_states() -> None:
    """Kind: bytes of a layout that cannot be measured here: numbers, a maximum per 256 of them, two
    maps for all; small parameters in float32."""
    model = nn.Sequential(nn.Linear(100, 50), nn.Linear(50, 7)).bfloat16()
    found = memory.profile(model, torch.randn(3, 100, dtype=torch.bfloat16))
    step = found.with_optimizer("adamw8bit")
    large = 2 * (5000 + 4 * 20) + 2 * 256 * 4  # 19 whole blocks and a part of one
    small = 2 * 4 * (50 + 7 * 50 + 7)
    assert step.sizes.states == large + small
    begin = step.phases["optimizer"]  # the loss, in bfloat16, is there still
    assert max(step.live[begin:]) == step.resident_bytes + step.sizes.gradients + 2
    none = found.with_optimizer("adam8bit", min_8bit_size=5001)
    assert none.sizes.states == 2 * 4 * (5000 + 50 + 7 * 50 + 7)
    assert step.optimizer == "AdamW in 8 bits (bitsandbytes)"


@pytest.mark.parametrize("paged", [True, False])
def test_eight_bit_instances(paged: bool) -> None:
    """The package cannot be imported here: by the names and attributes that are read of it."""

    class AdamW8bit(torch.optim.Optimizer):
        args = type("MockArgs", (), {"min_8bit_size": 16384})
        is_paged = paged

    AdamW8bit.__module__ = "bitsandbytes.optim.adamw"
    model = nn.Linear(128, 128)
    found = memory.profile(model, torch.randn(3, 128))
    optimizer = AdamW8bit(model.parameters(), {})
    if paged:
        with pytest.raises(ValueError, match="paged"):
            found.with_optimizer(optimizer)
        return
    states = found.with_optimizer(optimizer).sizes.states
    assert states == 2 * (16384 + 4 * 64) + 2048 + 2 * 4 * 128


class Mine(torch.optim.SGD):
    """A class of a user's own may keep anything."""


@pytest.mark.parametrize(
    ("optimizer", "settings", "kind", "said"),
    [
        ("lion", {}, ValueError, "want one of adamw, adam, sgd, adamw8bit, adam8bit, got 'lion'"),
        (3, {}, TypeError, "optimizer: want a name"),
        ("adamw", {"momentum": 0.9}, TypeError, "momentum: want settings of adamw"),
        ("adamw", {"foreach": True, "fused": True}, ValueError, "got both"),
        ("adamw", {"foreach": 1}, TypeError, "foreach: want True, False or None, got 1"),
        ("sgd", {"momentum": True}, TypeError, "momentum: want a number >= 0, got True"),
        ("sgd", {"momentum": -1.0}, ValueError, "momentum: want a number >= 0, got -1.0"),
        ("sgd", {"nesterov": True}, ValueError, "nesterov: want momentum with it"),
        (Mine, {}, ValueError, "got a .*Mine"),
        (torch.optim.Adagrad, {}, ValueError, "got a torch.optim.adagrad.Adagrad"),
        (torch.optim.SGD, {"momentum": 0.9}, TypeError, "momentum: an instance has its own"),
    ],
)
def test_optimizers_that_are_not_known_are_refused(
    optimizer: Any, settings: dict[str, Any], kind: type[Exception], said: str
) -> None:
    """Kind: an optimizer or a setting that would be taken for another."""
    model = nn.Linear(4, 4)
    found = memory.profile(model, torch.randn(2, 4))
    if isinstance(optimizer, type):
        optimizer = optimizer(model.parameters(), lr=0.1)
    with pytest.raises(kind, match=said):
        found.with_optimizer(optimizer, **settings)


def test_a_forward_alone_has_no_step() -> None:
    """Kind: a peak of half a step printed as a whole one's."""
    found = memory.profile(nn.Linear(4, 4), torch.randn(2, 4), backward=False)
    with pytest.raises(ValueError, match="want a profile with its backward"):
        found.with_adam()
    assert found.to_dict()["peak_with_adam_bytes"] is None
    assert "with AdamW" not in found.table()
    assert "the backward was not run" in found.table()


def test_every_setting_is_one_of_torchs() -> None:
    """Kind: a default of ours in the place of torch's."""
    import inspect

    for name, cls in CLASSES.items():
        parameters = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
        assert set(TAKES[name]) <= set(parameters)
        ours = settings_of(name)
        for setting in TAKES[name]:
            if setting != "weight_decay" or name != "adamw":  # AdamW's changes no memory
                assert getattr(ours, setting) == parameters[setting].default, setting
    assert Settings("adamw").form == "foreach"
