"""The dtype policy, as a table: what is stored, computed and returned in which dtype.

adapters  float32 by default, bfloat16 on request
base      as it comes
compute   autocast's dtype where autocast is on, else the base's
gradients in the parameters' dtype
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import petal_kernels as pk
from petal_kernels.nn import frozen_linear
from tests.hf import compare, tiny

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One row of the policy's table."""

    base: torch.dtype
    adapter: str
    autocast: torch.dtype | None
    compute: torch.dtype
    given: str  # what the operator gets of the base: its weights, or its outputs

    def __str__(self) -> str:
        names = [str(d).removeprefix("torch.") for d in (self.base, self.autocast, self.compute)]
        return f"base-{names[0]}_adapter-{self.adapter}_autocast-{names[1]}"


POLICY = [
    Case(F32, "float32", None, F32, "weights"),
    Case(F32, "bfloat16", None, F32, "weights"),
    Case(BF16, "float32", None, BF16, "weights"),
    Case(BF16, "bfloat16", None, BF16, "weights"),
    Case(F16, "float32", None, F16, "weights"),
    Case(F32, "float32", BF16, BF16, "base"),
    Case(F32, "bfloat16", BF16, BF16, "base"),
    Case(BF16, "float32", BF16, BF16, "weights"),
    Case(F32, "float32", F16, F16, "base"),
]


@pytest.mark.parametrize("case", POLICY, ids=str)
def test_policy(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.instructblip().to(case.base)
    config = pk.PetalConfig(r=4, variant="release", dropout=0.1, adapter_dtype=case.adapter)
    attachment = pk.attach(model, config)
    stored = getattr(torch, case.adapter)
    assert {p.dtype for p in attachment.adapter.parameters()} == {stored}
    tiny.randomise(attachment.adapter)
    batch = compare.to_dtype(tiny.batch("instructblip"), case.base)

    calls: list[tuple[torch.dtype, str]] = []
    operator = pk.lowrank_linear

    def watching(x: Tensor | None, *args: object, **kwargs: object) -> tuple[Tensor, ...]:
        given = "weights" if kwargs.get("weights") is not None else "base"
        outs = operator(x, *args, **kwargs)  # type: ignore[arg-type]
        assert kwargs.get(given) is not None
        assert len({out.dtype for out in outs}) == 1
        calls.append((outs[0].dtype, given))
        return outs

    monkeypatch.setattr(frozen_linear, "lowrank_linear", watching)
    model.train()
    with torch.autocast("cpu", dtype=case.autocast, enabled=case.autocast is not None):
        loss = model(**batch).loss
    loss.backward()
    assert set(calls) == {(case.compute, case.given)}
    gradients = compare.gradients(attachment)
    assert {g.dtype for g in gradients.values()} == {stored}
    assert all(g.isfinite().all() for g in gradients.values())
    assert {p.dtype for p in model.qformer.parameters()} == {case.base}  # type: ignore[union-attr]


@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("base", [F32, BF16], ids=["base-fp32", "base-bf16"])
def test_autocast_is_as_accurate_as_the_published_form(base: torch.dtype, variant: str) -> None:
    config = pk.PetalConfig(r=6, variant=variant, dropout=0.0)
    rounded = [tiny.batch("instructblip", seed=seed) for seed in range(3)]
    for batch in rounded:
        batch["pixel_values"] = batch["pixel_values"].to(base).float()
    errors: dict[str, list[float]] = {}
    exact = []
    model, attachment = compare.build("instructblip", config, "published")
    model = model.to(base).double()
    exact = [compare.step(model, attachment, compare.to_dtype(b, torch.float64)) for b in rounded]
    for form in ("fused", "published"):
        model, attachment = compare.build("instructblip", config, form)
        adapter = {n: p.detach().to(base).float() for n, p in attachment.adapter.named_parameters()}
        model.to(base)
        attachment.adapter.float().load_state_dict(adapter)
        errors[form] = []
        for batch, want in zip(rounded, exact, strict=True):
            with torch.autocast("cpu", dtype=BF16):
                run = compare.step(model, attachment, compare.to_dtype(batch, base))
            total = torch.cat([g.double().flatten() for g in run.grads.values()])
            goal = torch.cat([g.flatten() for g in want.grads.values()])
            errors[form] += [compare.relative(run.logits, want.logits)]
            errors[form] += [compare.relative(total, goal)]
    for fused, plain in zip(errors["fused"], errors["published"], strict=True):
        assert fused <= compare.GRADIENT_RATIO * plain, errors


def test_fp16_with_a_grad_scaler() -> None:
    model = tiny.instructblip()
    attachment = pk.attach(model, pk.PetalConfig(r=4, dropout=0.0))
    model.train()
    optimizer = torch.optim.AdamW(attachment.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=F16):
            loss = model(**tiny.batch("instructblip")).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(parameter.isfinite().all() for parameter in attachment.parameters())


def test_converting_the_model_converts_the_adapter() -> None:
    model = tiny.instructblip()
    attachment = pk.attach(model, pk.PetalConfig(r=4))
    model.double()
    assert {p.dtype for p in attachment.parameters()} == {torch.float64}
    attention = model.qformer.encoder.layer[0].attention.attention  # type: ignore[union-attr, index]
    assert attention.query.weight is attention.query.base.weight
    assert attention.query.base.weight.dtype == torch.float64
