"""Baselines of other packages: when they are there, how they are called, what they compute."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from petal_kernels.tools.bench import layer, model, packages
from petal_kernels.tools.bench.request import Request

CPU = torch.device("cpu")


def test_an_absent_package_says_why_and_how_to_get_it() -> None:
    found = packages.absent(["lora_linear"], CPU, [])
    assert found["unsloth"] == "not installed: pip install unsloth"
    assert "liger" not in found
    assert packages.absent(["lora_linear"], CPU, ["liger"])["liger"].startswith("compared in gated")
    everything: Any = SimpleNamespace(**vars(packages.PACKAGES["unsloth"]) | {"module": "torch"})
    assert packages.Package.why_not(everything, CPU) == "its kernels need a CUDA device"


def _fake(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    parts = name.split(".")
    for i in range(len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[: i + 1]), SimpleNamespace(**members))


def _lora_w(x: Tensor, w: Tensor, quant: None, a: Tensor, b: Tensor, s: float) -> Tensor:
    return x @ w.t() + s * (x @ a.t() @ b.t())


def _lora_qkv(x: Tensor, *given: Any) -> tuple[Tensor, ...]:
    *linears, inplace = given
    assert inplace is False
    return tuple(_lora_w(x, *linears[5 * k : 5 * k + 5]) for k in range(3))


def _lora_mlp(x: Tensor, *given: Any) -> Tensor:
    *linears, forward, backward, inplace = given
    assert (backward, inplace) == ("its backward", False)
    gate, up, down = (linears[5 * k : 5 * k + 5] for k in range(3))
    return _lora_w(forward(_lora_w(x, *gate), _lora_w(x, *up)), *down)


def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


def _fused(x: Tensor, w: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    return x @ w.t() + alpha * (x @ a.t() @ b.t())


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


@pytest.mark.parametrize(
    ("package", "name", "module", "members"),
    [
        (
            "unsloth",
            "lora_linear",
            "unsloth.kernels.fast_lora",
            {"LoRA_W": SimpleNamespace(apply=_lora_w)},
        ),
        (
            "unsloth",
            "lora_qkv",
            "unsloth.kernels.fast_lora",
            {"LoRA_QKV": SimpleNamespace(apply=_lora_qkv)},
        ),
        (
            "unsloth",
            "lora_mlp",
            "unsloth.kernels.fast_lora unsloth.kernels.swiglu",
            {
                "LoRA_MLP": SimpleNamespace(apply=_lora_mlp),
                "swiglu_fg_kernel": _silu_mul,
                "swiglu_DWf_DW_dfg_kernel": "its backward",
            },
        ),
        (
            "liger",
            "lora_mlp",
            "liger_kernel.ops.swiglu",
            {"LigerSiLUMulFunction": SimpleNamespace(apply=_silu_mul)},
        ),
        ("lorafusion", "lora_linear", "lorafusion.ops.lora_v1", {"fused_linear_lora": _fused}),
        (
            "liger",
            "gated_adapter",
            "liger_kernel.ops.layer_norm",
            {"LigerLayerNormFunction": SimpleNamespace(apply=_norm)},
        ),
    ],
)
def test_a_package_is_called_as_it_wants_to_be(
    package: str,
    name: str,
    module: str,
    members: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a stand-in of the package's signature: arguments in the right places, and gradients of
    the same parameters."""
    for each in module.split():
        _fake(monkeypatch, each, **members)
    monkeypatch.setattr(packages.Package, "why_not", lambda *_: None)
    request = Request(quick=True, against=(package,))
    scenario = next(iter(layer.scenarios([name], request)))()
    check = scenario.providers[package].check
    assert check is not None
    assert not check().red


def test_what_a_package_has_a_form_of() -> None:
    """Kind: a baseline without the layer's dropout, or one that is another one twice."""
    of = packages.PACKAGES
    for name in ("lora_linear", "lora_qkv", "lora_mlp"):
        assert of["unsloth"].offers(name, 0.0, torch.float32)
        assert not of["unsloth"].offers(name, 0.05, torch.float32)
        assert of["peft"].offers(name, 0.05, torch.float32)
        assert not of["peft_half"].offers(name, 0.05, torch.float32)
        assert of["peft_half"].offers(name, 0.05, torch.bfloat16)
    assert not of["liger"].offers("lora_linear", 0.0, torch.float32)
    assert of["liger"].offers("lora_mlp", 0.05, torch.float32)


LORA = {
    "linear": lambda request: layer.scenarios(["lora_linear"], request),
    "qkv": lambda request: layer.scenarios(["lora_qkv"], request),
    "mlp": lambda request: layer.scenarios(["lora_mlp"], request),
    "dropout": lambda request: layer.scenarios(["lora_qkv"], replace(request, shape="dropout")),
    "bart": lambda request: model.scenarios(["bart"], replace(request, shape="LoRA")),
    "llama": lambda request: model.scenarios(["llama"], request),
}


@pytest.mark.parametrize("target", LORA)
def test_peft_computes_the_same(target: str) -> None:
    pytest.importorskip("peft")
    scenario = next(iter(LORA[target](Request(quick=True, against=("peft",)))))()
    check = scenario.providers["peft"].check
    assert check is not None
    assert not check().red


@pytest.mark.one_in(2)
@pytest.mark.parametrize("target", ["qkv", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pefts_factors_are_float32_or_the_bases(target: str, dtype: torch.dtype) -> None:
    """Kind: a baseline of another dtype than its name says; or one twice, where the two are one."""
    pytest.importorskip("peft")
    request = Request(quick=True, against=("peft", "peft_half"), dtype=dtype)
    scenario = next(iter(LORA[target](request)))()
    found = {
        name: {t.dtype for t in provider.leaves(scenario.inputs) if t.dim() == 2}
        for name, provider in scenario.providers.items()
        if name.startswith("peft")
    }
    want = {"peft": {torch.float32}}
    assert found == (want if dtype == torch.float32 else want | {"peft_half": {dtype}})
    for name in found:
        check = scenario.providers[name].check
        assert check is not None
        assert not check().wrong
