"""The fused layers against the eager published form over the same parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from petal_kernels.hf import PetalConfig, attach
from tests.hf import compare, tiny

FAMILIES = tuple(tiny.FAMILIES)
VARIANTS = ("paper", "release")
EXACT = 1e-11  # relative, in fp64: the two forms differ by the order of some thousand additions


def _config(variant: str, dropout: float = 0.0, **values: object) -> PetalConfig:
    return PetalConfig(r=6, variant=variant, dropout=dropout, scale=0.7, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_fp64_outputs_and_gradients_are_the_published_ones(family: str, variant: str) -> None:
    batch = compare.to_dtype(tiny.batch(family), torch.float64)
    runs = [
        compare.step(*compare.build(family, _config(variant), form, torch.float64), batch)
        for form in ("fused", "published")
    ]
    compare.assert_close(runs[0], runs[1], EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_is_as_accurate_as_the_published_form(family: str, variant: str) -> None:
    batch = tiny.batch(family)
    fused, plain = (
        compare.step(*compare.build(family, _config(variant), form), batch)
        for form in ("fused", "published")
    )
    model, attachment = compare.build(family, _config(variant), "published", torch.float64)
    exact = compare.step(model, attachment, compare.to_dtype(batch, torch.float64))
    compare.assert_as_exact(fused, plain, exact)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_with_dropout_and_the_same_masks(
    family: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(variant, dropout=0.3)
    batch = compare.to_dtype(tiny.batch(family), torch.float64)
    recorder = compare.MaskRecorder(monkeypatch)
    fused = compare.step(*compare.build(family, config, "fused", torch.float64), batch)
    model, attachment = compare.build(family, config, "published", torch.float64)
    recorder.give_to(attachment, config.dropout)
    compare.assert_close(fused, compare.step(model, attachment, batch), EXACT)
    without = compare.build(family, _config(variant), "published", torch.float64)
    assert compare.relative(fused.logits, compare.step(*without, batch).logits) > 1e-3


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "values",
    [
        {"context": "batch"},
        {"use_cross_residual": False},
        {"scale_shift": False},
        {"core": "tucker"},
        {"variant": "release", "core": "cp", "use_cross_residual": True},
        {"variant": "release", "context": "none"},
        {"target_modules": ["query", "value"]},
        {"target_modules": ["cross.key"]},
        {"target_modules": r".*layer\.[12]\.attention.*"},
    ],
    ids=str,
)
def test_options_apart_from_the_variants(values: dict[str, object]) -> None:
    config = PetalConfig(**{"r": 3, "dropout": 0.0, **values})  # type: ignore[arg-type]
    batch = compare.to_dtype(tiny.batch("instructblip"), torch.float64)
    runs = [
        compare.step(*compare.build("instructblip", config, form, torch.float64), batch)
        for form in ("fused", "published")
    ]
    compare.assert_close(runs[0], runs[1], EXACT)


def test_evaluation_without_gradients_is_the_published_one() -> None:
    batch = compare.to_dtype(tiny.batch("instructblip"), torch.float64)
    outs = []
    for form in ("fused", "published"):
        model, _ = compare.build("instructblip", _config("paper", 0.3), form, torch.float64)
        with torch.no_grad():
            outs.append(model.eval()(**batch).logits)
        with torch.inference_mode():
            assert compare.relative(model(**batch).logits, outs[-1]) <= EXACT
    assert compare.relative(*outs) <= EXACT


def _attention(model: torch.nn.Module, layer: int, block: str) -> Any:
    attention = model.qformer.encoder.layer[layer].get_submodule(block)  # type: ignore[index, union-attr]
    return attention.attention


def test_bases_that_are_called_not_read() -> None:
    """Hooked, replaced and subclassed bases beside plain ones, in groups of three, two and one."""
    runs = []
    batch = compare.to_dtype(tiny.batch("instructblip"), torch.float64)
    for form in ("fused", "published"):
        model = tiny.instructblip()
        _attention(model, 0, "attention").key.register_forward_hook(lambda m, a, out: out * 1.5)
        special = type("Special", (torch.nn.Linear,), {"forward": lambda m, x: x @ m.weight.T})
        _attention(model, 1, "attention").query.__class__ = special
        cross = _attention(model, 2, "crossattention")
        cross.value.forward = lambda x, value=cross.value: torch.tanh(x @ value.weight.T)
        cross.query.register_forward_pre_hook(lambda m, a: (a[0] * 0.5,))
        attachment = attach(model, _config("release"), implementation=form)
        assert len(attachment.report().declined) == 4
        tiny.randomise(attachment.adapter)
        runs.append(compare.step(model.double().train(), attachment, batch))
    compare.assert_close(runs[0], runs[1], EXACT)


def test_a_special_base_is_called_in_its_own_turn() -> None:
    """A weight that exists only while its own module runs, as under partitioning engines."""
    batch = compare.to_dtype(tiny.batch("instructblip"), torch.float64)
    logits = []
    for partitioned in (False, True):
        model, found = compare.build("instructblip", _config("paper"), "fused", torch.float64)
        for _, _, _, wrapper in found.installed.wrapped if partitioned else []:
            weight = wrapper.base.weight
            weight.ds_id = 1  # type: ignore[union-attr]
            whole, empty = weight.data, torch.empty(0, dtype=torch.float64)
            weight.data = empty

            def gather(m: object, a: object, w: object = weight, full: object = whole) -> None:
                w.data = full  # type: ignore[attr-defined]

            def release(m: object, a: object, out: object, w: object = weight) -> None:
                w.data = torch.empty(0, dtype=torch.float64)  # type: ignore[attr-defined]

            wrapper.register_forward_pre_hook(gather)
            wrapper.register_forward_hook(release)
        with torch.no_grad():
            logits.append(model(**batch).logits)
    assert compare.relative(*logits) <= EXACT


@pytest.mark.parametrize("in_place", [False, True])
def test_image_features_that_change_on_the_way(in_place: bool) -> None:
    """U_img x_img is shared by the layers only as long as they get the very same x_img."""

    def change(module: object, args: Any, kwargs: dict[str, Any]) -> Any:
        image = kwargs["encoder_hidden_states"]
        with torch.no_grad():
            kwargs["encoder_hidden_states"] = image.mul_(1.5) if in_place else image * 1.5
        return args, kwargs

    batch = compare.to_dtype(tiny.batch("instructblip"), torch.float64)
    logits = []
    for form in ("fused", "published"):
        model, found = compare.build("instructblip", _config("paper"), form, torch.float64)
        block = found.found.layers[2].child("crossattention")
        block.register_forward_pre_hook(change, with_kwargs=True)
        with torch.no_grad():
            logits.append(model(**batch).logits)
    assert compare.relative(*logits) <= EXACT


@pytest.mark.parametrize("form", ["fused", "published"])
def test_the_released_context_mixes_the_batch_and_the_papers_does_not(form: str) -> None:
    batch = compare.to_dtype(tiny.batch("instructblip"), torch.float64)
    one = {name: value[:1] for name, value in batch.items()}
    for variant, mixes in (("paper", False), ("release", True)):
        model, _ = compare.build("instructblip", _config(variant), form, torch.float64)
        with torch.no_grad():
            apart = compare.relative(model(**one).logits, model(**batch).logits[:1])
        assert (apart > 1e-6) == mixes


def test_at_step_zero_only_scale_and_shift_act() -> None:
    model = tiny.instructblip().double()
    batch = compare.to_dtype(tiny.batch("instructblip"), torch.float64)
    with torch.no_grad():
        want = model(**batch).logits
    attachment = attach(model, PetalConfig(r=6, scale_shift=False, dropout=0.5))
    model.double().train()
    assert compare.relative(model(**batch).logits.detach(), want) <= EXACT
    attachment.detach()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_the_published_one(family: str, beams: int) -> None:
    batch = compare.to_dtype(tiny.batch(family), torch.float64)
    del batch["labels"]
    answers = []
    for form in ("fused", "published"):
        model, _ = compare.build(family, _config("paper", 0.3), form, torch.float64)
        settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
        answers.append(model.eval().generate(**batch, **settings))  # type: ignore[operator]
    assert torch.equal(*answers)
