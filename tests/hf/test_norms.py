"""Which modules are norms, by what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from petal_kernels.hf.norms import Norm, norm_of, norms_around


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (LlamaRMSNorm(64), "rms"),
        (LlamaRMSNorm(48, 1e-5), "rms"),
        (MistralRMSNorm(64), "rms"),
        (Qwen2RMSNorm(64), "rms"),
        (Qwen3RMSNorm(64), "rms"),
        (T5LayerNorm(64), "rms"),
        (Olmo2RMSNorm(64), "rms_once"),
        (nn.RMSNorm(64, eps=1e-6), "rms_once"),
        (Gemma2RMSNorm(64), "rms_plus_one"),
        (Gemma3RMSNorm(64), "rms_plus_one"),
        (nn.LayerNorm(64), "layer"),
        (nn.LayerNorm(64, eps=1e-12, bias=False), "layer"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_a_norm_is_known_by_its_values(module: nn.Module, kind: str) -> None:
    found = norm_of(module)
    assert found is not None
    assert found.kind == kind
    assert getattr(module, found.eps) in (1e-5, 1e-6, 1e-12)


class Scaled(LlamaRMSNorm):
    """By a factor that no parameter holds."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * 1.01


class Dropping(LlamaRMSNorm):
    """Something else in training."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        y: Tensor = super().forward(hidden_states)
        return 2 * y if self.training else y


class Halved(LlamaRMSNorm):
    """Of another eps than any attribute says."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.float().pow(2).mean(-1, keepdim=True)
        rows = hidden_states.float() * torch.rsqrt(variance + self.variance_epsilon / 2)
        return self.weight * rows.to(hidden_states.dtype)


class Rough(LlamaRMSNorm):
    """Statistics of 16-bit rows in 16 bits."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        rows = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * rows


def _patched() -> nn.Module:
    module = LlamaRMSNorm(64)
    module.__dict__["forward"] = nn.Identity().forward
    return module


def _with_child() -> nn.Module:
    module = LlamaRMSNorm(64)
    module.inner = nn.Dropout(0.0)
    return module


@pytest.mark.parametrize(
    "module",
    [
        *(cls(64) for cls in (Scaled, Dropping, Halved, Rough)),
        _patched(),
        _with_child(),
        nn.RMSNorm(64),  # its eps depends on the dtype
        nn.LayerNorm((4, 16)),
        nn.LayerNorm(64, elementwise_affine=False),
        nn.BatchNorm1d(64),
        nn.GroupNorm(4, 64),
        nn.Linear(64, 1),
        nn.Embedding(4, 64),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_computes_anything_else_is_none(module: nn.Module) -> None:
    assert norm_of(module) is None


def test_a_forward_that_somebody_put_there_is_not_run() -> None:
    module, seen = LlamaRMSNorm(64), list[Tensor]()
    module.__dict__["forward"] = seen.append
    assert norm_of(module) is None
    assert seen == []


def test_looking_at_a_norm_changes_nothing() -> None:
    module = LlamaRMSNorm(64).requires_grad_(True)
    seen: list[Any] = []
    module.register_forward_hook(lambda *_: seen.append("hook"))
    before, state = module.weight, torch.get_rng_state()
    assert norm_of(module) == Norm("rms", "variance_epsilon")
    assert module.weight is before
    assert torch.equal(before, torch.ones(64))
    assert torch.equal(torch.get_rng_state(), state)
    assert seen == []
    with torch.device("meta"):
        assert norm_of(LlamaRMSNorm(64)) == Norm("rms", "variance_epsilon")


class Block(nn.Module):
    """Two widths: the norm of one stands outside of `inner`, that of the other in it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.inner = nn.ModuleDict(
            {"of_8": nn.Linear(8, 6), "norm": nn.LayerNorm(6), "of_6": nn.Linear(6, 5)}
        )
        self.of_5 = nn.Linear(5, 8)


class GradientCheckpointingLayer(Block):
    """By the name of transformers' class."""


@pytest.mark.parametrize("kind", [Block, GradientCheckpointingLayer])
def test_a_linear_is_fed_by_norms_of_its_width_in_its_layer(kind: type[Block]) -> None:
    """The one of width 5 stands outside."""
    model = nn.ModuleDict({"layers": nn.ModuleList([kind()]), "last": nn.LayerNorm(5)})
    names = ("inner.of_8", "inner.of_6", "of_5")
    found = norms_around(model, [f"layers.0.{name}" for name in names])
    assert {path: site.linears for path, site in found.items()} == {
        "layers.0.norm": ["layers.0.inner.of_8"],
        "layers.0.inner.norm": ["layers.0.inner.of_6"],
    }
