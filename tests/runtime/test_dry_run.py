"""A dry run tells which backend and plan a call takes: what it says is what real calls then do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import petal_kernels as pk
from petal_kernels import memory
from petal_kernels._runtime import backends
from petal_kernels._runtime.dry_run import dry_run, signature
from petal_kernels.nn import (
    ExpertAdapter,
    ExpertLoRALinear,
    GatedAdapter,
    InstructionExperts,
    ModeApproximation,
    RoutedLoRALinear,
    ValueAdapter,
    frozen_lowrank,
)
from tests.ops.record_backends import Used, record_backends

WIDTH = 24
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Place = Callable[..., Any]
Inputs = tuple[Any, ...]


def rows(dtype: torch.dtype, *lead: int, width: int = WIDTH) -> Tensor:
    return torch.randn(*(lead or (2, 5)), width).to(dtype)


def linear(dtype: torch.dtype, out: int = WIDTH) -> nn.Linear:
    return nn.Linear(WIDTH, out, dtype=dtype).requires_grad_(False)


def modes(dtype: torch.dtype, r: int) -> tuple[Place, Inputs]:
    core = "tucker" if r == 16 else "cp"
    return ModeApproximation(WIDTH, WIDTH, r, 3, core=core, dropout=0.1), (rows(dtype),)


def frozen(dtype: torch.dtype, r: int) -> tuple[Place, Inputs]:
    factors, bases = ModeApproximation(WIDTH, WIDTH, r, 2), [linear(dtype) for _ in range(2)]

    def place(x: Tensor) -> tuple[Tensor, ...]:
        return frozen_lowrank(x, bases, factors.down, factors.contract(dtype=x.dtype))

    return place, (rows(dtype),)


def hooked(dtype: torch.dtype, r: int) -> tuple[Place, Inputs]:
    place, inputs = frozen(dtype, r)
    bases = next(
        c.cell_contents for c in place.__closure__ or () if isinstance(c.cell_contents, list)
    )
    bases[0].register_forward_hook(lambda *_: None)
    return place, inputs


def gated(
    gate: str, route: str = "none", norm: bool = False
) -> Callable[..., tuple[Place, Inputs]]:
    def build(dtype: torch.dtype, r: int) -> tuple[Place, Inputs]:
        adapter = GatedAdapter(WIDTH, r, gate=gate, route=route)
        last = nn.LayerNorm(WIDTH, dtype=dtype) if norm else None

        def place(h: Tensor, x: Tensor, images: Tensor) -> Tensor:
            vision = None if route == "none" else adapter.project(images)
            return adapter(h, x, vision=vision, residual=x, norm=last, dropout=0.1)

        return place, (rows(dtype), rows(dtype), rows(dtype, 2, 3))

    return build


def routed(dtype: torch.dtype, r: int) -> tuple[Place, Inputs]:
    base = linear(dtype, 3 * WIDTH)
    lora = RoutedLoRALinear(base, r, "gram", parts=3, targets=(0, 2), dropout=0.1)
    return lambda x, images: lora(x, lora.project(images)), (rows(dtype), rows(dtype, 2, 3))


def value(dtype: torch.dtype, r: int) -> tuple[Place, Inputs]:
    adapter = ValueAdapter(WIDTH, WIDTH, r, layers=2)
    return lambda e, v: adapter(v, adapter.project(e)[1], 1), (rows(dtype), rows(dtype))


def instruction(dtype: torch.dtype, r: int) -> tuple[Place, Inputs]:
    return InstructionExperts(WIDTH, 3, r, router_input="pooled"), (rows(dtype), 2)


def adapters(dtype: torch.dtype, r: int) -> tuple[Place, Inputs]:
    return ExpertAdapter(WIDTH, 3, r, top_k=1, router_noise=0.1), (rows(dtype),)


def domains(dtype: torch.dtype, r: int) -> tuple[Place, Inputs]:
    experts, chosen = ExpertAdapter(WIDTH, 3, r, gate="domain"), torch.tensor([[0, 1, 2, 0, 1]] * 2)
    return lambda x, chosen: experts(x, domain=chosen), (rows(dtype), chosen)


def expert_lora(dtype: torch.dtype, r: int) -> tuple[Place, Inputs]:
    return ExpertLoRALinear(linear(dtype), 3, r, gate="mean"), (rows(dtype),)


PLACES = {
    "modes": modes,
    "frozen": frozen,
    "hooked": hooked,
    "gated": gated("none"),
    "large": gated("large"),
    "middleX": gated("middleX", "add"),
    "middleY": gated("middleY", "gram_relu"),
    "small": gated("small", "mul"),
    "normed": gated("none", norm=True),
    "routed": routed,
    "value": value,
    "instruction": instruction,
    "expert adapters": adapters,
    "domains": domains,
    "expert lora": expert_lora,
}


def told(place: Place, inputs: Inputs) -> tuple[list[Used], str]:
    """What a dry run says: the forwards up to the first that is refused, and that refusal."""
    found: list[Used] = []
    for each in dry_run(place, *inputs):
        if each.refusal is not None:
            return found, each.refusal
        found.append(Used(each.operator, each.backend, each.plan))
    return found, ""


def done(place: Place, inputs: Inputs) -> tuple[list[Used], str]:
    """What a real call does, in the same words."""
    with record_backends() as used:
        try:
            place(*inputs)
        except backends.BackendUnavailable as error:
            return used, str(error)
    return used, ""


@contextlib.contextmanager
def setting(backend: str, amp: bool, grad: bool) -> Iterator[None]:
    with (
        pk.use_backend(backend),
        torch.autocast("cpu", torch.bfloat16, enabled=amp),
        torch.set_grad_enabled(grad),
    ):
        yield


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PLACES)
def test_a_dry_run_says_what_a_real_call_does(name: str, dtype: torch.dtype) -> None:
    calls = 0
    for r in (1, 16, 300):
        place, inputs = PLACES[name](dtype, r)
        for amp in (False, True):
            for grad in (False, True):
                for backend in ("auto", "torch", "native", "cuda") if r == 16 else ("auto",):
                    with setting(backend, amp, grad):
                        want = done(place, inputs)
                        assert told(place, inputs) == want, (r, amp, grad, backend)
                        calls += len(want[0])
    assert calls > 12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["frozen", "small", "routed", "domains"])
def test_and_with_kernels_that_have_limits(name: str, dtype: torch.dtype) -> None:
    """Triton, in its interpreter: one dtype that it lacks, one that is wrong in it, a rank."""
    pytest.importorskip("triton")
    with setting("triton", False, True):
        for r in (1, 300):
            place, inputs = PLACES[name](dtype, r)
            assert told(place, inputs) == done(place, inputs), r


def test_what_the_environment_names_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    place, inputs = PLACES["gated"](torch.float32, 4)
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "torch")
    (found,) = dry_run(place, *inputs)
    assert (found.backend, found.requested) == ("torch", "torch")
    assert found.why == "torch: asked for by name"


def test_a_named_backend_that_cannot_run_is_told_and_the_run_goes_on() -> None:
    place, inputs = PLACES["frozen"](torch.float32, 4)
    with pk.use_backend("cuda"):
        first, second = dry_run(place, *inputs)
        with pytest.raises(backends.BackendUnavailable) as raised:
            place(*inputs)
    assert first.refusal == first.why == str(raised.value)
    assert (first.backend, first.choice, second.backend) == ("none", "cannot run", "none")
    assert str(raised.value) in str(first)


def test_why_not_a_preferred_backend() -> None:
    x, factors = rows(torch.float64), ModeApproximation(WIDTH, WIDTH, 2, 1, core="tucker")
    few, update = dry_run(factors, x)
    assert update.backend == "torch"
    assert "native: has no kernels for torch.float64" in update.why
    assert few.backend == "torch"
    few, _ = dry_run(factors, x.float())
    assert "native: can run, but is only taken by name here" in few.why


def test_a_call_without_rows_runs_no_backend() -> None:
    for name in ("frozen", "gated", "routed", "expert adapters"):
        place, inputs = PLACES[name](torch.float32, 2)
        empty = tuple(i[:0] if isinstance(i, Tensor) else i for i in inputs)
        want = done(place, empty)
        assert told(place, empty) == want
        assert all(used.operator == "mode_contract" for used in want[0])


def test_nothing_is_drawn() -> None:
    place, inputs = PLACES["routed"](torch.float32, 4)
    noisy = ExpertAdapter(WIDTH, 3, 2, router_noise=0.5)
    state = torch.get_rng_state()
    dry_run(place, *inputs)
    dry_run(noisy, inputs[0])
    assert torch.equal(state, torch.get_rng_state())
    place(*inputs)
    assert not torch.equal(state, torch.get_rng_state())


def test_nothing_is_allocated_or_computed() -> None:
    """Sizes that no machine holds: among them a parameter's cast, which torch's fake mode does
    for real where it meets real tensors alone."""
    n = 1 << 24
    wide = nn.Linear(1, 1, bias=False)
    wide.weight = nn.Parameter(torch.ones(1).expand(n, n))
    down = nn.Parameter(torch.ones(1).expand(16, n))

    def place() -> Tensor:
        x = torch.empty(1 << 20, n)
        up = wide.weight.to(torch.bfloat16)[:, :16]
        with torch.autocast("cpu", torch.bfloat16):
            y = wide(x)
        return pk.lowrank_linear(x.to(y.dtype), down, [up], base=[y * wide.weight.sum()])[0]

    (found,) = dry_run(place)
    assert found.backend == "native"


def test_parameters_and_buffers_stay_as_they_are() -> None:
    norm, x = nn.BatchNorm1d(5), rows(torch.float32)
    before = {name: value.clone() for name, value in norm.state_dict().items()}

    def place(x: Tensor) -> Tensor:
        with torch.no_grad():
            norm.weight.mul_(2.0).add_(1.0)
        return norm(x)

    dry_run(place, x)
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name]), name
        assert not isinstance(value, FakeTensor)


def test_autocast_keeps_no_fake_weight() -> None:
    trained, x = nn.Linear(WIDTH, WIDTH), rows(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        dry_run(trained, x)
        assert torch.is_autocast_cache_enabled()
        assert not isinstance(trained(x), FakeTensor)


def test_what_the_function_raises_propagates_and_leaves_no_mode_behind() -> None:
    adapter = GatedAdapter(WIDTH, 4, gate="large")
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match="x: want a Tensor with gate='large'"):
            dry_run(adapter, rows(torch.float32))
        assert torch.is_autocast_cache_enabled()
    assert not isinstance(torch.ones(2) + 1, FakeTensor)
    with pytest.raises(RuntimeError, match="_local_scalar_dense"):
        dry_run(lambda x: x.sum().item(), rows(torch.float32))


def test_grad_mode_decides_the_plan() -> None:
    """Without gradients the merged weights compete; with them, never."""
    x, down = torch.empty(4096, 64), nn.Parameter(torch.ones(64, 64))
    weights, ups = [torch.ones(64, 64)], [torch.ones(64, 64)]

    def place(x: Tensor) -> tuple[Tensor, ...]:
        return pk.lowrank_linear(x, down, ups, weights)

    with torch.no_grad():
        assert told(place, (x,)) == done(place, (x,))
        assert dry_run(place, x)[0].plan == "merge"
    with torch.inference_mode():
        assert dry_run(place, torch.empty(4096, 64))[0].plan == "merge"
    assert dry_run(place, x)[0].plan != "merge"
    down.requires_grad_(False)
    assert told(place, (x,)) == done(place, (x,))
    assert dry_run(place, x)[0].plan == pk.explain(pk.lowrank_linear, x, down, ups, weights).plan


def test_inputs_keep_what_a_call_can_see() -> None:
    seen: list[Tensor] = []
    leaf = torch.randn(4, 6, requires_grad=True)
    given = (leaf.t(), leaf * 2, torch.randn(8, 6)[::2], torch.ones(1).expand(3, 4))
    dry_run(lambda *inputs, named: seen.extend((*inputs, named["x"])), *given, named={"x": leaf})
    for fake, real in zip(seen, (*given, leaf), strict=True):
        assert isinstance(fake, FakeTensor)
        for attribute in ("shape", "dtype", "device", "requires_grad", "is_leaf"):
            assert getattr(fake, attribute) == getattr(real, attribute)
        assert fake.stride() == real.stride()
    same: list[bool] = []
    dry_run(lambda a, b: same.append(a is b), leaf, leaf)
    assert same == [True]


def test_a_model_on_meta() -> None:
    adapter = GatedAdapter(WIDTH, 4, gate="large", device="meta")
    x = torch.empty(2, 5, WIDTH, device="meta")
    (found,) = dry_run(adapter, x, x)
    assert found.backend == "torch"
    assert "needs tensors on cpu, got meta" in found.why


def test_a_model_of_fake_tensors() -> None:
    lora = RoutedLoRALinear(linear(torch.float64), 2, dropout=0.1)
    model, x = memory.fake_tensors(lora, rows(torch.float64))
    for call in (model, model.forward):
        (found,) = dry_run(call, x)
        assert found.backend == "torch"
        assert dry_run(call, rows(torch.float64))[0].backend == "torch"
        with x.fake_mode:
            assert dry_run(call, x)[0].backend == "torch"


def test_what_a_choice_makes_for_the_first_time_is_real(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries are loaded and devices asked there, with tensors too; answers are kept."""
    made: list[Tensor] = []

    def unsupported(*_: Any) -> list[str]:
        made.append(torch.zeros(2))
        return []

    place, inputs = PLACES["frozen"](torch.float64, 2)
    for op in ("mode_contract", "lowrank_linear"):
        monkeypatch.setattr(f"petal_kernels.ops.{op}.torch_impl.unsupported", unsupported)
    assert len(dry_run(place, *inputs)) == 2
    assert len(made) >= 2
    assert not any(isinstance(each, FakeTensor) for each in made)


@pytest.mark.skipif(torch.cuda.is_available(), reason="pretends to have tensors on CUDA")
def test_tensors_on_another_device() -> None:
    """Of that device the reasons speak, and its tensors may be fake ones."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    adapter = GatedAdapter(WIDTH, 4).requires_grad_(False)
    for name, p in adapter.named_parameters():
        fake: Any = FakeTensor(mode, p.data.to("meta"), torch.device("cuda:0"))
        adapter._parameters[name] = fake
    x = FakeTensor(mode, torch.empty(2, 5, WIDTH, device="meta"), torch.device("cuda:0"))
    with torch.no_grad():
        (found,) = dry_run(adapter, x)
    reasons = dict(found.rows)
    assert reasons["native"] == ("needs tensors on cpu, got cuda",)
    assert "needs tensors on cuda" not in str(reasons["cuda"])
    assert found.backend == "torch"


def test_equal_signatures_are_equal_kinds_of_calls() -> None:
    def build(dtype: torch.dtype = torch.float32, r: int = 4, number: int = 0) -> Any:
        lora: Any = RoutedLoRALinear(linear(dtype), r, own_base=False)
        lora.number = number
        return lora

    x = rows(torch.float32)
    key = signature(build(), x, ignore=("number",))
    assert key == signature(build(number=1), torch.zeros_like(x), ignore=("number",))
    assert {key: 1}[signature(build(), x, ignore=("number",))] == 1
    trained, hooked, evaluated, replaced = (build() for _ in range(4))
    trained.base.weight.requires_grad_()
    hooked.base.register_forward_hook(lambda *_: None)
    evaluated.eval()
    replaced.base.forward = lambda x: x
    others = [build(number=1), build(torch.bfloat16), build(r=5)]
    for other in (*others, trained, hooked, evaluated, replaced):
        assert signature(build(), x) != signature(other, x)
    for given in (x[:1], x.double(), x.mT.contiguous().mT, x.clone().requires_grad_()):
        assert signature(build(), x) != signature(build(), given)
    assert signature(x, x) != signature(x, x.clone())
    plain = signature(x)
    for state in (("auto", True, True), ("torch", False, True), ("auto", False, False)):
        with setting(*state):
            assert signature(x) != plain
