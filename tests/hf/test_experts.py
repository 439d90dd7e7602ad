"""Mixtures of experts on every family: fused against published, and the whole life."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import petal_kernels as pk
from petal_kernels.hf.config import AdapterConfig
from tests.hf import tiny
from tests.hf.tiny_experts import (
    EXPERTS,
    SAME,
    adapter,
    attached,
    batch,
    build,
    logits,
    lora,
    petal,
    read,
    served,
    step,
)

CASES: dict[str, tuple[str, AdapterConfig]] = {
    "bart-lora": ("bart", lora(alpha=8, gate="domain")),
    "bart-adapter": ("bart", adapter(router_input="pooled")),
    "t5-lora": ("t5", lora(router_input="pooled", top_k=2)),
    "t5-adapter": ("t5", adapter(gate="domain", shared_down=True)),
    "gpt2-lora": ("gpt2", lora(top_k=1)),
    "gpt2-adapter": ("gpt2", adapter(gate="domain", activation="silu")),
    "roberta-lora": ("roberta", lora(gate="mean")),
    "roberta-adapter": ("roberta", adapter(router_input="pooled", scale=0.5)),
    "bert-lora": ("bert", lora(gate="domain")),
    "bert-adapter": ("bert", adapter(gate="mean")),
    "llama-lora": ("llama", lora(gate="mean", shared_down=True)),
    "llama-adapter": ("llama", adapter(top_k=2)),
    "llava-lora": ("llava", lora(gate="domain")),
    "llava-adapter": ("llava", adapter()),
    "qwen2_5_vl-lora": ("qwen2_5_vl", lora(gate="domain", shared_down=True)),
    "paligemma-adapter": ("paligemma", adapter(router_input="pooled", top_k=1)),
    "smolvlm-lora": ("smolvlm", lora(router_noise=0.5)),
    "idefics3-adapter": ("idefics3", adapter(top_k=2, router_noise=0.5)),
    "instructblip-lora": ("instructblip", lora(gate="domain")),
    "instructblip-adapter": ("instructblip", adapter(gate="domain", shared_down=True)),
    "instructblip-pooled": ("instructblip", adapter(router_input="pooled", top_k=2)),
    "blip2-lora": ("blip2", lora(router_input="pooled")),
    "blip2-adapter": ("blip2", adapter(gate="domain")),
    "vqa-lora": ("vqa", lora(gate="domain")),
    "vqa-adapter": ("vqa", adapter(top_k=2)),
    "caption-lora": ("caption", lora(router_input="pooled", top_k=2)),
    "caption-adapter": ("caption", adapter(gate="domain")),
    "retrieval-lora": ("retrieval", lora(gate="domain", shared_down=True)),
    "petal-paper": ("instructblip", petal()),
    "petal-pooled": ("instructblip", petal(top_k=2, router_input="pooled")),
    "petal-release": ("instructblip", petal(variant="release", keep=0.7)),
}
EVERY = [pytest.param(*case, id=name) for name, case in CASES.items()]
SOME = [
    pytest.param(*CASES[name], id=name)
    for name in (
        *("bart-lora", "t5-lora", "gpt2-adapter", "llama-adapter", "petal-pooled"),
        *("instructblip-adapter", "vqa-lora"),
    )
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("family", "config"), EVERY)
def test_fused_equals_published(family: str, config: AdapterConfig) -> None:
    fused, published = (attached(family, config, form) for form in ("fused", "published"))
    got, want = step(*fused, family), step(*published, family)
    torch.testing.assert_close(got[0], want[0], rtol=SAME, atol=SAME)
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        error = float((got[1][name] - gradient).norm())
        assert error <= SAME * max(float(gradient.norm()), 1.0), name
        trivial = getattr(config, "top_k", None) == 1 and name.endswith("router")
        trivial |= family == "instructblip" and name.startswith("layers.3.ffn.")  # nobody reads it
        assert trivial or float(gradient.norm()) > 0, name
    routings = published[1].routing()
    assert fused[1].routing().keys() == routings.keys()
    for path, routing in fused[1].routing().items():
        for mine, its in zip(routing, routings[path], strict=True):
            assert (mine is None) == (its is None)
            if mine is not None and mine.dtype != torch.bool:
                torch.testing.assert_close(mine, its, rtol=SAME, atol=SAME)
            elif mine is not None:
                assert torch.equal(mine, its)
        usage = fused[1].expert_usage()[path]
        torch.testing.assert_close(usage.sum(), torch.ones((), dtype=usage.dtype))
    assert not torch.allclose(got[0], read(family, build(family))[0], atol=1e-3)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("family", "config"), EVERY)
def test_life(family: str, config: AdapterConfig, tmp_path: Path) -> None:
    """attach, train, save, load, disable, merge, detach."""
    model, attachment = attached(family, config)
    plain = build(family)
    with torch.no_grad():
        before = read(family, plain)[0]
    keys = {k for k in model.state_dict() if not k.startswith("petal.")}
    assert keys == set(plain.state_dict())
    optimizer = torch.optim.SGD(list(attachment.parameters()), lr=0.05)
    step(model, attachment, family)
    optimizer.step()
    trained = logits(model, attachment, family)
    attachment.save(tmp_path / "adapter")
    with attachment.disabled(), torch.no_grad():
        assert torch.equal(read(family, model)[0], before)

    other: Any = pk.attach(plain, copy.deepcopy(config))
    plain.to(torch.float64)
    other.load(tmp_path / "adapter")
    assert torch.equal(logits(plain, other, family), trained)

    report = attachment.merge()
    torch.testing.assert_close(logits(model, attachment, family), trained)
    places = set(attachment.method.experts())
    if isinstance(config, pk.ExpertConfig):
        folds = config.gate == "mean" and config.kind == "lora"
        assert set(report.folded if folds else report.kept) == places
    else:
        assert f"{places.pop()}: experts" in report.kept
    attachment.unmerge()
    assert attachment.detach() is model
    assert not attachment.method.routings
    with torch.no_grad():
        assert torch.equal(read(family, model)[0], before)
    assert set(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())


def test_step_zero_changes_nothing_but_the_published_start_of_petal() -> None:
    for family, config, changes in (
        ("gpt2", lora(), False),
        ("bart", adapter(), False),
        ("instructblip", petal(expert_init="identity", scale_shift=False), False),
        ("instructblip", petal(scale_shift=False), True),
    ):
        model = build(family, torch.float32)
        inputs = batch(family, dtype=torch.float32)
        with torch.no_grad():
            before = model(**inputs).logits
            pk.attach(model, config)
            assert torch.allclose(model(**inputs).logits, before, atol=1e-5) is not changes


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("family", "config"), SOME)
def test_checkpointing_and_two_forwards(family: str, config: AdapterConfig) -> None:
    """Two forwards with other inputs and domains before one backward, recomputed."""

    def run(reentrant: bool | None) -> dict[str, Tensor]:
        model, attachment = attached(family, config)
        model.train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
        total = torch.zeros((), dtype=torch.float64)
        for seed in range(2):
            with served(attachment, family, seed):
                total = total + read(family, model, seed)[1]
        last = attachment.routing()
        total.backward()
        now = attachment.routing()  # a recompute is no forward
        assert all(now[path] is routing for path, routing in last.items())
        return {n: p.grad.clone() for n, p in attachment.named_parameters()}

    want = run(None)
    for got in (run(False), run(True)):
        for name, gradient in want.items():
            torch.testing.assert_close(got[name], gradient, rtol=SAME, atol=SAME, msg=name)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    ("family", "config"),
    [
        pytest.param(*CASES[n], id=n)
        for n in ("bart-lora", "t5-adapter", "gpt2-adapter", "llama-adapter", "petal-pooled")
    ],
)
def test_generation_with_cache_and_beams(family: str, config: AdapterConfig, beams: int) -> None:
    def run(implementation: str, cache: bool) -> Tensor:
        model, attachment = attached(family, config, implementation)
        inputs = batch(family)
        inputs.pop("labels")
        more = {"num_beams": beams, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        with torch.no_grad(), served(attachment, family):
            return model.generate(**inputs, **more, use_cache=cache)  # type: ignore[operator]

    want = run("published", True)
    assert torch.equal(run("fused", True), want)
    if config.gate == "domain" and family == "gpt2":  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="tokens are generated with a cache"):
            run("fused", False)
    else:
        assert torch.equal(run("fused", False), want)


@pytest.mark.parametrize(("tokens", "keep"), [("text", 0.6), ("all", 0.6)])
def test_petals_embeddings_are_the_formula(tokens: str, keep: float) -> None:
    model, attachment = attached("instructblip", petal(gate="mean", tokens=tokens))
    embeddings = model.get_submodule("qformer.embeddings")
    m: Any = attachment.adapter.experts
    ids, queries = torch.arange(5, 11).repeat(2, 1), torch.randn(2, 4, 32, dtype=torch.float64)
    with torch.no_grad():
        got = embeddings(input_ids=ids, query_embeds=queries)
        with attachment.disabled():
            e = embeddings(input_ids=ids, query_embeds=queries)
        mean = sum(
            (e @ m.down[j].t() + m.down_bias[j]) @ m.up[j].t() + m.up_bias[j]
            for j in range(EXPERTS)
        )
        want = keep * e + 0.4 * mean / EXPERTS
        first = 4 if tokens == "text" else 0
        torch.testing.assert_close(got[:, first:], want[:, first:])
        assert torch.equal(got[:, :first], e[:, :first])
        only = embeddings(query_embeds=queries)  # no instruction
        assert torch.allclose(only, e[:, :4]) is (tokens == "text")


def test_a_copied_model_uses_its_own_experts_and_no_graph() -> None:
    for family, config in (("llama", lora()), ("bart", adapter()), ("instructblip", petal())):
        model, attachment = attached(family, config)
        model.train()(**batch(family))
        twin = copy.deepcopy(model.eval())
        want = logits(model, attachment, family)
        with torch.no_grad():
            for p in attachment.adapter.parameters():
                p.zero_()
            assert torch.equal(twin(**batch(family)).logits, want)


@pytest.mark.parametrize(
    ("family", "config"),
    [CASES[n] for n in ("bart-adapter", "gpt2-lora", "llava-lora", "petal-paper")],
)
def test_a_16_bit_base_keeps_its_dtype(family: str, config: AdapterConfig) -> None:
    model = build(family, torch.bfloat16).train()
    attachment: Any = pk.attach(model, copy.deepcopy(config))
    tiny.randomise(attachment.adapter)
    with served(attachment, family):
        out = model(**batch(family, dtype=torch.bfloat16))
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    for name, p in attachment.named_parameters():
        assert p.dtype == p.grad.dtype == torch.float32, name
        assert bool(p.grad.isfinite().all()), name
    wide = build(family, torch.bfloat16).float()
    twin: Any = pk.attach(wide, copy.deepcopy(config))
    tiny.randomise(twin.adapter)
    with torch.no_grad(), served(twin, family):
        exact = wide(**batch(family, dtype=torch.float32)).logits
    error = float((out.logits.detach().float() - exact).norm() / exact.norm())
    assert error < 0.1, error


def test_autocast_keeps_the_embeddings_wide() -> None:
    model = build("instructblip", torch.float32)
    attachment = pk.attach(model, petal(expert_init="identity"))
    seen: list[Tensor] = []
    attachment.found.stacks[0].module.register_forward_pre_hook(
        lambda m, args: seen.append(args[0])
    )
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch("instructblip", dtype=torch.float32)).loss.backward()
    assert [x.dtype for x in seen] == [torch.float32]
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in attachment.parameters())


def test_target_modules_choose_the_places() -> None:
    config: AdapterConfig = lora(target_modules=["decoder.cross.value"])
    _, attachment = attached("bart", config)
    assert [row.role for row in attachment.report().rows] == ["decoder.cross.value"] * 2
    assert "3 x r 4, softmax" in str(attachment.report())
    for family, config in (
        ("gpt2", adapter(gate="domain", adapter_dtype="bfloat16")),
        ("instructblip", petal(router_input="pooled", adapter_dtype="bfloat16")),
    ):
        report = pk.attach(build(family, torch.float32), config).report()
        place = [row for row in report.rows if "3 x r 4" in row.shape]
        assert place
        assert all(row.backend in ("native", "torch") and row.trainable for row in place)


def test_an_adapter_needs_the_width_of_its_embeddings(tmp_path: Path) -> None:
    _, attachment = attached("instructblip", petal())
    attachment.save(tmp_path / "a")
    saved = pk.hf.files.read(tmp_path / "a")
    assert saved.base["embeddings"] == {"width": 32}
    saved.base["embeddings"]["width"] = 48
    with pytest.raises(ValueError, match=r"base\.embeddings\.width: the adapter was trained on"):
        saved.check_base(attachment.signature())


@pytest.mark.parametrize(
    ("family", "config"), [("llama", lora(top_k=2)), ("instructblip", petal(router_noise=0.1))]
)
def test_a_directory_attaches_the_method(
    family: str, config: AdapterConfig, tmp_path: Path
) -> None:
    inputs, outs = batch(family, dtype=torch.float32), []
    for source in (config, tmp_path / "a"):
        model = build(family, torch.float32)
        attachment = pk.attach(model, source)
        if source is config:
            tiny.randomise(attachment.adapter)
            attachment.save(tmp_path / "a")
        assert attachment.config == config
        with torch.no_grad():
            outs.append(model(**inputs).logits)
    assert torch.equal(*outs)
