"""DoRA, PiSSA and OLoRA on models: which calls are joined, what the report says, what a file holds,
what is refused; the table of methods has the rest (`methods.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import petal_kernels as pk
from petal_kernels.nn import lora_fused
from tests.hf import tiny_text
from tests.hf.test_lora_parts import attached, counted, llama, one_by_one, same, step
from tests.hf.test_sharded import group as group
from tests.hf.test_sharded import shard

INITS = ("pissa", "pissa_niter_4", "olora")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    with counted(monkeypatch) as found:
        yield found


@torch.no_grad()
def moved(attachment: Any) -> Any:
    generator = torch.Generator().manual_seed(6)
    for parameter in attachment.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return attachment


# -- joined calls ---------------------------------------------------------------------------------


def test_magnitudes_join_what_reads_one_tensor_and_no_mlp(
    calls: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    moved(attached(model, use_dora=True))
    got = step(model)
    assert calls == {"lora_linears": 4, "lora_mlp": 0}  # q, k, v; gate, up; of two layers
    assert sum("magnitude" in name for name in got) == 14
    same(got, one_by_one(model, monkeypatch))


@pytest.mark.parametrize("init", INITS)
def test_what_was_taken_joins_with_its_frozen_half(
    init: str, calls: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    moved(attached(model, init_lora_weights=init))
    got = step(model)
    assert calls == {"lora_linears": 2, "lora_mlp": 2}
    same(got, one_by_one(model, monkeypatch))


@pytest.mark.parametrize("more", [{"use_dora": True}, {"init_lora_weights": "olora"}], ids=str)
def test_with_dropout_they_run_one_by_one(
    more: dict[str, Any], calls: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    moved(attached(model, 0.25, **more))
    got = step(model)
    assert calls == {"lora_linears": 0, "lora_mlp": 0}
    same(got, one_by_one(model, monkeypatch))
    model.eval()
    step(model)
    assert calls["lora_linears"] > 0


def test_a_bias_that_is_trained_is_added_behind_the_magnitude(
    calls: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = tiny_text.build("bert").train()
    for module in model.modules():
        module.requires_grad_(False)
    attachment = moved(
        pk.attach(
            model,
            pk.LoraConfig(r=3, target_modules=["query", "key"], use_dora=True, bias="lora_only"),
        )
    )
    batch = tiny_text.batch("bert")

    def run() -> dict[str, Tensor]:
        for parameter in attachment.parameters():
            parameter.grad = None
        model(**batch).loss.backward()
        return {n: p.grad for n, p in attachment.named_parameters()}

    got = run()
    assert calls["lora_linears"] == 2
    assert sum(name.endswith("bias") for name in got) == 4
    assert all(grad is not None and grad.abs().max() > 0 for n, grad in got.items() if "query" in n)
    with monkeypatch.context() as patch:
        patch.setattr("petal_kernels.hf.methods.lora_parts.lora_linears", lambda *_: "not today")
        same(run(), got)


def test_a_magnitude_in_an_mlp_is_said_where_it_is_given_to_one() -> None:
    members: list[Any] = [
        (pk.nn.DoRALinear(nn.Linear(6, 6).requires_grad_(False), 2), None) for _ in range(3)
    ]
    why = lora_fused.lora_mlp(torch.ones(2, 6), members, "silu")
    assert why == "a magnitude stands between a linear and the activation"


# -- report, files, merging -----------------------------------------------------------------------


def test_the_report_says_what_they_are() -> None:
    model = llama(torch.float32)
    attachment = attached(model, use_dora=True, init_lora_weights="pissa")
    rows = {row.module: row for row in attachment.report().rows}
    q = rows["layers.0.self_attn.q_proj"]
    assert q.shape == "64 -> 64, r 4, scale 1.5, pissa, magnitude"
    assert q.trainable == 4 * (64 + 64) + 64
    first = sum(2 * b.numel() // 2 for b in attachment.adapter.buffers())
    report = attachment.report()
    assert report.stored == report.trainable + first
    # Alike but for their layer: one row of the table.
    assert str(report).count("q_proj x 2") == 1
    plan = pk.plan(llama(torch.float32), attachment.config)
    assert [row.shape for row in plan.rows] == [row.shape for row in report.rows]


@pytest.mark.parametrize(
    ("more", "q", "up"),
    [
        ({}, "", ""),
        ({"use_dora": True}, "", "its MLP in parts: a magnitude stands before the activation"),
        ({"init_lora_weights": "olora"}, "", ""),
        (
            {"init_lora_weights": "olora", "lora_dropout": 0.5},
            "one by one in training: dropout leaves out a part of the base",
            "one by one in training: dropout leaves out a part of the base",
        ),
        ({"lora_dropout": 0.5}, "", ""),
    ],
    ids=str,
)
def test_the_report_says_what_is_not_joined(more: Any, q: str, up: str) -> None:
    model = llama(torch.float32)
    attachment = attached(model, **more)

    def said() -> list[str]:
        rows = {row.module.rpartition(".")[2]: row.why for row in attachment.report().rows}
        found = [
            [w for w in rows[n].split("; ") if w.startswith(("one by", "its MLP"))]
            for n in ("q_proj", "up_proj")
        ]
        return ["".join(each) for each in found]

    assert said() == [q, up]
    model.eval()
    assert said() == ["", "" if "one by one" in up else up]
    with attachment.disabled():
        assert said() == ["", ""]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_a_file_holds_the_first_values_and_nothing_is_decomposed_for_it(
    init: str, dora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama(torch.float32)
    attachment = moved(attached(model, init_lora_weights=init, use_dora=dora))
    attachment.save(tmp_path / "a")
    want = step(model)
    names = set(attachment.state_dict())
    kinds = {"down", "up", "first_down", "first_up"} | ({"magnitude"} if dora else set())
    assert {name.rpartition(".")[2] for name in names} == kinds

    def no(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("decomposed")

    for where, name in ((torch.linalg, "svd"), (torch.linalg, "qr"), (torch, "svd_lowrank")):
        monkeypatch.setattr(where, name, no)
    other = llama(torch.float32)
    pk.attach(other, tmp_path / "a")
    same(step(other), want, 1e-6)
    monkeypatch.undo()
    # Another machine's decomposition has other signs: the file's own values count.
    third = llama(torch.float32)
    again = attached(third, init_lora_weights=init, use_dora=dora)
    with torch.no_grad():
        for buffer in again.adapter.buffers():
            buffer.neg_()
    again.load(tmp_path / "a")
    same(step(third), want, 1e-6)


def test_a_merged_model_has_what_the_adapted_one_computed() -> None:
    for more in ({"use_dora": True}, {"init_lora_weights": "olora", "use_dora": True}):
        model = llama()
        weights = {name: t.clone() for name, t in model.state_dict().items()}
        attachment = moved(attached(model, **more))
        model.eval()
        x = torch.randn(2, 5, 64, dtype=torch.float64)
        want = model(inputs_embeds=x).last_hidden_state
        report = attachment.merge()
        assert not report.kept
        torch.testing.assert_close(model(inputs_embeds=x).last_hidden_state, want)
        attachment.unmerge()
        torch.testing.assert_close(model(inputs_embeds=x).last_hidden_state, want)
        plain = attachment.merge_and_unload()
        torch.testing.assert_close(plain(inputs_embeds=x).last_hidden_state, want)
        assert plain.state_dict().keys() == weights.keys()
        plain.load_state_dict(weights)


def test_weights_that_change_under_a_magnitude_change_its_norms() -> None:
    model, other = llama(), llama()
    moved(attached(model, use_dora=True))
    step(model)
    with torch.no_grad():
        for both in (model, other):
            for layer in both.layers:
                layer.self_attn.q_proj.weight.mul_(3.0)
    moved(attached(other, use_dora=True, init_lora_weights=False))
    got, want = step(model), step(other)
    # Their magnitudes were taken from other weights: the outputs do not count, the norms do.
    q = "petal.layers.0.self_attn.q_proj"
    ratio = model.get_submodule(q).norms() / other.get_submodule(q).norms()
    torch.testing.assert_close(ratio, torch.ones_like(ratio))
    assert not torch.allclose(got["y"], want["y"])


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(
    "more",
    [{"use_dora": True}, {"init_lora_weights": "olora"}, {"trainable_token_indices": [3, 9, 30]}],
    ids=str,
)
def test_a_sharded_model_trains_as_a_whole_one(more: dict[str, Any], dropout: float) -> None:
    """Between two calls a base's weight changes, too: FSDP leaves no trace of that in a tensor."""
    batch, losses = tiny_text.batch("llama"), []
    for sharded in (False, True):
        model: Any = tiny_text.build("llama", torch.float32).train()
        attachment = moved(attached(model, dropout, **more))
        if sharded:
            shard(model)
        optimizer = torch.optim.SGD(list(attachment.parameters()), lr=0.1)
        for _ in range(3):
            torch.manual_seed(3)
            losses.append(model(**batch).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                model.model.layers[0].self_attn.q_proj._parameters["weight"].mul_(1.5)
    assert len({float(loss.detach()) for loss in losses[:3]}) == 3
    torch.testing.assert_close(losses[:3], losses[3:])


# -- refusals -------------------------------------------------------------------------------------


def _meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(6, 8))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init_lora_weights": "pissa", "r": 7}, r"r: want at most 6, .* got 7 \(of 0\)"),
        (
            {"init_lora_weights": "pissa", "lora_alpha": 0},
            r"lora_alpha: want a number > 0 with init='pissa', got a scale of 0.0 \(of 0\)",
        ),
        (
            {"init_lora_weights": "olora", "meta": True},
            r"init_lora_weights: want a base whose weight 'olora' .* no values .* \(of 0\)",
        ),
        (
            {"use_dora": True, "meta": True},
            r"use_dora: want one whose weight has norms for DoRA, .* no values .* \(of 0\)",
        ),
    ],
    ids=str,
)
def test_refusals_name_the_configs_field_and_the_place(values: Any, message: str) -> None:
    model = _meta() if values.pop("meta", False) else nn.Sequential(nn.Linear(6, 8))
    before = list(model.modules())
    with pytest.raises(ValueError, match=f"^{message}"):
        pk.attach(model, pk.LoraConfig(**{"r": 2, "target_modules": "all-linear"} | values))
    assert list(model.modules()) == before
    assert all(p.requires_grad for p in model.parameters())
