"""The memory profiler's figures: against plain hooks, against formulas, against what is alive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import petal_kernels as pk
from petal_kernels import memory
from petal_kernels.memory import recording
from petal_kernels.memory.advice import advise
from petal_kernels.memory.calibrate import margins
from petal_kernels.memory.reasons import why
from petal_kernels.memory.records import collapse
from tests.ops import discovery


def plain_count(forward: Callable[[], Any], own: list[Tensor]) -> int:
    """Bytes of the distinct storages that a forward saves, those of `own` left out: nothing of the
    profiler."""
    mine = {t.untyped_storage().data_ptr() for t in own}
    kept: dict[int, int] = {}
    alive = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        alive.append(storage)
        if storage.data_ptr() not in mine:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward()
    del out
    return sum(kept.values())


def names(profile: memory.Profile) -> list[str]:
    return [advice.cause for advice in advise(profile)]


# Operators -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(o.name, c, id=f"{o.name}-{c.name}") for o, c in discovery.cases()],
)
def test_operators_are_wholly_visible(name: str, case: Any) -> None:
    """The figure is the operator's own exact one, and nothing outlives the forward unseen: a tensor
    kept as an attribute of ctx would."""
    op = next(o for o in discovery.operators() if o.name == name)
    trained = discovery.trainable(op, case)
    inputs = discovery.require_grad(op.workload.make_inputs(case, torch.float32), trained)
    inputs.pop("rng", None)
    options = discovery.options(op, case)
    leaves = discovery.leaves(inputs, tuple(inputs))
    activations = getattr(op.workload, "ACTIVATIONS", ("x", "hidden"))
    parameters = [t for label, t in leaves if not label.startswith(activations)]
    found = memory.profile(
        lambda **given: op.public(**given, **options), inputs, parameters=parameters, backward=False
    )
    counted = plain_count(lambda: op.public(**inputs, **options), parameters)
    assert found.saved_bytes == counted
    given = {t.untyped_storage().data_ptr(): t for _, t in leaves}
    whole = all(t.untyped_storage().nbytes() == t.nbytes for t in given.values())
    if whole and hasattr(op.workload, "saved_bytes"):  # mode_contract saves its inputs only
        assert found.saved_bytes == op.workload.saved_bytes(case, torch.float32)
    assert found.sizes.elsewhere == 0


# Plain torch ---------------------------------------------------------------------------------


class Block(nn.Module):
    """A frozen norm and linear before a trained linear."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width).requires_grad_(False)
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.trained = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.trained(F.gelu(self.base(self.norm(x))))


def test_records_name_module_operation_role_and_reason() -> None:
    model = nn.Sequential(Block(), Block())
    found = memory.profile(model, torch.randn(6, 32))
    rows = {(r.module, r.operation, r.argument): r for r in found.saved}
    # In the first block nothing needs a gradient but the last weight.
    assert [key for key in rows if key[0].startswith("0.")] == [
        ("0.trained", "AddmmBackward0", "mat1")
    ]
    gelu = rows["1", "GeluBackward0", "self"]
    assert (gelu.bytes, gelu.shape, gelu.dtype) == (6 * 32 * 4, (6, 32), torch.float32)
    assert gelu.why == why("GeluBackward0", "self")
    assert rows["1.norm", "NativeLayerNormBackward0", "input"].role == "frozen"
    assert rows["1.trained", "AddmmBackward0", "mat1"].role == "trainable"
    assert found.saved_bytes == plain_count(
        lambda: model(torch.zeros(6, 32)), list(model.parameters())
    )
    assert set(found.sizes.saved_parameters) == {
        "1.norm.weight",
        "1.norm.bias",
        "1.base.weight",
        "1.trained.weight",
    }
    assert collapse("model.layers.12.mlp.3") == "model.layers.*.mlp.*"
    assert {row.place for row in found.rows()} == {"*", "*.norm", "*.trained"}


def test_a_shared_tensor_counts_once_and_names_its_other_keepers() -> None:
    x = torch.randn(8, 16)
    weights = [torch.randn(16, 4, requires_grad=True) for _ in range(3)]
    found = memory.profile(lambda t: [t @ w for w in weights], x, parameters=weights)
    (record,) = found.saved
    assert record.bytes == x.nbytes
    assert record.of_batch
    assert found.kept_bytes == found.sizes.outputs == 3 * 8 * 4 * 4 + 4  # and the sum of the sums
    assert [k.operation for k in record.also] == ["MmBackward0"]
    assert found.sizes.saved_parameters == {}


def test_a_view_counts_as_its_storage() -> None:
    whole = torch.randn(10, 16)
    weight = torch.randn(16, 4, requires_grad=True)
    (record,) = memory.profile(lambda t: t @ weight, whole[:3], parameters=[weight]).saved
    assert (record.bytes, record.shape, record.is_view) == (whole.nbytes, (3, 16), True)


def test_what_is_dropped_before_the_end_is_not_kept() -> None:
    w = torch.randn(64, requires_grad=True)

    def forward() -> Tensor:
        dropped = (w * 2).exp()
        del dropped
        return w.square().sum()

    found = memory.profile(forward, ())
    assert [r.operation for r in found.saved] == ["PowBackward0"]


def test_a_leaf_that_a_function_uses_is_counted_unless_it_is_said_to_be_a_parameter() -> None:
    w = torch.randn(64, requires_grad=True)
    assert memory.profile(lambda: w.square().sum()).saved_bytes == w.nbytes
    assert memory.profile(lambda: w.square().sum(), parameters=[w]).saved_bytes == 0


def test_the_profiler_leaves_gradients_and_generator_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    model[0].weight.grad = torch.ones(4, 4)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = memory.profile(model, torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model[0].weight.grad, torch.ones(4, 4))
    assert model[0].bias.grad is None
    assert found.sizes.gradients == (16 + 4) * 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_regions_keep_their_input_and_are_recomputed(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant)
            return x

    x = torch.randn(6, 32, requires_grad=True)
    model = Checkpointed()
    found = memory.profile(model, x)
    layer = memory.profile(Block(), x)
    assert found.checkpointed
    assert not layer.checkpointed
    # Each region keeps its input; the first one's is the batch itself.
    assert found.saved_bytes == 3 * x.nbytes
    assert {short for r in found.saved if (short := r.why)} == {why("checkpoint", "input")}
    assert [r.module for r in found.recomputed] == ["layers.2", "layers.1", "layers.0"]
    own = layer.saved_bytes - x.nbytes
    # What comes to life is what the layer keeps, and its result where that is kept meanwhile.
    assert all(own <= r.bytes <= own + x.nbytes for r in found.recomputed)
    assert "frozen" not in names(found)


def test_timeline_counts_live_bytes_exactly() -> None:
    unit = 1000 * 4
    x = torch.randn(1000, requires_grad=True)

    def forward(t: Tensor) -> Tensor:
        y = t.exp()  # kept
        z = y + 1.0  # dropped when w is there
        w = z * 2.0
        return w.sum()

    found = memory.profile(forward, x)
    begin = found.phases["backward"]
    assert found.live[: begin - 1][:4] == [2 * unit, 3 * unit, 4 * unit, 4 * unit + 4]
    # x, y, the gradients of z and x; the loss and its gradient.
    assert found.peak_bytes == max(found.live) == 4 * unit + 8
    assert (found.peak_phase, found.peak_of("forward")) == ("backward", 3 * unit + 4)
    curve = found.curve(points=1000)
    assert curve.total == found.live
    assert [sum(parts) for parts in zip(*curve.parts.values(), strict=True)] == found.live
    assert max(found.curve(points=3).total) == found.peak_bytes
    assert sum(size for _, _, size in found.at_peak(100)) == found.peak_bytes


# Fake tensors --------------------------------------------------------------------------------


def test_fake_tensors_keep_what_real_ones_keep() -> None:
    model = nn.Sequential(Block(), nn.Tanh(), Block()).train()
    x = torch.randn(5, 32)
    real = memory.profile(model, x)
    fake = memory.profile(*memory.fake_tensors(model, x), cuda_rules=False)
    assert (real.fake, fake.fake) == (False, True)
    assert fake.saved_bytes == real.saved_bytes
    assert fake.peak_bytes == real.peak_bytes
    assert fake.live == real.live


def test_fake_tensors_stay_tied_and_meta_tensors_are_refused() -> None:
    with torch.device("meta"):
        model: Any = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    model[1].weight = model[0].weight
    ids = torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="fake_tensors"):
        memory.profile(model, ids)
    model, ids = memory.fake_tensors(model, ids)
    assert model[1].weight is model[0].weight
    assert memory.profile(model, ids).sizes.parameters == 7 * 4 * 4


def test_cuda_rules_keep_what_cuda_keeps() -> None:
    B, H, L, D = 2, 3, 40, 8
    q, k, v = (torch.randn(B, H, L, D, requires_grad=True) for _ in range(3))
    mask = torch.zeros(B, 1, L, L)
    kept = memory.profile(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.1),
        (q, k, v),
        cuda_rules=True,
    )
    # q, k, v and the output, the mask, one float per row of scores, two integers.
    assert kept.saved_bytes == 4 * (4 * B * H * L * D + B * L * L + B * H * L) + 16
    x = torch.randn(50, 20, requires_grad=True)
    dropped = memory.profile(nn.Dropout(0.3).train(), x, cuda_rules=True)
    assert [(r.argument, r.bytes) for r in dropped.saved] == [("result1", 50 * 20)]
    assert F.dropout.__module__ == "torch.nn.functional"


# Budgets -------------------------------------------------------------------------------------


def test_assert_saved_bytes() -> None:
    model, x = Block(), torch.randn(6, 32)
    kept = 6 * 32 * 4  # the trained linear's input
    assert memory.assert_saved_bytes(model, x, exactly=kept).saved_bytes == kept
    memory.assert_saved_bytes(model, x, at_most=kept)
    with pytest.raises(AssertionError, match=rf"{kept} bytes.*exactly {kept + 1}\n.*saved for"):
        memory.assert_saved_bytes(model, x, exactly=kept + 1)
    with pytest.raises(AssertionError, match="trained"):
        memory.assert_saved_bytes(model, x, at_most=kept - 1)
    with pytest.raises(ValueError, match="one of"):
        memory.assert_saved_bytes(model, x)
    assert pk.memory is memory


def test_margins_compare_with_the_allocator() -> None:
    found = memory.profile(Block(), torch.randn(6, 32))
    assert margins(found) == []
    rows = {"before": 0, "forward kept": 2 * found.kept_bytes, "backward peak": 0}
    found.device_bytes = rows
    kept, peak = margins(found)
    assert (kept.percent, peak.what) == (100.0, "peak in backward")
    assert peak.predicted == max(found.live[found.phases["backward"] :]) - found.resident_bytes


def test_the_allocators_figures_are_taken_per_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """With counters in the place of CUDA's: they cannot be run here."""
    allocated, peaks = iter([100, 350, 350, 120]), iter([400, 500])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(allocated))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peaks))
    meter = recording.Meter(cuda=True)
    for phase in ("forward", "backward"):
        with meter.measure(phase):
            pass
    assert meter.bytes == {
        "before": 100,
        "forward kept": 250,
        "forward peak": 300,
        "backward kept": 20,
        "backward peak": 400,
    }


def test_outputs_and_what_python_holds_are_told_apart() -> None:
    cache: list[Tensor] = []
    weight = torch.randn(16, 4, requires_grad=True)

    @dataclass
    class Output:
        loss: Tensor
        hidden: Tensor

    def forward(t: Tensor) -> Output:
        cache.append(t + 1.0)
        hidden = t @ weight
        return Output(hidden.sum(), hidden)

    found = memory.profile(forward, torch.randn(8, 16), parameters=[weight])
    assert found.sizes.elsewhere == 8 * 16 * 4
    assert found.sizes.outputs == 8 * 4 * 4 + 4
