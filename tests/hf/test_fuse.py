"""fuse(): PEFT's LoRA layers give what they gave, in values and in every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("peft")

import petal_kernels as pk
from tests.hf import fused
from tests.hf.method_families import FAMILIES

P = 0.25


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(torch.float64, 1e-12, marks=pytest.mark.slow, id="fp64"),
        pytest.param(torch.float32, 1e-5, id="fp32"),
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_as_before(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """All linears adapted: losses and all gradients, through joined calls and without."""
    model, given = fused.family(name, dtype), fused.batch(name, dtype)
    want = fused.step(model, given)
    report = pk.fuse(model)
    assert not [row.module for row in report.rows if row.backend == "peft"]
    with fused.operators() as calls:
        got = fused.step(model, given)
    assert sum(fused.forwards(calls).values()) > 0
    fused.same(got, want, tolerance)


@pytest.mark.parametrize("recompute", [False, True])
def test_an_mlp_is_one_call(recompute: bool) -> None:
    model, given = fused.family("llama"), fused.batch("llama")
    want = fused.step(model, given)
    pk.fuse(model, recompute_mlp=recompute)
    with fused.operators() as calls:
        got = fused.step(model, given)
    fused.same(got, want)
    # In each of two layers q, k and v together and o; an MLP is gate and up together, the
    # activation and down, the first two of which backward may form again.
    of_mlps = 8 if recompute else 4
    assert fused.forwards(calls) == {"lowrank_linear": 4 + of_mlps, "gated_mlp_act": 2}


def test_linears_of_one_tensor_are_one_call() -> None:
    model, x = fused.block(), fused.rows()
    want = fused.run(model, x)
    pk.fuse(model)
    with fused.operators() as calls:
        fused.same(fused.run(model, x), want)
    assert fused.forwards(calls) == {"lowrank_linear": 2}


OPTIONS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"b": 3}, "alpha_pattern": {"a": 7}},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "both biases": {"lora_bias": True, "bias": "all"},
    "one of two": {"target_modules": ["a"]},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_plain_lora(option: str) -> None:
    model, x = fused.block(**OPTIONS[option]), fused.rows()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    want = fused.run(model, x)
    pk.fuse(model)
    with fused.operators() as calls:
        fused.same(fused.run(model, x), want)
    assert fused.forwards(calls)["lowrank_linear"] == (1 if option == "one of two" else 2)


@pytest.mark.filterwarnings("ignore:.*no bias")
def test_a_bias_of_the_update_alone() -> None:
    torch.manual_seed(0)
    block = fused.Block(bias=False).double()
    model = fused.adapted(block, target_modules=["a", "b", "c"], lora_bias=True)
    want = fused.run(model, fused.rows())
    pk.fuse(model)
    with fused.operators() as calls:
        fused.same(fused.run(model, fused.rows()), want)
    assert fused.forwards(calls) == {"lowrank_linear": 2}


@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3, 4), (0,), (2, 0)])
def test_any_leading_dims(lead: tuple[int, ...]) -> None:
    model = fused.block()
    x = torch.randn(*lead, 6, dtype=torch.float64)
    want = fused.run(model, x)
    pk.fuse(model)
    fused.same(fused.run(model, x), want)


def test_inference_is_as_before() -> None:
    model, given = fused.family("llama", lora_dropout=P).eval(), fused.batch("llama")
    with torch.no_grad():
        want = model(**given).logits
        pk.fuse(model)
        torch.testing.assert_close(model(**given).logits, want, rtol=1e-12, atol=1e-12)
    with torch.inference_mode():
        torch.testing.assert_close(model(**given).logits, want, rtol=1e-12, atol=1e-12)


# -- dropout --------------------------------------------------------------------------------------


def _ones(p: float, form: str) -> tuple[Any, Tensor]:
    """A block whose base gives nothing and whose updates give the mean of what they keep of x."""
    torch.manual_seed(0)
    width = 8192
    block = fused.Block(width, bias=False)
    model = fused.adapted(block, target_modules=["a", "b"], lora_dropout=p, r=1, lora_alpha=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1 / width if "lora_A" in name else 1.0 if "lora_B" in name else 0.0)
    pk.fuse(model)
    inner = model.base_model.model
    if form == "alone":
        inner.forward = lambda x: (inner.a(x), inner.b(x))
    if form == "called":
        for name in "ab":
            inner.get_submodule(name).base_layer.register_forward_hook(lambda *_: None)
    return inner, torch.ones(4, width)


@pytest.mark.parametrize("form", ["joined", "alone", "called"])
def test_every_linear_drops_its_own_share(form: str) -> None:
    """1 - p of x is kept, scaled by 1 / (1 - p), anew in every row, linear and call; where the base
    must be called, too."""
    inner, x = _ones(P, form)
    seen: dict[str, Tensor] = {}
    for name in "ab":
        inner.get_submodule(name).register_forward_hook(
            lambda module, args, y, name=name: seen.__setitem__(name, y.detach()[:, 0])
        )
    torch.manual_seed(0)
    inner(x)
    first = dict(seen)
    deviation = (P / (1 - P) / 8192) ** 0.5
    for kept in first.values():
        assert (kept - 1).abs().max() < 5 * deviation
        assert len(kept.unique()) == len(kept)
    assert not torch.equal(first["a"], first["b"])
    inner(x)
    assert not torch.equal(seen["a"], first["a"])
    torch.manual_seed(0)
    inner(x)
    assert torch.equal(seen["a"], first["a"])
    inner.eval()
    inner(x)
    torch.testing.assert_close(seen["a"], torch.ones(4))


def test_the_probability_is_read_in_each_call() -> None:
    inner, x = _ones(0.5, "joined")
    for name in "ab":
        inner.get_submodule(name).lora_dropout["default"].p = 0.0
    torch.manual_seed(0)
    torch.testing.assert_close(inner.a(x), torch.ones(4, 5))


def test_a_dropout_in_training_within_a_model_in_evaluation() -> None:
    """As PEFT does it, the module of the dropout says which it is."""
    inner, x = _ones(P, "joined")
    inner.eval()
    inner.a.lora_dropout.train()
    assert not torch.allclose(inner.a(x), torch.ones(4, 5))
    assert torch.allclose(inner.b(x), torch.ones(4, 5))


# -- dtypes ---------------------------------------------------------------------------------------


def _errors(values: fused.Values, exact: fused.Values) -> dict[str, float]:
    return {name: fused.relative(values[name], value) for name, value in exact.items()}


def _in(dtype: torch.dtype, autocast_adapters: bool = True) -> Any:
    """The same block in another dtype, its values those of bf16."""
    torch.manual_seed(0)
    base = fused.Block(48).bfloat16()
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=5, target_modules=["a", "b"], init_lora_weights=False)
    torch.manual_seed(1)
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=autocast_adapters)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model.to(dtype) if dtype == torch.float64 else model


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("wide", [False, True], ids=["bf16 adapters", "fp32 adapters"])
def test_a_16_bit_base_is_as_exact_as_16_bit_torch(wide: bool, autocast: bool) -> None:
    """Outputs within 2, gradients within 3 times the error of PEFT with everything in bf16."""
    x = fused.rows(torch.bfloat16, 64, width=48)
    exact = fused.run(_in(torch.float64), x.double())

    def ran(model: Any) -> fused.Values:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return fused.run(model, x)

    plain = _errors(ran(_in(torch.bfloat16, False)), exact)
    model = _in(torch.bfloat16, wide)
    peft_own = ran(model)
    pk.fuse(model)
    with fused.operators() as calls:
        got = ran(model)
    assert fused.forwards(calls) == {"lowrank_linear": 1}
    assert {n: v.dtype for n, v in got.items()} == {n: v.dtype for n, v in peft_own.items()}
    for name, error in _errors(got, exact).items():
        assert error <= (2 if name == "y" else 3) * plain[name] + 1e-6, name


def test_an_fp32_base_under_autocast() -> None:
    """The base is called: its weight has another dtype than its product."""
    model, x = fused.block(torch.float32), fused.rows(torch.float32)
    exact = fused.run(fused.block(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        plain = fused.run(model, x)
        report = pk.fuse(model)
        got = fused.run(model, x)
    assert "computed in bfloat16" in next(iter(report.declined.values()))
    assert got["y"].dtype == plain["y"].dtype
    for name, error in _errors(got, exact).items():
        assert error <= 3 * fused.relative(plain[name], exact[name]) + 1e-6, name


def test_adapters_of_another_dtype_than_an_fp32_base() -> None:
    model, x = fused.block(torch.float32), fused.rows(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.bfloat16()
    want = fused.run(model, x)
    pk.fuse(model)
    got = fused.run(model, x)
    # PEFT rounds x to bf16 for the update; here nothing is rounded.
    for name, value in want.items():
        assert fused.relative(got[name], value) < 2e-2, name
        assert got[name].dtype == value.dtype


def test_x_is_kept_once_for_all_that_read_it() -> None:
    """PEFT keeps an fp32 copy of a 16-bit x for every linear, and what its dropouts give."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    def bytes_of(model: Any) -> int:
        x = fused.rows(torch.bfloat16, 256, width=512)
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            inner = model.base_model.model
            outputs = inner.a(x), inner.b(x)
        assert all(y.requires_grad for y in outputs)
        own = {where: size for where, size in kept.items() if where not in parameters}
        return sum(own.values())

    torch.manual_seed(0)
    block = fused.Block(512).bfloat16()
    model = fused.adapted(block, target_modules=["a", "b"], lora_dropout=P)
    before = bytes_of(model)
    pk.fuse(model)
    size = 256 * 512 * 2
    assert before >= 4 * size  # of each linear what is dropped, in fp32, and its mask
    # x, and of each linear h [N, r] and the generator's state.
    assert bytes_of(model) == size + 2 * (256 * 4 * 2 + 16)
