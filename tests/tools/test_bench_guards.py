"""Guards against regression of what a user pays outside the kernels: a call's way to its kernel and
the time to attach.

Each is judged by its ratio to a reference workload of plain torch, timed in turns with it in the
same process: a slow or busy machine slows both. The best of many short turns is what neither the
scheduler nor the collector has touched; the limits are one and a half times what was measured.
`pytest --benchmark-save` keeps the times themselves.
"""

from __future__ import annotations

import copy
import gc
import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import petal_kernels as pk
from petal_kernels import _build_info
from petal_kernels._runtime import front
from petal_kernels.hf import attach
from petal_kernels.nn.lora import LoRALinear
from petal_kernels.nn.lora_fused import lora_linears, lora_mlp
from petal_kernels.tools.bench import overhead
from tests.hf import tiny_text

TURNS = 40
WINDOWS = 3

pytestmark = pytest.mark.timing


@pytest.fixture(autouse=True)
def undisturbed() -> Iterator[None]:
    """One thread, and no collection in the middle of a turn."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    torch.set_num_threads(before)


def ratio(
    run: Callable[[], object],
    reference: Callable[[], object],
    limit: float = 0.0,
    turns: int = TURNS,
) -> float:
    """The best time of `run` over the best of `reference`, turn by turn. A neighbour may be there
    for all of them: above the limit it is asked again, and the least of three times counts."""
    least = float("inf")
    for _ in range(WINDOWS):
        best = [float("inf"), float("inf")]
        for _ in range(turns):
            for i, f in enumerate((run, reference)):
                begin = time.perf_counter()
                f()
                best[i] = min(best[i], time.perf_counter() - begin)
        least = min(least, best[0] / best[1])
        if least <= limit:
            break
    return least


def dozen_operators(calls: int) -> Callable[[], object]:
    """`calls` times twelve tiny operators of torch: what dispatching costs on this machine."""
    x, w = torch.ones(1, 16), torch.ones(16, 16)

    def run() -> None:
        for _ in range(calls):
            y = x
            for _ in range(6):
                y = F.linear(y, w).relu()

    return run


def bart() -> nn.Module:
    torch.manual_seed(0)
    return tiny_text.MODELS["bart"]()


@pytest.mark.parametrize(
    ("what", "limit"), [("raw native", 1.0), ("public, no grad", 8.0), ("public, grad", 10.0)]
)
def test_dispatch_overhead(what: str, limit: float, benchmark: Any) -> None:
    """Of one tiny call, in units of twelve tiny operators of torch."""
    calls = 50
    steps = overhead.steps(torch.device("cpu"), calls)
    if what not in steps:
        pytest.skip("the native backend is not built: pk.explain says why")
    found = ratio(steps[what], dozen_operators(calls), limit)
    benchmark.extra_info["ratio"] = found
    benchmark.pedantic(steps[what], rounds=5, warmup_rounds=1)
    assert found < limit, f"{what}: {found:.2f} times twelve tiny operators, limit {limit}"


LAYER_LIMITS = [("linear", 1.0, 1.1), ("q, k, v", 0.6, 0.6), ("MLP", 0.6, 0.7)]


@pytest.mark.parametrize(("name", "forward", "trained"), LAYER_LIMITS)
def test_overhead_of_lora(name: str, forward: float, trained: float) -> None:
    """Of tiny layers, in units of the plain torch that they replace."""
    if front.load() is None:
        pytest.skip(f"the short ways are not built: {_build_info.reason('front')}")
    steps = overhead.layer_steps(torch.device("cpu"), calls=20)
    for what, limit in (("", forward), (", trained", trained)):
        found = ratio(steps[f"{name} petal{what}"], steps[f"{name} published{what}"], limit)
        assert found < limit, f"{name}{what}: {found:.2f} times the published form, limit {limit}"


def peft_linears(rank: int, dropout: float, sizes: list[tuple[int, int]]) -> list[nn.Module]:
    """PEFT's LoRA layers of these (in, out) features."""
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({f"l{k}": nn.Linear(i, o) for k, (i, o) in enumerate(sizes)})
    config = peft.LoraConfig(r=rank, lora_dropout=dropout, target_modules=[*model])
    adapted = peft.get_peft_model(model, config).base_model.model
    return [adapted[f"l{k}"] for k in range(len(sizes))]


def our_linears(rank: int, dropout: float, sizes: list[tuple[int, int]]) -> list[LoRALinear]:
    """Ours of the same."""
    bases = (nn.Linear(i, o).requires_grad_(False) for i, o in sizes)
    return [LoRALinear(base, rank, dropout=dropout) for base in bases]


def rounds(forward: Callable[[Tensor], Any], trained: bool, calls: int = 10) -> Callable[[], None]:
    """So many tiny calls: forward as training runs it, or forward and backward."""
    x = torch.ones(1, 4, 64, requires_grad=True)

    def run() -> None:
        for _ in range(calls):
            ys = forward(x)
            if trained:
                ys = [ys] if isinstance(ys, Tensor) else list(ys)
                torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])

    return run


BESIDE_PEFT: dict[str, tuple[float, list[tuple[int, int]], Any, Any]] = {
    "linear": (1.0, [(64, 64)], lambda x, m: m[0](x), lambda x, m: m[0](x)),
    "q, k, v": (
        *(0.5, [(64, 64)] * 3, lambda x, m: [each(x) for each in m]),
        lambda x, m: lora_linears(x, [(each, None) for each in m]),
    ),
    "gate, up, down": (
        *(0.5, [(64, 128), (64, 128), (128, 64)], lambda x, m: m[2](F.silu(m[0](x)) * m[1](x))),
        lambda x, m: lora_mlp(x, [(each, None) for each in m], "silu"),
    ),
}


@pytest.mark.parametrize("trained", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("name", BESIDE_PEFT)
def test_lora_beside_peft(name: str, trained: bool) -> None:
    """A tiny call with dropout takes at most what PEFT's layers take, a joined one half of it."""
    if front.load() is None:
        pytest.skip(f"the short ways are not built: {_build_info.reason('front')}")
    limit, sizes, theirs, ours = BESIDE_PEFT[name]
    peft, mine = peft_linears(8, 0.05, sizes), our_linears(8, 0.05, sizes)
    found = ratio(
        rounds(lambda x: ours(x, mine), trained), rounds(lambda x: theirs(x, peft), trained), limit
    )
    assert found <= limit, f"{found:.2f} times PEFT's, limit {limit}"


@pytest.mark.parametrize(
    ("config", "limit"),
    [(pk.VLPetConfig(r=8, value_r=8), 0.95), (pk.RoutingConfig(r=8), 0.95)],
    ids=lambda value: getattr(value, "method", None),
)
def test_attach_time(
    config: Any, limit: float, benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of attach and detach, in units of a deep copy of the model. Who holds the model is asked of
    the collector, once per attach: that takes what the process's objects take, not the model's."""
    model = bart()
    module = importlib.import_module("petal_kernels.hf.attach")
    monkeypatch.setattr(module, "check_holders", lambda model: None)

    def run() -> None:
        attach(model, config).detach()

    found = ratio(run, lambda: copy.deepcopy(model), limit, turns=15)
    benchmark.extra_info["ratio"] = found
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    assert found < limit, f"{config.method}: {found:.2f} deep copies, limit {limit}"


def test_a_guard_sees_a_call_that_takes_twice_as_long() -> None:
    reference = dozen_operators(50)
    run = dozen_operators(60)

    def twice() -> None:
        run()
        run()

    assert ratio(twice, reference) > 1.4 * ratio(run, reference)
