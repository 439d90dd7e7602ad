"""Frozen norms in front of LoRA's linears: which modules are norms, what a model that runs them by
the operator gives and keeps, and what makes one run as it stands."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import petal_kernels as pk
from petal_kernels.hf import norms
from petal_kernels.hf.norms import Norm, norm_of
from tests.hf import tiny_text

P = 0.25
ALL = ("language", "projector", "vision")
FAMILIES = (
    *("llama", "mistral", "gemma2", "t5", "bart", "gpt2", "bert", "roberta"),
    *("llava", "paligemma", "idefics3", "smolvlm", "qwen2_5_vl"),
)
MODES = ("fused", "folded")

pytestmark = pytest.mark.filterwarnings(
    "ignore:attach. left as they are", "ignore:None of the inputs have requires_grad"
)


# -- which modules are norms ----------------------------------------------------------------------


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


# -- what a model gives ---------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of the norms that the operator ran, one after the other."""
    seen: list[str] = []
    real = pk.frozen_norm

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs["kind"])
        return real(*args, **kwargs)

    monkeypatch.setattr(norms, "frozen_norm", counted)
    return seen


def attached(model: nn.Module, mode: str, **more: Any) -> Any:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}
    settings |= {"target_modules": "all-linear", "lora_dropout": P, "frozen_norms": mode} | more
    torch.manual_seed(1)
    return pk.attach(model, pk.LoraConfig(**settings))


def weighted(model: nn.Module) -> nn.Module:
    """With norms' weights and biases that differ."""
    g = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" in name.lower():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=g))
    return model


def built(family: str, dtype: torch.dtype = torch.float32) -> Any:
    return weighted(tiny_text.build(family, dtype)).train()


def parts_of(family: str) -> dict[str, Any]:
    return {} if FAMILIES.index(family) < 8 else {"parts": ALL}


def step(model: Any, attachment: Any, family: str, seed: int = 3) -> dict[str, Tensor]:
    """Loss and gradients."""
    parameters = dict(attachment.named_parameters())
    for parameter in parameters.values():
        parameter.grad = None
    torch.manual_seed(seed)
    loss = model(**tiny_text.batch(family)).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def same(got: dict[str, Tensor], want: dict[str, Tensor], share: float = 2e-4) -> None:
    """Of a tensor's largest value: another order of sums in float32."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        apart = float((got[name].float() - value.float()).abs().max())
        assert apart <= share * max(float(value.abs().max()), 1e-3), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_gives_what_it_gives_with_its_own_modules(family: str, runs: list[str]) -> None:
    want = None
    for mode in ("module", *MODES):
        runs.clear()
        model = built(family)
        attachment = attached(model, mode, **parts_of(family))
        got = step(model, attachment, family)
        assert len(got) > 8
        if want is None:
            assert runs == []
            want = got
            continue
        same(got, want)
        kinds = dict.fromkeys(("gemma2", "paligemma"), "rms_plus_one")
        kinds |= dict.fromkeys(("bart", "gpt2", "bert", "roberta"), "layer")
        assert set(runs) == {kinds.get(family, "rms")}


@pytest.mark.parametrize("family", ["llava", "idefics3", "smolvlm"])
def test_a_tower_gives_what_it_gives_with_its_own_modules(family: str, runs: list[str]) -> None:
    found = []
    for mode in ("module", *MODES):
        whole = built(family).model
        tower = whole.vision_model if family != "llava" else whole.vision_tower
        attachment = attached(tower, mode)
        torch.manual_seed(3)
        size = tower.config.image_size
        out = tower(torch.randn(2, 3, size, size)).last_hidden_state
        grads = torch.autograd.grad(out.square().sum(), list(attachment.parameters()))
        found.append({"out": out.detach(), **{str(k): g for k, g in enumerate(grads)}})
    assert set(runs) == {"layer"}
    same(found[1], found[0])
    same(found[2], found[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "bert", "t5", "gpt2"])
def test_checkpointing_changes_nothing(family: str, reentrant: bool, mode: str) -> None:
    model = built(family)
    attachment = attached(model, mode, recompute_mlp=True)
    want = step(model, attachment, family)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    # T5's layers share a bias, whose gradient is then summed in another order.
    same(step(model, attachment, family), want, share=1e-5 if family == "t5" else 0.0)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_evaluation_and_generation(family: str, runs: list[str]) -> None:
    found = list[tuple[Tensor, Tensor]]()
    for mode in ("module", "folded"):
        runs.clear()
        model = built(family).eval()
        attached(model, mode)
        batch = tiny_text.batch(family)
        with torch.no_grad():
            logits = model(**batch).logits
        ids = batch["input_ids"][:, :5]
        tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
        found.append((logits, tokens))
    assert runs
    torch.testing.assert_close(found[0][0], found[1][0], rtol=2e-4, atol=2e-4)
    assert torch.equal(found[0][1], found[1][1])


def test_threads_do_not_meet() -> None:
    model = built("llama")
    attachment = attached(model, "folded")
    batches = [tiny_text.batch("llama", seed=seed) for seed in range(3)]
    parameters = list(attachment.parameters())

    def gradients(k: int) -> list[Tensor]:
        model_loss = model(**batches[k]).loss
        return list(torch.autograd.grad(model_loss, parameters))

    model.eval()
    want = [gradients(k) for k in range(3)]
    got: dict[int, list[list[Tensor]]] = {}

    def work(k: int) -> None:
        got[k] = [gradients(k) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, each in got.items():
        assert len(each) == 4
        for found in each:
            for a, b in zip(found, want[k], strict=True):
                torch.testing.assert_close(a, b)


def test_gradients_of_a_hidden_state_are_whole() -> None:
    """Of a post-norm model a norm's output is what a layer gives, and others read it too."""
    found = []
    for mode in ("module", "folded"):
        model = built("bert")
        attached(model, mode, lora_dropout=0.0)
        batch = tiny_text.batch("bert")
        out = model(**batch, output_hidden_states=True)
        found.append(torch.autograd.grad(out.loss, out.hidden_states[1:]))
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


def test_hooks_of_a_norm_see_and_change_what_it_gives() -> None:
    found = []
    for mode in ("module", *MODES):
        model, seen = built("llama"), list[Any]()
        attachment = attached(model, mode)
        first, second = (layer.input_layernorm for layer in model.model.layers)
        first.register_forward_hook(lambda _m, _a, y: y * 1.5)
        first.register_forward_pre_hook(lambda _m, args: (args[0] * 0.5,))
        second.register_forward_hook(lambda _m, _a, y, seen=seen: seen.append(y))
        second.register_forward_hook(lambda _m, _a, y: y.register_hook(lambda g: 2 * g) and None)
        found.append(step(model, attachment, "llama"))
        assert len(seen) == 1
    same(found[1], found[0])
    same(found[2], found[0])


# -- what is kept ---------------------------------------------------------------------------------


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


# -- what makes a norm run as it stands -----------------------------------------------------------


def _off(model: Any, attachment: Any) -> Any:
    with attachment.disabled():
        return model(**tiny_text.batch("llama")).logits


def _merged(model: Any, attachment: Any) -> Any:
    model.eval()
    attachment.merge()
    return model(**tiny_text.batch("llama")).logits


def _autocast(model: Any, attachment: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return model(**tiny_text.batch("llama")).logits


def _double(model: Any, attachment: Any) -> Any:
    return model.double()(**tiny_text.batch("llama")).logits


def _trained(model: Any, attachment: Any) -> Any:
    for layer in model.model.layers:
        layer.input_layernorm.weight.requires_grad_(True)
        layer.post_attention_layernorm.weight.requires_grad_(True)
    out = model(**tiny_text.batch("llama"))
    out.loss.backward()
    assert model.model.layers[0].input_layernorm.weight.grad is not None
    return out.logits


def _wide_norms(model: Any, attachment: Any) -> Any:
    """Norms kept in float32 in a bfloat16 model, whose output is float32."""
    model.bfloat16()
    for layer in model.model.layers:
        layer.input_layernorm.float(), layer.post_attention_layernorm.float()
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_hook(lambda _m, _a, y: y.bfloat16())
    return model(**tiny_text.batch("llama")).logits


def _replaced(model: Any, attachment: Any) -> Any:
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.forward = nn.Identity().forward
    return model(**tiny_text.batch("llama")).logits


@pytest.mark.parametrize(
    "way", [_off, _merged, _autocast, _double, _trained, _wide_norms, _replaced]
)
def test_a_norm_runs_as_it_stands(way: Callable[[Any, Any], Tensor], runs: list[str]) -> None:
    """The very bits of a model without the option."""
    found = []
    for mode in ("module", "folded"):
        model = built("llama")
        attachment = attached(model, mode, lora_dropout=0.0)
        found.append(way(model, attachment))
    assert runs == []
    assert torch.equal(found[0], found[1])


def test_unmerged_it_runs_again(runs: list[str]) -> None:
    model = built("llama").eval()
    attachment = attached(model, "folded")
    model(**tiny_text.batch("llama"))
    assert len(runs) == 4
    attachment.merge()
    model(**tiny_text.batch("llama"))
    attachment.unmerge()
    assert len(runs) == 4
    model(**tiny_text.batch("llama"))
    assert len(runs) == 8


def test_a_norm_that_is_trained_is_left_alone(runs: list[str]) -> None:
    model = built("llama")
    attachment = attached(model, "folded", modules_to_save=["input_layernorm"])
    step(model, attachment, "llama")
    assert len(runs) == 2  # the other norm of two layers
    runs.clear()
    other = built("bert")
    attachment = attached(other, "folded", bias="all")
    got = step(other, attachment, "bert")
    assert runs == []
    assert any("LayerNorm.bias" in name for name in got)


@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_model_runs_its_own_norms(mode: str, runs: list[str]) -> None:
    model = built("llama")
    attached(model, mode, lora_dropout=0.0)
    batch = tiny_text.batch("llama")
    want = model(**batch).logits
    runs.clear()
    torch._dynamo.reset()
    layer = model.model.layers[0]
    layer.forward = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
    got = model(**batch).logits
    assert len(runs) == 2  # of the other layer
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)


# -- the life of an attachment --------------------------------------------------------------------


def test_detach_gives_back_the_very_objects() -> None:
    model = built("llama")
    before = [(name, module, type(module)) for name, module in model.named_modules()]
    weights = [(name, id(p)) for name, p in model.named_parameters()]
    attachment = attached(model, "folded")
    norm = model.model.layers[0].input_layernorm
    assert type(norm).__name__ == "LlamaRMSNorm"
    assert isinstance(norm, LlamaRMSNorm)
    attachment.detach()
    after = [(name, module, type(module)) for name, module in model.named_modules()]
    assert [(n, id(m), id(c)) for n, m, c in after] == [(n, id(m), id(c)) for n, m, c in before]
    assert [(name, id(p)) for name, p in model.named_parameters()] == weights
    assert not any(n.startswith("_petal") for _, m, _ in after for n in m.__dict__)


def test_a_report_has_a_row_for_each_norm() -> None:
    model = built("gemma2")
    planned = pk.plan(model, pk.LoraConfig(target_modules="all-linear", frozen_norms="folded"))
    report = attached(model, "folded").report()
    for rows in (planned.rows, report.rows):
        mine = {row.module: row for row in rows if row.role == "norm"}
        assert len(mine) == 8
        row = mine["model.layers.1.pre_feedforward_layernorm"]
        assert row.shape == f"rms_plus_one {tiny_text.WIDTH}, folded"
        assert row.trainable == 0
        assert row.backend in ("native", "torch")
    assert "model.layers.*.input_layernorm x 2" in str(report)
    other = built("llama")
    rows = attached(other, "module").report().rows
    assert not [row for row in rows if row.role == "norm"]


def test_only_norms_of_layers_with_adapted_linears_are_taken() -> None:
    model = built("llava")
    attachment = attached(model, "fused", target_modules=["q_proj"], layers_to_transform=[1])
    names = [row.module for row in attachment.report().rows if row.role == "norm"]
    layer = "model.language_model.layers.1."
    assert names == [f"{layer}input_layernorm", f"{layer}post_attention_layernorm"]
    both = built("llava")
    attachment = attached(both, "fused", target_modules="all-linear", parts=["projector"])
    assert not [row for row in attachment.report().rows if row.role == "norm"]


def test_a_norm_may_be_replaced_later() -> None:
    """Nothing of the adapter is lost with it."""
    model = built("llama")
    attachment = attached(model, "folded")
    model.model.layers[0].input_layernorm = nn.Identity()
    assert attachment.report().rows
    attachment.detach()
    assert isinstance(model.model.layers[0].input_layernorm, nn.Identity)


def test_files_do_not_depend_on_it(tmp_path: Any) -> None:
    model = built("llama")
    attachment = attached(model, "folded", lora_dropout=0.0)
    want = model(**tiny_text.batch("llama")).logits
    attachment.save(tmp_path)
    other = built("llama")
    second = attached(other, "module", lora_dropout=0.0, recompute_mlp=True)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.zero_()
    second.load(tmp_path)
    got = other(**tiny_text.batch("llama")).logits
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)
    third = built("llama")
    config: Any = pk.attach(third, tmp_path).config
    assert config.frozen_norms == "folded"


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_runs_its_own(way: Callable[[Any], Any], runs: list[str]) -> None:
    model = built("llama")
    attached(model, "folded", lora_dropout=0.0)
    other = way(model)
    want = model(**tiny_text.batch("llama")).logits
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.zero_()
    runs.clear()
    assert torch.equal(other(**tiny_text.batch("llama")).logits, want)
    assert len(runs) == 4


@pytest.mark.parametrize("value", ["Folded", "", None, True, 1])
def test_another_word_is_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^frozen_norms: want"):
        pk.LoraConfig(target_modules="all-linear", frozen_norms=value)


def test_the_published_form_is_left_as_it_is(runs: list[str]) -> None:
    model = built("llama")
    config = pk.LoraConfig(target_modules="all-linear", frozen_norms="folded")
    attachment = pk.attach(model, config, implementation="published")
    assert not [row for row in attachment.report().rows if row.role == "norm"]
    model(**tiny_text.batch("llama"))
    assert runs == []


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    yield
    torch._dynamo.reset()
