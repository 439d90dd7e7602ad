"""LoRA on every linear of every family, beside PEFT's in the same dtype: as near to fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

import peft

import petal_kernels as pk
from tests.hf.lora_places import ALL
from tests.hf.test_families import QUICK, _some, fresh, gradients
from tests.hf.tiny_vlms import FAMILIES, read

Values = dict[str, Tensor]
Models = dict[str, tuple[Any, dict[str, nn.Parameter]]]
SEEDS = range(3)
NAMES = {"lora_A.default.weight": "down", "lora_B.default.weight": "up"}


def _as(dtype: torch.dtype, values: Values) -> Values:
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in values.items()}


def _own(name: str) -> str:
    """This package's name of a parameter of PEFT's."""
    for end, own in NAMES.items():
        name = name.replace(end, own)
    return name.removeprefix("base_model.model.")


def _step(model: Any, named: dict[str, nn.Parameter], values: Values) -> Values:
    """Of a sum that a last norm does not make constant."""
    for parameter in named.values():
        parameter.grad = None
    out, _ = read(model.train()(**values))
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(6))
    (out * weight.bfloat16().to(out.dtype)).sum().backward()
    return {"out": out.detach().double(), **_as(torch.float64, gradients(named.items()))}


def _three(family: str, dtype: torch.dtype, adapters: torch.dtype) -> Models:
    """The same rounded weights and factors: with PEFT in fp64, with PEFT and ours in this dtype."""
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False
    )
    torch.manual_seed(4)
    theirs = peft.get_peft_model(fresh(family).to(dtype), config)
    model = fresh(family).to(dtype)
    own = pk.LoraConfig(
        r=3, lora_alpha=5, target_modules="all-linear", parts=ALL, adapter_dtype=str(adapters)[6:]
    )
    attachment = pk.attach(model, own)
    exact = peft.get_peft_model(fresh(family).to(dtype), config).double()
    found: Models = {"ours": (model, dict(attachment.named_parameters()))}
    for name, whole in (("PEFT", theirs), ("exact", exact)):
        named = {_own(n): p for n, p in whole.named_parameters() if p.requires_grad}
        found[name] = (whole, named)
    with torch.no_grad():
        for name, parameter in found["PEFT"][1].items():
            parameter.data = parameter.to(adapters)
            for other in ("exact", "ours"):
                found[other][1][name].copy_(parameter)
    return found


def _errors(family: str, dtype: torch.dtype, adapters: torch.dtype) -> dict[str, dict[str, float]]:
    """Of the outputs and of all gradients together, against fp64: root mean square over seeds and
    tensors of the error by the norm, or by a thousandth of the largest (a key's bias has none)."""
    runs = _three(family, dtype, adapters)
    errors: dict[str, dict[str, list[float]]] = {
        n: {"out": [], "grads": []} for n in ("ours", "PEFT")
    }
    for seed in SEEDS:
        values = _as(dtype, FAMILIES[family].batch(seed))
        want = _step(*runs["exact"], _as(torch.float64, values))
        least = 1e-3 * max(float(t.norm()) for n, t in want.items() if n != "out")
        for name, kinds in errors.items():
            got = _step(*runs[name], values)
            for key, value in want.items():
                error = float((got[key] - value).norm()) / max(float(value.norm()), least)
                kinds["out" if key == "out" else "grads"].append(error * error)
    return {
        name: {kind: (sum(e) / len(e)) ** 0.5 for kind, e in kinds.items()}
        for name, kinds in errors.items()
    }


HALF = [
    pytest.param(torch.bfloat16, torch.float32, id="float32 factors"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bfloat16 factors"),
]
SINGLE = pytest.param(torch.float32, torch.float32, id="float32")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("dtype", "adapters"), [SINGLE, *HALF])
@pytest.mark.parametrize("family", _some(FAMILIES, *QUICK[:2]))
def test_as_near_to_fp64_as_peft(family: str, dtype: torch.dtype, adapters: torch.dtype) -> None:
    """To what few small tensors' rounding lets one tell: a quarter."""
    errors = _errors(family, dtype, adapters)
    for kind, error in errors["ours"].items():
        assert 0 < error <= 1.25 * errors["PEFT"][kind], (kind, errors)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("dtype", "adapters"), HALF)
def test_over_all_families_nearer_than_peft(dtype: torch.dtype, adapters: torch.dtype) -> None:
    """The mean of the ratios' logarithms over 26 models, where chance evens out."""
    ratios: dict[str, list[float]] = {"out": [], "grads": []}
    for family in FAMILIES:
        errors = _errors(family, dtype, adapters)
        for kind, found in ratios.items():
            found.append(math.log(errors["ours"][kind] / errors["PEFT"][kind]))
    assert {kind for kind, found in ratios.items() if sum(found) > 0} == set(), ratios
