"""Which calls of fused layers our operators run, together or alone, and which are PEFT's own: each
is what it was, and the report says it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from torch.autograd import forward_ad

import petal_kernels as pk
from tests.hf import fused

JOINED, ALONE, PEFTS = 2, 3, 2  # forwards of a block: (a, b) and c; each alone; one is PEFT's


class Half(nn.Module):
    """Another kind of dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


class Noisy(nn.Dropout):
    """Another by its base class."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def _inner(model: Any) -> Any:
    return model.base_model.model


# -- PEFT's own forward ---------------------------------------------------------------------------


def _cast_off(model: Any) -> None:
    _inner(model).a.cast_input_dtype_enabled = False


def _another_dropout(model: Any) -> None:
    _inner(model).a.lora_dropout["default"] = Half()


def _a_subclass_of_dropout(model: Any) -> None:
    _inner(model).a.lora_dropout["default"] = Noisy()


def _a_hooked_dropout(model: Any) -> None:
    drop = _inner(model).a.lora_dropout["default"]
    drop.register_forward_hook(lambda module, args, y: y * 2)


def _all_dropped(model: Any) -> None:
    _inner(model).a.lora_dropout["default"] = nn.Dropout(1.0)


def _hooked_down(model: Any) -> None:
    _inner(model).a.lora_A["default"].register_forward_hook(lambda module, args, y: y * 2)


def _hooked_up(model: Any) -> None:
    _inner(model).a.lora_B["default"].register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def _another_factor(model: Any) -> None:
    _inner(model).a.lora_A["default"].__class__ = fused.Scaled


def _replaced_factor(model: Any) -> None:
    down = _inner(model).a.lora_A["default"]
    down.forward = lambda x: x[..., :4]


def _tensor_scale(model: Any) -> None:
    _inner(model).a.scaling["default"] = torch.tensor(1.5, dtype=torch.float64)


def _infinite_scale(model: Any) -> None:
    _inner(model).a.scaling["default"] = float("inf")


def _several(model: Any) -> None:
    torch.manual_seed(2)
    config = peft.LoraConfig(r=3, target_modules=["a"], init_lora_weights=False)
    model.add_adapter("other", config)
    _inner(model).a.set_adapter(["default", "other"])


def _none(model: Any) -> None:
    _inner(model).a.set_adapter([])


def _twice(model: Any) -> None:
    _inner(model).a._active_adapter = ["default", "default"]


def _disabled(model: Any) -> None:
    _inner(model).a.enable_adapters(False)


def _merged(model: Any) -> None:
    _inner(model).a.merge()


def _variant(model: Any) -> None:
    torch.manual_seed(2)
    config = peft.LoraConfig(r=3, target_modules=["a"], use_dora=True, init_lora_weights=False)
    model.add_adapter("other", config)
    _inner(model).a.set_adapter("other")


OWN: list[tuple[Callable[[Any], None], str]] = [
    (_cast_off, "casting of its input is off"),
    (_another_dropout, "its dropout is another module"),
    (_a_subclass_of_dropout, "its dropout is another module"),
    (_a_hooked_dropout, "its dropout is another module"),
    (_all_dropped, "drops all"),
    (_hooked_down, "lora_A has hooks"),
    (_hooked_up, "lora_B has hooks"),
    (_another_factor, "lora_A is a Scaled"),
    (_replaced_factor, "lora_A has its forward replaced"),
    (_tensor_scale, "no finite number"),
    (_infinite_scale, "no finite number"),
    (_several, "active at once: 2"),
    (_none, "active at once: 0"),
    (_twice, "active at once: 2"),
    (_disabled, "disabled"),
    (_merged, "merged"),
    (_variant, "a DoraLinearVariant of PEFT's"),
]


@pytest.mark.parametrize(("change", "why"), OWN, ids=[change.__name__ for change, _ in OWN])
def test_what_the_operators_do_not_cover_is_pefts(change: Callable[[Any], None], why: str) -> None:
    """Then b, which reads the same tensor, runs alone."""
    plain, x = fused.block(), fused.rows()
    model = copy.deepcopy(plain)
    pk.fuse(model)
    for each in (plain, model):
        change(each)
    want = fused.run(plain, x)
    with fused.operators() as calls:
        got = fused.run(model, x)
    if change is _infinite_scale:  # inf and NaN where PEFT has them
        want, got = (
            {name: value.nan_to_num(1.0, 2.0, 3.0) for name, value in each.items()}
            for each in (want, got)
        )
    fused.same(got, want)
    assert fused.forwards(calls) == {"lowrank_linear": PEFTS}
    report = pk.fuse(model)
    row = next(row for row in report.rows if row.module.endswith(".a"))
    assert row.backend == "peft"
    assert why in row.why
    assert "peft" not in [each.backend for each in report.rows if each is not row]
    assert why in str(report)


def test_keywords_and_further_arguments_are_pefts() -> None:
    """What the layer's own forward does with them, it goes on doing."""
    model, x = fused.block(), fused.rows()
    layer = _inner(model).a
    layer.base_layer.forward = lambda x, more=0.0: x[..., :5] + more
    want = layer(x, more=2.0)
    pk.fuse(model)
    with fused.operators() as calls:
        torch.testing.assert_close(layer(x, more=2.0), want)
        torch.testing.assert_close(layer(x, 2.0), want)
    assert not calls


def test_a_model_that_hands_over_something_else() -> None:
    model = fused.block()
    want = _inner(model).a
    for wrong in (torch.ones(2, 6, dtype=torch.int64), torch.ones(2, 6, dtype=torch.complex128)):
        with pytest.raises(RuntimeError) as before:
            want(wrong)
        pk.fuse(model)
        with pytest.raises(RuntimeError) as after:
            want(wrong)
        assert str(after.value) == str(before.value)
        pk.unfuse(model)


@pytest.mark.parametrize("lead", [(2,), ()])
def test_rows_of_another_width_are_refused_by_name(lead: tuple[int, ...]) -> None:
    model = fused.block()
    pk.fuse(model)
    with pytest.raises(ValueError, match=r"x: want shape \[..., 6\]"):
        model(torch.ones(*lead, 7, dtype=torch.float64))


def test_transforms_of_torch_func() -> None:
    """Our operators have no rule for them; PEFT's own forward has."""
    plain, x = fused.block(), fused.rows().detach()
    model = copy.deepcopy(plain)
    pk.fuse(model)
    want = torch.func.vmap(plain)(x)
    torch.testing.assert_close(torch.func.vmap(model)(x), want)

    def loss(model: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: model(x).square().sum()

    torch.testing.assert_close(torch.func.grad(loss(model))(x), torch.func.grad(loss(plain))(x))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        got, want_dual = (forward_ad.unpack_dual(each(dual)).tangent for each in (model, plain))
        assert got is not None
        torch.testing.assert_close(got, want_dual)


def test_second_derivatives_are_refused() -> None:
    model, x = fused.block(), fused.rows()
    pk.fuse(model)
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        first.sum().backward()


# -- hooks, and joined calls ----------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True])
def test_hooks_of_the_layers_see_what_they_saw(backward: bool) -> None:
    """For a backward hook torch hands every layer an x of its own: then they run one by one."""
    plain, x = fused.block(), fused.rows()
    model = copy.deepcopy(plain)
    pk.fuse(model)
    seen: list[list[Tensor]] = [[], []]

    def watch(layer: nn.Module, values: list[Tensor]) -> None:
        layer.register_forward_hook(lambda module, args, y: values.extend((args[0], y)))
        if backward:
            layer.register_full_backward_hook(lambda module, dx, dy: values.extend((*dx, *dy)))

    for each, values in zip((plain, model), seen, strict=True):
        for name in "abc":
            watch(_inner(each).get_submodule(name), values)
    want = fused.run(plain, x)
    with fused.operators() as calls:
        fused.same(fused.run(model, x), want)
    assert fused.forwards(calls) == {"lowrank_linear": ALONE if backward else JOINED}
    assert len(seen[0]) == (12 if backward else 6)
    for got, expected in zip(*seen, strict=True):
        torch.testing.assert_close(got, expected)


def test_a_hook_that_changes_one_members_input() -> None:
    plain, x = fused.block(), fused.rows()
    model = copy.deepcopy(plain)
    pk.fuse(model)
    for each in (plain, model):
        _inner(each).b.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    want = fused.run(plain, x)
    with fused.operators() as calls:
        fused.same(fused.run(model, x), want)
    assert fused.forwards(calls) == {"lowrank_linear": ALONE}


def test_a_hooked_member_of_an_mlp_is_called() -> None:
    plain, given = fused.family("llama"), fused.batch("llama")
    model = copy.deepcopy(plain)
    pk.fuse(model)
    for each in (plain, model):
        mlp = each.get_submodule("base_model.model.model.layers.0.mlp")
        mlp.up_proj.register_forward_hook(lambda module, args, y: y * 2)
    want = fused.step(plain, given)
    with fused.operators() as calls:
        fused.same(fused.step(model, given), want)
    assert fused.forwards(calls)["gated_mlp_act"] == 1
    notes = pk.fuse(model).notes
    assert "one call: LlamaMLP (gate_proj, up_proj, down_proj) x 1" in notes


@pytest.mark.parametrize("change", [_disabled, _merged, _another_dropout, _tensor_scale])
@pytest.mark.parametrize("member", ["gate_proj", "down_proj"])
def test_a_member_of_an_mlp_that_is_pefts(member: str, change: Callable[[Any], None]) -> None:
    plain, given = fused.family("llama"), fused.batch("llama")
    model = copy.deepcopy(plain)
    pk.fuse(model)
    for each in (plain, model):
        mlp = each.get_submodule("base_model.model.model.layers.0.mlp")
        holder: Any = nn.Module()
        holder.base_model = nn.Module()
        holder.base_model.model = nn.Module()
        holder.base_model.model.a = mlp.get_submodule(member)
        change(holder)
    want = fused.step(plain, given)
    with fused.operators() as calls:
        fused.same(fused.step(model, given), want)
    assert fused.forwards(calls)["gated_mlp_act"] == 1


def test_a_class_put_in_front_of_the_module_around_stays() -> None:
    """Where a member is replaced then, nothing is taken away from under it."""
    model, x = fused.block(), fused.rows()
    pk.fuse(model)
    inner = model.base_model.model
    front = type("Sharded", (type(inner),), {})
    inner.__class__ = front
    inner.a = inner.b
    assert type(inner) is front
    model(x)


def test_members_whose_dropouts_differ_run_one_by_one() -> None:
    model, x = fused.block(lora_dropout=0.25), fused.rows()
    pk.fuse(model)
    _inner(model).b.lora_dropout["default"].p = 0.5
    with fused.operators() as calls:
        model(x)
    assert fused.forwards(calls) == {"lowrank_linear": ALONE}
