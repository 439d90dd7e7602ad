"""Running the fused and the published form of one adapter side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from petal_kernels._runtime import philox
from petal_kernels.hf import Attachment, PetalConfig, attach
from petal_kernels.hf.methods.modes import ModeGroup, ModeLinear, group_of
from petal_kernels.nn import frozen_linear
from petal_kernels.ops.lowrank_linear import lowrank_linear
from tests.hf import tiny

OUTPUT_RATIO, GRADIENT_RATIO = 2.0, 3.0
FLOOR = 8 * torch.finfo(torch.float32).eps


@dataclass
class Run:
    """Outputs and gradients of one training forward and backward."""

    logits: Tensor
    grads: dict[str, Tensor]


def build(
    family: str, config: PetalConfig, implementation: str, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, Attachment]:
    model = tiny.FAMILIES[family]()
    attachment = attach(model, config, implementation=implementation)
    tiny.randomise(attachment.adapter)
    model.to(dtype)
    return model.train(), attachment


def to_dtype(batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def step(
    model: nn.Module, attachment: Attachment, batch: dict[str, Tensor], *, clear: bool = True
) -> Run:
    if clear:
        for parameter in attachment.parameters():
            parameter.grad = None
    out = model(**batch)
    out.loss.backward()
    return Run(out.logits.detach(), gradients(attachment))


def gradients(attachment: Attachment) -> dict[str, Tensor]:
    missing = [name for name, p in attachment.named_parameters() if p.grad is None]
    assert not missing, f"no gradient: {missing}"
    return {name: p.grad.clone() for name, p in attachment.named_parameters()}  # type: ignore[union-attr]


def relative(got: Tensor, want: Tensor) -> float:
    norm = float(want.double().norm())
    return float((got.double() - want.double()).norm()) / norm if norm else float(got.norm())


def assert_close(got: Run, want: Run, tolerance: float) -> None:
    assert relative(got.logits, want.logits) <= tolerance
    assert got.grads.keys() == want.grads.keys()
    for name, gradient in want.grads.items():
        assert relative(got.grads[name], gradient) <= tolerance, name


def assert_as_exact(got: Run, plain: Run, exact: Run) -> None:
    """The error of `got` against the fp64 run is within a small factor of the plain form's own."""
    error, own = relative(got.logits, exact.logits), relative(plain.logits, exact.logits)
    assert error <= OUTPUT_RATIO * own + FLOOR, (error, own)
    for name, gradient in exact.grads.items():
        error, own = relative(got.grads[name], gradient), relative(plain.grads[name], gradient)
        assert error <= GRADIENT_RATIO * own + FLOOR, (name, error, own)


class FixedMask(nn.Module):
    """Dropout with the mask that one stream of a fused call drew."""

    def __init__(self, rng: Tensor, stream: int, p: float) -> None:
        super().__init__()
        self.rng, self.stream, self.p = rng, stream, p

    def forward(self, z: Tensor) -> Tensor:
        rows, cols = z.shape[:-1].numel(), z.shape[-1]
        masks = philox.scaled_masks(self.rng, self.p, self.stream + 1, rows, cols, z.dtype)
        return z * masks[self.stream].reshape(z.shape)


class MaskRecorder:
    """Gives every fused call a known generator state, and the same masks to the published form."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.states: dict[tuple[int, str], Tensor] = {}
        compute: Callable[..., Any] = ModeGroup._compute
        operator = lowrank_linear
        current: list[Tensor] = []

        def recording_compute(group: ModeGroup, *args: Any) -> Any:
            key = (group.layer.index, group.name)
            assert key not in self.states, "a group ran twice in one forward"
            self.states[key] = torch.tensor([1234 + 77 * len(self.states), len(self.states)])
            current[:] = [self.states[key]]
            return compute(group, *args)

        def seeded_operator(*args: Any, **kwargs: Any) -> Any:
            return operator(*args, **kwargs, rng=current[0])

        monkeypatch.setattr(ModeGroup, "_compute", recording_compute)
        monkeypatch.setattr(frozen_linear, "lowrank_linear", seeded_operator)

    def give_to(self, attachment: Attachment, p: float) -> None:
        streams: dict[tuple[int, str], int] = {}
        for place, _, _, wrapper in attachment.installed.wrapped:
            assert isinstance(wrapper, ModeLinear)
            key = (place.layer.index, group_of(place.row))
            stream = streams.setdefault(key, 0)
            streams[key] += 1
            wrapper.__dict__["drop"] = FixedMask(self.states[key], stream, p)
