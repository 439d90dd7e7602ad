"""What a module's code says of its linears: which forward is an MLP, which read one tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers
from transformers.models.bart.modeling_bart import BartAttention
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionMlp
from transformers.models.siglip.modeling_siglip import SiglipMLP
from transformers.models.t5.modeling_t5 import T5DenseActDense, T5DenseGatedActDense

from petal_kernels.hf.structure import Mlp, activation_of, mlp_of, one_input

LLAMA: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")
T5 = transformers.T5Config(d_model=16, d_ff=24, d_kv=4, num_heads=4)


@pytest.mark.parametrize(
    ("make", "want"),
    [
        (lambda: LlamaMLP(transformers.LlamaConfig(**LLAMA)), Mlp(*GATED, "silu")),
        (
            lambda: Gemma2MLP(
                transformers.Gemma2Config(**LLAMA, num_key_value_heads=2, head_dim=8)
            ),
            Mlp(*GATED, "gelu_tanh"),
        ),
        (
            lambda: CLIPMLP(transformers.CLIPTextConfig(hidden_act="gelu")),
            Mlp(None, "fc1", "fc2", "activation_fn", "gelu"),
        ),
        (
            lambda: SiglipMLP(transformers.SiglipVisionConfig()),
            Mlp(None, "fc1", "fc2", "activation_fn", "gelu_tanh"),
        ),
        (lambda: VisionMlp(16, 32, "silu"), Mlp(None, "fc1", "fc2", "act", "silu")),
        (
            lambda: GPT2MLP(64, transformers.GPT2Config(n_embd=16, n_head=2)),
            Mlp(None, "c_fc", "c_proj", "act", "gelu_tanh", ("dropout",)),
        ),
        # QuickGELU is none of the activations; T5 drops between the linears; Phi-3 cuts one output
        # in two.
        (lambda: CLIPMLP(transformers.CLIPTextConfig()), None),
        (lambda: T5DenseActDense(T5), None),
        (lambda: T5DenseGatedActDense(T5), None),
        (lambda: Phi3MLP(transformers.Phi3Config(**LLAMA, num_key_value_heads=2)), None),
    ],
)
def test_which_models_have_a_plain_mlp(make: Callable[[], nn.Module], want: Mlp | None) -> None:
    with torch.device("meta"):
        module = make()
    assert mlp_of(module) == want


class Form(nn.Module):
    """A gated MLP's children; subclasses say what is done with them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(8, 8) for _ in range(3))
        self.act, self.drop = nn.SiLU(), nn.Dropout(0.1)


class Right(Form):
    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(torch.mul(self.up(x), self.act(self.gate(x)))))


class BesideTheProduct(Form):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x)) + x


class ProductReadTwice(Form):
    def forward(self, x: Tensor) -> Tensor:
        p = self.act(self.gate(x)) * self.up(x)
        return self.down(p) * p


class DropInside(Form):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.act(self.gate(x)) * self.up(x)))


class TwoActivations(Form):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.act(self.up(x)))


class GateAfterUp(Form):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(self.up(x))) * self.up(x))


class LooksAtValues(Form):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.down(self.act(self.gate(x)) * self.up(x))
        return x


class TwoInputs(Form):
    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(z))


class Sum(Form):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) + self.up(x))


class WritesInPlace(Form):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2.0)
        return self.down(self.act(self.gate(x)) * self.up(x))


class CallBeside(Form):
    def forward(self, x: Tensor) -> Tensor:
        self.drop(x)
        return self.down(self.act(self.gate(x)) * self.up(x))


class OtherInEvaluation(Form):
    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.act(self.gate(x)) * self.up(x))
        return y if self.training else y * 0.5


class TanhBehind(Form):
    def __init__(self) -> None:
        super().__init__()
        self.behind = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.down(self.act(self.gate(x)) * self.up(x)))


class NoLinear(Form):
    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.same(x)))


class LinearBeside(Form):
    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


def test_a_forward_of_the_form_and_no_more() -> None:
    assert mlp_of(Right()) == Mlp("gate", "up", "down", "act", "silu", ("drop",))
    for wrong in (
        BesideTheProduct,
        ProductReadTwice,
        DropInside,
        TwoActivations,
        GateAfterUp,
        LooksAtValues,
        TwoInputs,
        Sum,
        WritesInPlace,
        CallBeside,
        OtherInEvaluation,
        TanhBehind,
        NoLinear,
    ):
        assert mlp_of(wrong()) is None, wrong
        assert mlp_of(wrong().eval()) is None, wrong
    assert mlp_of(LinearBeside()) is None
    replaced = Right()
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    assert mlp_of(replaced) is None


def test_activations_are_known_by_their_values() -> None:
    assert activation_of(nn.GELU(approximate="tanh")) == "gelu_tanh"
    assert activation_of(transformers.activations.NewGELUActivation()) == "gelu_tanh"
    assert activation_of(nn.GELU()) == "gelu"
    assert activation_of(nn.ReLU()) == "relu"
    clipped = transformers.activations.ClippedGELUActivation(-10, 10)
    for cut in (nn.ReLU6(), clipped, nn.Sequential(nn.ReLU())):
        assert activation_of(cut) is None, cut
    for other in (nn.Tanh(), nn.PReLU(), nn.Softmax(-1), nn.Dropout(0.5), nn.Linear(61, 61)):
        assert activation_of(other) is None, other


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.LayerNorm(8)


class One(Attention):
    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        q, k = self.q(x), self.k(x)
        return self.o(F.softmax(q @ k.transpose(-1, -2), -1) @ self.v(x))


class OtherName(Attention):
    def forward(module, x: Tensor) -> Tensor:  # noqa: N805 - as some write it
        return module.o(module.q(x) + module.k(x))


class Written(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        x = self.norm(x)
        return self.o(q + self.k(x) + self.v(x))


class WrittenByItself(Attention):
    def forward(self, x: Tensor) -> Tensor:
        x = self.q(x)
        return self.k(x)


class Branches(Attention):
    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        q = self.q(x)
        if other is None:
            k, v = self.k(x), self.v(x)
        else:
            k = v = other
        return self.o(q + k + v)


class BothBranches(Attention):
    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        k = self.k(x) if other is None else self.k(other)
        return self.o(self.q(x) + k + self.v(x))


class Keyword(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.q(x) + self.k(input=x) + self.v(x * 1))


class Twice(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.q(x) + self.k(x) + self.k(x))


class MoreThanAnInput(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.q(x) + self.k(x, scale=2.0))


@pytest.mark.parametrize(
    ("cls", "want"),
    [
        (One, (("q", "k", "v"),)),
        (OtherName, (("q", "k"),)),
        (Written, (("k", "v"),)),
        (WrittenByItself, ()),
        (Branches, (("k", "v"),)),
        (BothBranches, (("q", "v"),)),
        (Keyword, ()),
        (Twice, ()),
        (MoreThanAnInput, ()),
    ],
)
def test_linears_that_read_one_variable(cls: type[Attention], want: tuple[Any, ...]) -> None:
    assert one_input(cls()) == want


def test_which_models_read_one_tensor() -> None:
    with torch.device("meta"):
        config = transformers.LlamaConfig(**LLAMA)
        assert one_input(LlamaAttention(config, 0)) == (("q_proj", "k_proj", "v_proj"),)
        assert one_input(LlamaMLP(config)) == (("gate_proj", "up_proj"),)
        clip = transformers.CLIPTextConfig(hidden_size=32, num_attention_heads=4)
        assert set(one_input(CLIPAttention(clip))[0]) == {"q_proj", "k_proj", "v_proj"}
        bert = transformers.BertConfig(hidden_size=32, num_attention_heads=4)
        assert set(one_input(BertSelfAttention(bert))[0]) == {"query", "key", "value"}
        # Cross-attention reads two tensors: its query is in no group with its keys.
        groups = one_input(BartAttention(32, 4, config=transformers.BartConfig(d_model=32)))
        assert all("q_proj" not in group for group in groups)
