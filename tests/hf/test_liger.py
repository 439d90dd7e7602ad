"""Models with Liger's modules: what their code says is read as that of any other module, their
in-place kernels meet no tensor that is needed later, and a head that is read instead of called is
refused. The kernels need a GPU; here functions of torch with their effects stand for them."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import petal_kernels as pk
from tests.hf import fused, tiny_text


class Product(torch.autograd.Function):
    """silu(a) b, whose backward writes the gradients over a and b, unseen by autograd."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, *rest: Any) -> Tensor:
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        a, b = ctx.saved_tensors
        s = torch.sigmoid(a)
        da, db = grads[0] * b * (s + F.silu(a) * (1 - s)), grads[0] * F.silu(a)
        a.data.copy_(da)
        b.data.copy_(db)
        return (a, b, *(None for _ in ctx.needs_input_grad[2:]))


class Normed(torch.autograd.Function):
    """A norm, whose backward writes the gradient of its input over that of its output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, *rest: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        rho = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + ctx.eps)
        g = grads[0] * weight
        dx = rho * (g - x * rho.pow(2) * (g * x).mean(-1, keepdim=True))
        grads[0].data.copy_(dx)
        return (grads[0], *(None for _ in ctx.needs_input_grad[1:]))


class OpaqueMLP(nn.Module):
    """Its linears are called by name; what lies between them is no module."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def forward(self, x: Tensor) -> Any:
        return self.down_proj(Product.apply(self.gate_proj(x), self.up_proj(x)))


class OpaqueRMSNormForLlama(nn.Module):
    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, x: Tensor) -> Any:
        return Normed.apply(x, self.weight, self.variance_epsilon)


def _put(model: Any, put: Callable[[Any, type], None]) -> None:
    for module in model.modules():
        name = type(module).__name__
        if name in ("LlamaMLP", "LlamaRMSNorm"):
            put(module, OpaqueMLP if name == "LlamaMLP" else OpaqueRMSNormForLlama)


def _nothing(model: Any) -> None:
    """As transformers has it."""


def _classes(model: Any) -> None:
    """As `apply_liger_kernel_to_llama()` before the model is built."""

    def put(module: Any, own: type) -> None:
        module.__class__ = own

    _put(model, put)


def _instances(model: Any) -> None:
    """As `apply_liger_kernel_to_llama(model=model)`: forwards on the modules."""

    def put(module: Any, own: Any) -> None:
        module.__dict__["forward"] = types.MethodType(own.forward, module)

    _put(model, put)


@pytest.fixture
def by_liger(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The package itself, its kernels replaced."""
    pytest.importorskip("liger_kernel")
    liger: Any = importlib.import_module("liger_kernel.transformers")
    llama: Any = importlib.import_module("transformers.models.llama.modeling_llama")

    def loss(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
        return F.cross_entropy(hidden @ weight.T, target, ignore_index=options["ignore_index"])

    monkeypatch.setattr(liger.rms_norm, "LigerRMSNormFunction", Normed)
    monkeypatch.setattr(liger.swiglu, "_swiglu_dispatch", Product.apply)
    monkeypatch.setattr(liger.functional, "liger_fused_linear_cross_entropy", loss)
    for name in ("LlamaRMSNorm", "LlamaMLP"):  # which it changes for every later model
        monkeypatch.setattr(llama, name, getattr(llama, name))

    def by_liger(model: Any, head: bool = False) -> None:
        apply = liger.apply_liger_kernel_to_llama
        apply(rope=False, fused_linear_cross_entropy=head, model=model)

    return by_liger


CONFIGS = {
    "lora": pk.LoraConfig(r=3, target_modules="all-linear"),
    "norms": pk.LoraConfig(
        r=3, target_modules="all-linear", frozen_norms="folded", recompute_mlp=True
    ),
    "dora": pk.LoraConfig(r=3, target_modules="all-linear", use_dora=True),
    "routing": pk.RoutingConfig(r=3, kind="adapter"),
}


def _llama() -> Any:
    return tiny_text.build("llama", torch.float32)


def _step(model: Any, config: Any) -> tuple[fused.Values, dict[str, int], Any]:
    attachment = pk.attach(model, config)
    for parameter in (p for n, p in attachment.named_parameters() if not n.startswith("modules")):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(4))
    with fused.operators() as calls:
        found = fused.step(model, fused.batch("llama", torch.float32))
    assert len(found) == 1 + len(list(attachment.parameters()))
    return found, fused.forwards(calls), attachment


# q, k and v in one call and o, in two layers; gate and up in one call where the class of the MLP
# says that they read one tensor, and the MLP as a whole where it says all.
JOINED: dict[Any, tuple[int, int]] = {_nothing: (4, 2), _classes: (8, 0), _instances: (10, 0)}


@pytest.mark.filterwarnings("ignore:.*changes nothing")
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("way", [_classes, _instances])
def test_gradients_are_those_without_liger(way: Callable[[Any], None], kind: str) -> None:
    found = []
    for change in (_nothing, way):
        model = _llama()
        change(model)
        values, calls, _ = _step(model, CONFIGS[kind])
        found.append(values)
        if kind == "lora":
            linears, mlps = JOINED[change]
            assert calls.get("gated_mlp_act", 0) == mlps
            assert calls["lowrank_linear"] == linears + 2 * mlps
    fused.same(found[1], found[0], 1e-4)


@pytest.mark.filterwarnings("ignore:.*changes nothing")
@pytest.mark.parametrize("kind", ["lora", "norms"])
def test_gradients_are_those_without_liger_itself(
    kind: str, by_liger: Callable[..., None]
) -> None:
    model = _llama()
    by_liger(model)
    fused.same(_step(model, CONFIGS[kind])[0], _step(_llama(), CONFIGS[kind])[0], 1e-4)


@pytest.mark.parametrize("way", [_classes, _instances])
def test_fuse_computes_what_peft_computes(way: Callable[[Any], None]) -> None:
    pytest.importorskip("peft")
    model = _llama()
    way(model)
    adapted, given = fused.adapted(model), fused.batch("llama", torch.float32)
    want = fused.step(adapted, given)
    report = str(pk.fuse(adapted))
    assert ("OpaqueMLP (gate_proj, up_proj) x 2" in report) == (way is _classes)
    assert "down_proj)" not in report
    fused.same(fused.step(adapted, given), want, 1e-4)


def test_norms_that_do_not_run_here_are_said() -> None:
    """A kernel without its GPU raises: `frozen_norms` asks in vain, and says so."""

    class NeedsGpu(OpaqueRMSNormForLlama):
        def forward(self, x: Tensor) -> Any:
            raise RuntimeError("0 active drivers")

    model = _llama()
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.__class__ = NeedsGpu
    with pytest.warns(UserWarning, match="frozen_norms='folded' changes nothing: no module"):
        attachment = pk.attach(model, CONFIGS["norms"])
    assert "frozen_norms='folded' changes nothing" in str(attachment.report())


HEADS = {
    "lora": (pk.LoraConfig(r=2, target_modules=["lm_head"]), r"lm_head, a Linear.* not adapt"),
    "rows": (
        pk.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3]),
        "trainable_token_indices: .* nothing else adapts, got 'lm_head', which stays",
    ),
}


def _reads(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    """A forward that forms its logits, or its loss, beside the head."""
    hidden = self.model(*args, **kwargs).last_hidden_state
    return F.linear(hidden, self.lm_head.weight)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("written_by", ["liger_kernel.transformers.model.llama", "somebody"])
def test_a_head_that_is_read_is_refused(
    kind: str, written_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kind: an update of a linear whose weight the model reads, which trains nothing."""
    config, words = HEADS[kind]
    model = _llama()
    if kind == "rows":
        model.lm_head.weight = model.model.embed_tokens.weight
    monkeypatch.setattr(_reads, "__module__", written_by)
    model.forward = types.MethodType(_reads, model)
    if written_by == "somebody":
        assert pk.attach(model, config)
        return
    with pytest.raises(ValueError, match=rf"{words}.*Liger's forward reads its weight"):
        pk.attach(model, config)


def test_liger_s_own_forward_is_known(by_liger: Callable[..., None]) -> None:
    for head in (True, False):
        model = _llama()
        by_liger(model, head=head)
        if head:
            with pytest.raises(ValueError, match="Liger's forward reads its weight"):
                pk.attach(model, HEADS["lora"][0])
        else:
            _step(model, HEADS["lora"][0])


def test_a_head_trained_whole_is_the_one_that_is_read(by_liger: Callable[..., None]) -> None:
    config = pk.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = _llama()
    by_liger(model, head=True)
    fused.same(_step(model, config)[0], _step(_llama(), config)[0], 1e-4)
