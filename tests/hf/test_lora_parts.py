"""LoRA linears that run in one call, q, k, v and whole MLPs: what they give, what they keep for
backward, and what makes them run one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import petal_kernels as pk
from petal_kernels.hf.methods import lora_parts
from petal_kernels.nn import lora_fused

P = 0.25
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4}
LLAMA = transformers.LlamaConfig(vocab_size=40, num_hidden_layers=2, num_key_value_heads=2, **SIZES)
LLAMA._attn_implementation = "sdpa"


def llama(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model: Any = transformers.LlamaModel(LLAMA)
    return model.to(dtype).train()


def attached(model: nn.Module, dropout: float = 0.0, **more: Any) -> Any:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}
    settings |= {"target_modules": "all-linear", "lora_dropout": dropout} | more
    torch.manual_seed(1)
    return pk.attach(model, pk.LoraConfig(**settings))


def step(model: Any, seed: int = 3) -> dict[str, Tensor]:
    """Output and gradients of everything that requires grad."""
    torch.manual_seed(5)
    x = torch.randn(2, 9, 64, dtype=next(model.parameters()).dtype).requires_grad_()
    weight = torch.randn_like(x)
    torch.manual_seed(seed)
    y = model(inputs_embeds=x, use_cache=False).last_hidden_state
    leaves = {n: p for n, p in model.named_parameters() if p.requires_grad} | {"x": x}
    for leaf in leaves.values():
        leaf.grad = None
    (y * weight).sum().backward()
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance, msg=name)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How often the joined calls ran."""
    calls = {"lora_linears": 0, "lora_mlp": 0}

    def counting(name: str) -> Callable[..., Any]:
        real = getattr(lora_parts, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            found = real(*args, **kwargs)
            calls[name] += not isinstance(found, str)
            return found

        return run

    with monkeypatch.context() as patch:
        for name in calls:
            patch.setattr(lora_parts, name, counting(name))
        yield calls


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    with counted(monkeypatch) as found:
        yield found


def one_by_one(model: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    with monkeypatch.context() as patch:
        for name in ("lora_linears", "lora_mlp"):
            patch.setattr(lora_parts, name, lambda *_, **__: "not today")
        return step(model)


BOTH = {"lora_linears": 2, "lora_mlp": 2}  # in two layers


def test_joined_is_one_by_one(calls: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    attached(model, rank_pattern={"k_proj": 3, "up_proj": 7}, alpha_pattern={"v_proj": 2})
    got = step(model)
    assert calls == BOTH
    same(got, one_by_one(model, monkeypatch))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "down_proj"], ["k_proj", "gate_proj"]])
def test_some_linears_alone_are_adapted(
    targets: list[str], calls: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    attached(model, target_modules=targets)
    got = step(model)
    assert calls == {"lora_linears": 2 if "v_proj" in targets else 0, "lora_mlp": 2}
    same(got, one_by_one(model, monkeypatch))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_masks_are_drawn_again(reentrant: bool, recompute: bool, calls: dict[str, int]) -> None:
    """Under checkpointing, and where an MLP keeps its input alone."""
    model = llama()
    attached(model, P, recompute_mlp=recompute)
    want = step(model)
    assert calls == BOTH
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable({"use_reentrant": reentrant})
    same(step(again), want)
    # A recompute may end where everything that it is for is there: within the MLP.
    assert calls["lora_linears"] == 6
    assert calls["lora_mlp"] >= 4
    assert not torch.equal(step(model, seed=4)["y"], want["y"])


def test_every_projection_has_a_mask_of_its_own() -> None:
    """Of x, a constant, every linear keeps other entries, a share of about 1 - P."""
    linears = [
        pk.nn.LoRALinear(nn.Linear(4096, 4, bias=False), 4, init=False, dropout=P) for _ in "qkv"
    ]
    for lora in linears:
        lora.requires_grad_(False).base.weight.zero_()  # type: ignore[operator]
        lora.down.fill_(1.0), lora.up.copy_(torch.eye(4))
        lora.train()
    found = lora_fused.lora_linears(torch.ones(64, 4096), [(lora, None) for lora in linears])
    assert not isinstance(found, str)
    kept = [y[:, 0] * (1 - P) for y in found]
    for each in kept:
        assert abs(float(each.mean()) / 4096 - (1 - P)) < 5e-3
        assert float(each.std()) > 10
    correlation = torch.corrcoef(torch.stack(kept))
    assert float((correlation - torch.eye(3)).abs().max()) < 0.5


# -- what is kept ---------------------------------------------------------------------------------


def kept_bytes(layer: nn.Module, x: Tensor, positions: Any) -> int:
    own = {t.untyped_storage().data_ptr() for t in [*layer.parameters(), *layer.buffers()]}
    seen: dict[int, Any] = {}

    def pack(t: Tensor) -> Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x * 1, position_embeddings=positions)
    found = sum(storage.nbytes() for at, storage in seen.items() if at not in own)
    assert y.requires_grad
    return found


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_a_layer_keeps_exactly_this(targets: Any) -> None:
    """Beside the frozen layer: what q, k, v and the MLP read, once each, the middles and the
    generator's states; and not the MLP's activation."""
    rows, d, f, r = 2 * 16, 64, 176, 4
    frozen = LlamaDecoderLayer(LLAMA, 0).bfloat16().requires_grad_(False).train()
    x = torch.randn(2, 16, d, dtype=torch.bfloat16).requires_grad_()
    positions = LlamaRotaryEmbedding(LLAMA)(x, torch.arange(16)[None])
    before = kept_bytes(frozen, x, positions)
    layer = copy.deepcopy(frozen)
    attached(layer, P, target_modules=targets)
    after = kept_bytes(layer, x, positions)
    if targets == "all-linear":
        middles = 7 * rows * r * 2
        norms = 2 * rows * d * 2  # what q, k, v and gate, up read: not kept by a frozen layer
        states = 3 * 16  # of q, k, v together, of o, of the MLP
        less = rows * f * 2  # act(g); the frozen layer keeps g and u too
        assert after - before == middles + norms + states - less
    else:
        assert after - before == 2 * rows * r * 2 + rows * d * 2 + 16


def test_an_mlp_that_is_recomputed_keeps_neither_gate_nor_up() -> None:
    x = torch.randn(2, 16, 64, dtype=torch.bfloat16).requires_grad_()
    layer = LlamaDecoderLayer(LLAMA, 0).bfloat16().train()
    positions = LlamaRotaryEmbedding(LLAMA)(x, torch.arange(16)[None])
    sizes = []
    for recompute in (False, True):
        own = copy.deepcopy(layer)
        attached(own, P, recompute_mlp=recompute)
        sizes.append(kept_bytes(own, x, positions))
    assert sizes[0] - sizes[1] == 2 * 32 * 176 * 2


# -- what makes them run one by one ---------------------------------------------------------------


def _hook(layer: Any, seen: list[Any]) -> None:
    layer.mlp.up_proj.register_forward_hook(lambda *_: seen.append("up"))


def _act(layer: Any, seen: list[Any]) -> None:
    layer.mlp.act_fn.register_forward_pre_hook(lambda *_: seen.append("act"))


def _other_act(layer: Any, seen: list[Any]) -> None:
    seen.append("act")
    layer.mlp.act_fn = nn.Tanh()


def _patched(layer: Any, seen: list[Any]) -> None:
    real = layer.mlp.down_proj.forward

    def forward(x: Tensor) -> Tensor:
        seen.append("down")
        return 2 * real(x)

    layer.mlp.down_proj.forward = forward


def _patched_update(layer: Any, seen: list[Any]) -> None:
    """As an engine does that loads parameters when they are called for."""
    lora = layer.mlp.gate_proj.used()
    real = lora.forward

    def forward(x: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append("update")
        return real(x, bias)

    lora.forward = forward


@pytest.mark.parametrize("change", [_hook, _act, _other_act, _patched, _patched_update])
def test_who_looks_into_an_mlp_sees_every_call(
    change: Callable[[Any, list[Any]], None], calls: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = llama(), list[Any]()
    attached(model)
    change(model.layers[0], seen)
    got = step(model)
    assert calls == {"lora_linears": 2, "lora_mlp": 1}
    assert seen
    same(got, one_by_one(model, monkeypatch))


def test_a_hook_of_one_projection_changes_its_own_input_alone(
    calls: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others' outputs stay those of what they read."""
    model = llama()
    attached(model)
    first, second = (layer.self_attn for layer in model.layers)
    first.k_proj.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    second.v_proj.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    got = step(model)
    assert calls["lora_linears"] == 2  # what a hook gave is its linear's alone
    same(got, one_by_one(model, monkeypatch))


def test_a_write_in_place_between_two_projections_is_seen() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x)
            x.add_(1.0)
            return q - self.k(x)

    model = nn.Sequential(Attention()).double()
    attached(model, target_modules=["q", "k"])
    x = torch.randn(3, 8, dtype=torch.float64)
    q, k = (model.get_submodule(f"0.{name}") for name in "qk")
    want = q(x) - k(x + 1.0)
    torch.testing.assert_close(model(x.clone()), want)


def test_off_merged_and_detached_run_as_the_model_does(calls: dict[str, int]) -> None:
    model = llama()
    x = torch.randn(2, 5, 64, dtype=torch.float64)
    plain = model(inputs_embeds=x).last_hidden_state
    attachment = attached(model)
    with attachment.disabled():
        assert torch.equal(model(inputs_embeds=x).last_hidden_state, plain)
    assert calls == {"lora_linears": 0, "lora_mlp": 0}
    model.eval()
    adapted = model(inputs_embeds=x).last_hidden_state
    assert calls == BOTH
    attachment.merge()
    torch.testing.assert_close(model(inputs_embeds=x).last_hidden_state, adapted)
    assert calls == BOTH
    attachment.detach()
    assert torch.equal(model(inputs_embeds=x).last_hidden_state, plain)


def test_trained_biases_stand_in_place_of_the_bases_own(calls: dict[str, int]) -> None:
    config = copy.deepcopy(LLAMA)
    config.attention_bias = config.mlp_bias = True
    plain: Any = transformers.LlamaModel(config)
    plain = plain.double().train()
    model = copy.deepcopy(plain)
    attachment = attached(model, bias="lora_only", init_lora_weights=True)
    with torch.no_grad():
        for trained in (plain.named_parameters(), attachment.named_parameters()):
            moved = [p.add_(0.3) for name, p in trained if name.endswith("bias")]
            assert len(moved) == 14
    x = torch.randn(2, 5, 64, dtype=torch.float64)
    got, want = (m(inputs_embeds=x).last_hidden_state for m in (model, plain))
    assert calls == BOTH
    torch.testing.assert_close(got, want)


def test_a_copy_runs_its_own_factors(calls: dict[str, int]) -> None:
    model = llama()
    attached(model)
    other = copy.deepcopy(model)
    want = step(other)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    same(step(other), want)
    assert calls == {name: 2 * count for name, count in BOTH.items()}


def test_a_quantised_or_wide_base_is_called(calls: dict[str, int]) -> None:
    """Under autocast a float32 base is computed in another dtype: its own forward runs."""
    model = llama(torch.float32)
    attached(model)
    with torch.autocast("cpu", torch.bfloat16):
        step(model)
    assert calls == {"lora_linears": 0, "lora_mlp": 0}


def test_a_plain_mlp_with_dropout_behind_it(
    calls: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2's: Conv1D weights, biases, no gate."""
    config = transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=2, vocab_size=40, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0.5
    )
    model: Any = transformers.GPT2Model(config).double().train()
    attached(model)
    got = step(model)
    assert calls == {"lora_linears": 0, "lora_mlp": 2}
    same(got, one_by_one(model, monkeypatch))
