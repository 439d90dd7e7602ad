"""Gradient checkpointing must change nothing: both modes, several forwards, dropout on."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import petal_kernels as pk
from petal_kernels.hf import Attachment, PetalConfig
from petal_kernels.hf.config import AdapterConfig
from tests.hf import compare, tiny, tiny_experts

SAME = 1e-12  # relative, in fp64


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # The frozen vision tower is checkpointed as well and has nothing to differentiate.
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
        yield


def _config(variant: str, dropout: float) -> PetalConfig:
    return PetalConfig(r=5, variant=variant, dropout=dropout)


def _gradients(
    family: str, config: PetalConfig, reentrant: bool | None, forwards: int, form: str
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses and summed gradients of several forwards with other inputs before one backward."""
    model, attachment = compare.build(family, config, form, torch.float64)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    losses = _losses(model, attachment, family, forwards)
    sum(losses, torch.zeros((), dtype=torch.float64)).backward()
    return [loss.detach() for loss in losses], compare.gradients(attachment)


def _losses(
    model: torch.nn.Module, attachment: Attachment, family: str, forwards: int
) -> list[Tensor]:
    losses = []
    torch.manual_seed(7)
    for seed in range(forwards):
        if seed:  # an optimizer step between the forwards must not change the earlier graph either
            torch.manual_seed(70 + seed)
        batch = compare.to_dtype(tiny.batch(family, size=2 + seed, seed=seed), torch.float64)
        losses.append(model(**batch).loss)
    return losses


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize(
    ("family", "variant", "dropout", "form"),
    [
        ("instructblip", "paper", 0.0, "fused"),
        ("instructblip", "paper", 0.4, "fused"),
        ("instructblip", "release", 0.4, "fused"),
        ("blip2", "release", 0.4, "fused"),
        ("instructblip", "release", 0.4, "published"),
    ],
)
def test_gradients_are_those_without_checkpointing(
    family: str, variant: str, dropout: float, form: str, forwards: int, reentrant: bool
) -> None:
    config = _config(variant, dropout)
    want_losses, want = _gradients(family, config, None, forwards, form)
    losses, got = _gradients(family, config, reentrant, forwards, form)
    assert losses == want_losses
    for name, gradient in want.items():
        assert compare.relative(got[name], gradient) <= SAME, name


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_a_layer_is_recomputed_from_the_parameters_only_under_reentrant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from petal_kernels.nn import ModeApproximation

    calls: list[object] = []
    contract = ModeApproximation.contract

    def counting(self: ModeApproximation, index: object = None, **kwargs: object) -> object:
        calls.append(index)
        return contract(self, index, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(ModeApproximation, "contract", counting)
    _gradients("instructblip", _config("paper", 0.1), False, 1, "fused")
    assert calls == [None, None]  # one contraction per branch for the whole model
    calls.clear()
    _gradients("instructblip", _config("paper", 0.1), True, 1, "fused")
    assert calls[:2] == [None, None]
    assert len(calls) == 2 + 4 + 2  # then each layer its own; two layers have an image branch


def _moved(tensor: Tensor) -> Tensor:
    """As hooks do that keep saved tensors elsewhere: what comes back is another object."""
    return tensor.detach().clone()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("family", ["instructblip", "vqa", "bart"])
def test_hooks_that_move_saved_tensors(family: str) -> None:
    """A recompute is given other tensors than the forward was, and projects none of them again."""
    config: AdapterConfig = PetalConfig(r=5, dropout=0.4)
    if family == "vqa":
        config = pk.AuroraConfig(r=5, dropout=0.4)
    if family == "bart":
        config = pk.VLPetConfig(r=6, value_r=4)
    found = []
    for moved in (False, True):
        model, attachment = tiny_experts.attached(family, config)
        model.train().gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        hooks = torch.autograd.graph.saved_tensors_hooks(_moved, lambda t: t)
        torch.manual_seed(3)
        with hooks if moved else contextlib.nullcontext():
            loss = tiny_experts.read(family, model)[1]
        loss.backward()
        found.append(compare.gradients(attachment))
    for name, gradient in found[0].items():
        assert compare.relative(found[1][name], gradient) <= SAME, name
