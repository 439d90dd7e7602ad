"""What a model keeps for backward where LoRA takes the frozen norms in: exact bytes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers

from tests.hf import tiny_text
from tests.hf.tiny_norms import FAMILIES, MODES, attached, built, parts_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:attach. left as they are", "ignore:None of the inputs have requires_grad"
)


def kept_bytes(layer: nn.Module, x: Tensor, positions: Any) -> int:
    own = {t.untyped_storage().data_ptr() for t in [*layer.parameters(), *layer.buffers()]}
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x * 1, position_embeddings=positions)
    assert y.requires_grad
    return sum(nbytes for at, nbytes in seen.items() if at not in own)


class Layer:
    """A bf16 Llama layer's sizes, and the bytes that it keeps with dropout on."""

    def __init__(self, samples: int, tokens: int, d: int, f: int, r: int, heads: int) -> None:
        self.samples, self.tokens, self.d, self.f, self.r = samples, tokens, d, f, r
        self.heads, self.rows = heads, samples * tokens

    @property
    def unit(self) -> int:
        """x."""
        return self.rows * self.d * 2

    def bytes(self, mode: str, recompute: bool) -> int:
        """All-linear: with the operator a norm keeps its input in place of that in float32; folded,
        the linears behind it nothing of size N d more."""
        of_norms = 2 * (self.unit * (2 if mode == "module" else 1) + self.rows * 4)
        read = 0 if mode == "folded" else 2 * self.unit
        attention = 4 * self.unit + self.rows * self.heads * 4  # q, k, v, its output; logsumexp
        positions = 2 * self.tokens * (self.d // self.heads) * 2
        mlp = 0 if recompute else 2 * self.rows * self.f * 2
        middles, states = 7 * self.rows * self.r * 2, 3 * 16
        return of_norms + read + attention + positions + mlp + middles + states

    def bytes_of_qv(self, mode: str, frozen: int) -> int:
        """q and v alone, beside what the frozen layer keeps with its own modules."""
        less = 0 if mode == "module" else 2 * self.unit
        read = 0 if mode == "folded" else self.unit
        return frozen - less + read + 2 * self.rows * self.r * 2 + 16


SMALL = Layer(2, 16, 64, 176, 4, 4)
LLAMA_7B = Layer(4, 512, 4096, 11008, 16, 32)
# Of the frozen 7B layer: with its modules' copies in float32, act(gate) and the product.
FROZEN_7B = 4 * 512 * (4096 * 2 * 8 + 11008 * 2 * 3 + 8 + 32 * 4) + 2 * 512 * 128 * 2


def small_layer() -> tuple[nn.Module, Tensor, Any]:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=176, num_attention_heads=4
    )
    config._attn_implementation = "sdpa"
    layer = LlamaDecoderLayer(config, 0).bfloat16().train()
    x = torch.randn(2, 16, 64, dtype=torch.bfloat16).requires_grad_()
    return layer, x, LlamaRotaryEmbedding(config)(x, torch.arange(16)[None])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mode", ["module", *MODES])
def test_a_layer_keeps_exactly_this(mode: str, recompute: bool) -> None:
    layer, x, positions = small_layer()
    attached(layer, mode, recompute_mlp=recompute)
    assert kept_bytes(layer, x, positions) == SMALL.bytes(mode, recompute)


@pytest.mark.parametrize("mode", ["module", *MODES])
def test_a_layer_with_q_and_v_keeps_exactly_this(mode: str) -> None:
    layer, x, positions = small_layer()
    before = kept_bytes(copy.deepcopy(layer).requires_grad_(False), x, positions)
    attached(layer, mode, target_modules=["q_proj", "v_proj"])
    assert kept_bytes(layer, x, positions) == SMALL.bytes_of_qv(mode, before)


@pytest.mark.parametrize(
    ("mode", "recompute", "most"),
    [
        ("module", False, 15.44),
        ("module", True, 10.07),
        ("fused", False, 13.6),
        ("fused", True, 8.2),
        ("folded", False, 11.5),
        ("folded", True, 6.3),
    ],
)
def test_a_layer_of_llama_7b(mode: str, recompute: bool, most: float) -> None:
    """In units of its input."""
    assert LLAMA_7B.bytes(mode, recompute) <= most * LLAMA_7B.unit


@pytest.mark.parametrize(("mode", "most"), [("module", 17.3), ("fused", 16.2), ("folded", 16.2)])
def test_q_and_v_of_llama_7b(mode: str, most: float) -> None:
    assert LLAMA_7B.bytes_of_qv(mode, FROZEN_7B) <= most * LLAMA_7B.unit


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folded_family_keeps_less(family: str) -> None:
    sizes = []
    for mode in ("module", *MODES):
        model = built(family, torch.bfloat16)
        attached(model, mode, **parts_of(family))
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen: dict[int, int] = {}

        def pack(t: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        batch = tiny_text.batch(family)
        values = {
            n: t.bfloat16() if isinstance(t, Tensor) and t.is_floating_point() else t
            for n, t in batch.items()
        }
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(**values).loss.detach()
        sizes.append(sum(n for at, n in seen.items() if at not in own))
    assert sizes[2] < min(sizes[:2])
