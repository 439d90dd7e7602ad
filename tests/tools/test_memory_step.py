"""The peak of a whole step, optimizer and all, against what a CPU's allocator has handed out."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from petal_kernels import memory

_CLOSE = 0.05  # what a CPU's matrix product of bfloat16 takes as workspace is not seen
_STEP = 0.001  # no operation of an optimizer has one


def allocated(run: Callable[[], Any]) -> tuple[int, int]:
    """Most bytes that a run has of the allocator at once, above what it found: all of it, and in
    its optimizer's step.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    gc.collect()  # what others left would be freed meanwhile
    gc.disable()
    try:
        with torch.profiler.profile(activities=activities, profile_memory=True) as found:
            run()
    finally:
        gc.enable()
    profiler: Any = found.profiler
    events = sorted(profiler.kineto_results.events(), key=lambda e: e.start_ns())
    begin = next(e.start_ns() for e in events if e.name().startswith("Optimizer.step#"))
    now = most = in_step = 0
    for event in events:
        if event.name() == "[memory]":
            if event.start_ns() >= begin:
                in_step = max(in_step, now)
            now += event.nbytes()
            most = max(most, now)
    return most, max(in_step, now)


class Adapted(nn.Module):
    """A frozen linear and a low-rank update in a dtype of its own."""

    def __init__(self, width: int, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.down = nn.Linear(width, rank, bias=False, dtype=dtype)
        self.up = nn.Linear(rank, width, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        low = self.up(self.down(x.to(self.down.weight.dtype)))
        return torch.tanh(self.base(x) + low.to(x.dtype))


class Words(nn.Module):
    """An embedding that is the output's weight, too, and one that no batch reaches."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.never = nn.Linear(width, width)
        self.mix = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, ids: Tensor) -> Tensor:
        return self.mix(self.words(ids)) @ self.words.weight.T


def linears(dtype: torch.dtype) -> tuple[Any, Tensor]:
    """Full tuning; gradients and states are all there is."""
    return nn.Sequential(*(nn.Linear(384, 384) for _ in range(4))).to(dtype), torch.randn(4, 384)


def uneven(dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """Full tuning; one parameter dwarfs the others, and many activations."""
    sizes = [(128, 2048), (2048, 64), (64, 64)]
    parts = [m for a, b in sizes for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*parts).to(dtype), torch.randn(96, 128)


def adapters(dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """Adapters only, in float32 beside a base of any dtype."""
    model = nn.Sequential(*(Adapted(256, 64, torch.float32) for _ in range(4)))
    for part in model:
        part.base.to(dtype)
    return model, torch.randn(64, 256)


def two_dtypes(dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """Trained parameters of two dtypes: an optimizer takes them in two groups."""
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    parts: list[nn.Module] = []
    for _ in range(2):
        adapted = Adapted(384, 192, other)
        adapted.base.to(dtype)
        parts += [nn.Linear(384, 384, dtype=dtype), adapted]
    return nn.Sequential(*parts), torch.randn(8, 384)


def words(dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """Tied parameters, and one without a gradient."""
    return Words(1024, 64).to(dtype), torch.randint(0, 1024, (2, 20))


MODELS = {f.__name__: f for f in (linears, uneven, adapters, two_dtypes, words)}
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw-foreach": ("adamw", {"foreach": True, "weight_decay": 0.1}),
    "adamw-loop": ("adamw", {"foreach": False}),
    "adamw-fused": ("adamw", {"fused": True}),
    "amsgrad": ("adamw", {"foreach": True, "amsgrad": True}),
    "adam-foreach-l2": ("adam", {"foreach": True, "weight_decay": 0.1}),
    "adam-loop-l2-max": ("adam", {"foreach": False, "weight_decay": 0.1, "maximize": True}),
    "sgd": ("sgd", {"foreach": True}),
    "sgd-foreach-l2": ("sgd", {"foreach": True, "weight_decay": 0.1, "maximize": True}),
    "sgd-loop-l2": ("sgd", {"foreach": False, "weight_decay": 0.1, "maximize": True}),
    "sgd-momentum": ("sgd", {"foreach": True, "momentum": 0.9, "weight_decay": 0.1}),
    "sgd-nesterov-loop": (
        "sgd",
        {"foreach": False, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ),
    "sgd-momentum-fused": ("sgd", {"fused": True, "momentum": 0.9}),
}
CLASSES = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}


def measured(
    model: nn.Module,
    batch: tuple[Tensor, ...],
    optimizer: torch.optim.Optimizer,
    micro_batch: Callable[[], Any],
    earlier: bool = False,
    to_none: bool = True,
) -> tuple[int, int]:
    """The most that lives in a step of a plain loop, and in its optimizer's part: the last
    micro-batch of two where `earlier`, gradients let go or set to zero after it.
    """

    def whole() -> None:
        micro_batch()
        optimizer.step()

    for _ in range(2):  # states are there from the second step on
        whole()
        optimizer.zero_grad(set_to_none=to_none)
    if earlier:
        micro_batch()
    tensors = (*model.parameters(), *model.buffers(), *batch)
    own = {t.untyped_storage().data_ptr(): t for t in tensors}
    states = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    there = sum(t.nbytes for t in (*own.values(), *states))
    there += sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    whole_step, in_step = allocated(whole)
    return there + whole_step, there + in_step


def check(
    build: Callable[[torch.dtype], tuple[nn.Module, Tensor]],
    dtype: torch.dtype,
    name: str,
    settings: dict[str, Any],
    earlier: bool = False,
    to_none: bool = True,
) -> None:
    torch.manual_seed(0)
    model, x = build(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    optimizer = CLASSES[name](model.parameters(), lr=1e-4, **settings)

    def loss(y: Tensor) -> Tensor:
        return y.float().square().mean()

    def micro_batch() -> None:
        loss(model(x)).backward()

    peak, in_step = measured(model, (x,), optimizer, micro_batch, earlier, to_none)
    optimizer.zero_grad(set_to_none=True)
    accumulate = earlier or not to_none
    plain = memory.profile(model, (x,), loss=loss, accumulate=accumulate)
    for found in (plain.with_optimizer(name, **settings), plain.with_optimizer(optimizer)):
        assert found.peak_bytes == pytest.approx(peak, rel=_CLOSE)
        assert max(found.live[found.phases["optimizer"] :]) == pytest.approx(in_step, rel=_STEP)
        states = sum(
            t.nbytes
            for s in optimizer.state.values()
            for key, t in s.items()
            if isinstance(t, Tensor) and (key != "step" or settings.get("fused"))
        )
        assert found.sizes.states == states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model", list(MODELS))
def test_peaks_with_adamw_are_the_allocators(model: str, dtype: torch.dtype) -> None:
    """Kind: an optimizer's step left out of a peak, or its states taken for float32."""
    check(MODELS[model], dtype, *OPTIMIZERS["adamw-foreach"])


@pytest.mark.parametrize("method", ["full", "lora"])
def test_peaks_of_a_vision_language_model_are_the_allocators(method: str) -> None:
    """Kind: a peak that holds for a chain of linears only."""
    pytest.importorskip("transformers")
    from petal_kernels.tools.memory import options, presets
    from tests.hf import tiny

    model, batch = tiny.instructblip().train(), tiny.batch("instructblip")
    keep = presets.adapt(model, options.Options(rank=4, method=method))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # its gradient's workspace differs by processor
            module.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=True)
    peak, in_step = measured(
        model, tuple(batch.values()), optimizer, lambda: model(**batch).loss.backward()
    )
    found = memory.profile(model, batch).with_optimizer("adamw")
    assert found.peak_bytes == pytest.approx(peak, rel=_CLOSE)
    assert max(found.live[found.phases["optimizer"] :]) == pytest.approx(in_step, rel=_CLOSE)
    del keep


@pytest.mark.parametrize("optimizer", [n for n in OPTIMIZERS if n != "adamw-foreach"])
def test_peaks_with_other_optimizers_are_the_allocators(optimizer: str) -> None:
    """Kind: one optimizer's layout, or one way to write its step, taken for another's."""
    check(two_dtypes, torch.float32, *OPTIMIZERS[optimizer])
    if "loop" in optimizer:  # one parameter at a time: the largest decides
        check(uneven, torch.float32, *OPTIMIZERS[optimizer])


@pytest.mark.parametrize(
    ("earlier", "to_none"), [(True, True), (False, False)], ids=["sum", "zero"]
)
@pytest.mark.parametrize("model", ["uneven", "adapters", "words"])
def test_gradients_that_are_there_before_the_step_count(
    model: str, earlier: bool, to_none: bool
) -> None:
    """Kind: a step profiled as if it were the first, without gradients of an earlier micro-batch or
    those that zero_grad(set_to_none=False) leaves."""
    check(MODELS[model], torch.bfloat16, *OPTIMIZERS["adamw-foreach"], earlier, to_none)


def test_with_adam_is_the_step_as_it_runs_on_cuda() -> None:
    """Kind: a figure under a name that says more than it holds. Two states and the roots of full
    tuning, in the parameters' own dtype."""
    model, x = linears(torch.bfloat16)
    size = sum(p.nbytes for p in model.parameters())
    found = memory.profile(model, x.bfloat16())
    assert found.with_adam() == pytest.approx((1 + 1 + 2 + 1) * size + x.nbytes // 2, abs=16)
    step = found.with_optimizer("adamw", foreach=True)
    assert step.with_adam() == step.peak_bytes == found.with_adam()
    assert (step.sizes.states, step.peak_phase) == (2 * size, "optimizer")
    assert found.to_dict()["peak_with_adam_bytes"] == found.with_adam()
    assert f"AdamW (foreach), {2 * size / 2**20:.1f} MiB of states" in step.table()
    assert "with AdamW (foreach)" in found.table()


def test_the_optimizers_phase_is_on_the_timeline() -> None:
    """Kind: parts of a curve that do not add up to it."""
    for build, dtype in ((two_dtypes, torch.float32), (words, torch.bfloat16)):
        model, x = build(dtype)
        plain = memory.profile(model, x, accumulate=True)
        for name, settings in OPTIMIZERS.values():
            found = plain.with_optimizer(name, **settings)
            curve = found.curve(points=10_000)
            assert curve.total == found.live
            assert [sum(parts) for parts in zip(*curve.parts.values(), strict=True)] == found.live
            assert sum(size for _, _, size in found.at_peak(1000)) == found.peak_bytes
            assert found.resident_bytes + found.peak_of("forward") == max(
                found.live[: found.phases["backward"]]
            )
            # An update leaves what was there before the step, and the loss.
            assert found.live[-1] == found.resident_bytes + dtype.itemsize
        assert plain.sizes.earlier_gradients == plain.sizes.gradients > 0


def test_what_an_update_allocates_is_named() -> None:
    """Kind: a copy that is no part of the peak, and is there all the same."""
    model, x = linears(torch.float32)
    plain = memory.profile(model, x)

    def operations(name: str = "adam", **settings: Any) -> list[str]:
        found = plain.with_optimizer(name, **settings)
        return [b.operation for b in found.blocks if b.born >= found.phases["optimizer"]]

    assert operations() == ["aten._foreach_sqrt"]
    assert operations(weight_decay=0.1) == ["aten._foreach_add", "aten._foreach_sqrt"]
    assert operations(foreach=False, maximize=True)[:3] == ["aten.neg", "aten.sqrt", "aten.div"]
    assert operations("adamw", weight_decay=0.1) == ["aten._foreach_sqrt"]
    assert operations(fused=True) == []


def test_fake_tensors_have_the_steps_of_real_ones() -> None:
    """Kind: a figure that holds for real tensors only."""
    for build in (words, adapters):
        for accumulate in (True, False):
            model, x = build(torch.float32)
            real = memory.profile(model, (x,), accumulate=accumulate).with_optimizer("adamw")
            fake = memory.profile(
                *memory.fake_tensors(model, (x,)), accumulate=accumulate, cuda_rules=False
            ).with_optimizer("adamw")
            assert fake.live == real.live
            assert fake.sizes.states == real.sizes.states > 0


def test_gradients_of_the_users_own_are_counted_and_given_back() -> None:
    """Kind: what is there before the step left out; or a user's gradient touched."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    x = torch.randn(2, 64)
    gradient = model[0].weight.grad = torch.full((64, 64), 3.0)
    found = memory.profile(model, x)
    assert found.sizes.earlier_gradients == gradient.nbytes
    assert model[0].weight.grad is gradient
    assert torch.equal(gradient, torch.full((64, 64), 3.0))
    assert model[1].weight.grad is None
    without = memory.profile(model, x, accumulate=False)
    assert without.sizes.earlier_gradients == 0
    assert found.live[0] - without.live[0] == gradient.nbytes
    assert found.sizes.gradients == without.sizes.gradients
    with pytest.raises(TypeError, match="accumulate: want a bool, got str"):
        memory.profile(model, x, accumulate="yes")  # type: ignore[arg-type]
