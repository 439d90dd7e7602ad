"""Every line of advice names one cause with the bytes that are its own, counted here by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from petal_kernels import memory
from petal_kernels.memory.advice import Advice, advise
from petal_kernels.memory.records import MIB, mib
from tests.tools.test_memory import names

N, D = 40, 48
X = N * D  # numbers of an activation


def only(found: memory.Profile, cause: str) -> Advice:
    (advice,) = [a for a in advise(found) if a.cause == cause]
    return advice


class Copying(nn.Module):
    """Three 16-bit projections, each of its own copy of x."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(D, D, dtype=torch.bfloat16) for _ in range(3))

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [layer(x.to(torch.bfloat16)) for x in inputs for layer in self.parts]


class Frozen(nn.Module):
    """A trained linear between two frozen ones, each with its tanh."""

    def __init__(self) -> None:
        super().__init__()
        frozen = [nn.Sequential(nn.Linear(D, D), nn.Tanh()).requires_grad_(False) for _ in "ab"]
        self.below, self.above = frozen
        self.middle = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.above(self.middle(self.below(x)))


class Attention(nn.Module):
    """Eager attention over four heads, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.drop(torch.softmax(q @ k.transpose(-1, -2), dim=-1)) @ v


class PythonNorm(nn.Module):
    """RMSNorm as models write it: in float32, between 16-bit tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * h.to(x.dtype)


def copies(times: int) -> Callable[[], tuple[memory.Profile, int, str]]:
    def build() -> tuple[memory.Profile, int, str]:
        found = memory.profile(Copying(), tuple(torch.randn(N, D) for _ in range(times)))
        said = "3 bfloat16 copies of one tensor" + (" (2 times)" if times == 2 else ", at parts.*")
        return found, times * 3 * 2 * X, said

    return build


def wasted() -> tuple[memory.Profile, int, str]:
    # As after enable_input_require_grads(). The tanh's result is the middle's input, too: a trained
    # weight needs it. The first linear is frozen and keeps nothing.
    model = nn.Sequential(Frozen(), Frozen())
    model[0].middle.requires_grad_(False)
    found = memory.profile(model, torch.randn(N, D, requires_grad=True))
    # Of the first: both tanh's; of the second's `below`: nothing that its middle does not need.
    return found, 2 * 4 * X, "the frozen * keeps what no gradient"


def frozen() -> tuple[memory.Profile, int, str]:
    # Kept: the middle's input and the upper tanh's result.
    found = memory.profile(Frozen(), torch.randn(N, D))
    return found, 4 * X, "the frozen above keeps 50 % of all"


def dropout(on_cuda: bool) -> Callable[[], tuple[memory.Profile, int, str]]:
    def build() -> tuple[memory.Profile, int, str]:
        model = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5), nn.Linear(D, D), nn.Dropout(0.5))
        found = memory.profile(model, torch.randn(N, D), cuda_rules=on_cuda)
        # On CUDA a byte, on a CPU noise in x's own dtype.
        return found, 2 * X * (1 if on_cuda else 4), "2 dropout masks, at *"

    return build


def attention() -> tuple[memory.Profile, int, str]:
    q, k, v = (torch.randn(2, 4, 33, 8, requires_grad=True) for _ in range(3))
    found = memory.profile(Attention(), (q, k, v), cuda_rules=True)
    # Probabilities, and dropped-out ones; the mask is dropout's.
    return found, 2 * 4 * 33 * 33 * (4 + 4), "attention probabilities, e.g. 33 x 33 per head"


def parameters(kind: str) -> Callable[[], tuple[memory.Profile, int, str]]:
    def build() -> tuple[memory.Profile, int, str]:
        frozen, trained = nn.Linear(D, D).requires_grad_(False), nn.Linear(D, 2 * D)

        def step(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return trained(frozen(x))

        x = torch.randn(N, D, requires_grad=True)
        found = memory.profile(step, (x,), module=nn.ModuleDict({"f": frozen, "t": trained}))
        size = 2 * D * D * (1 if kind == "frozen" else 2)
        return found, size, f"bfloat16 copies of 1 {kind} parameter, at {kind[0]}"

    return build


def loss() -> tuple[memory.Profile, int, str]:
    target = torch.zeros(N, dtype=torch.long)
    model = nn.Linear(D, 500)
    found = memory.profile(model, (torch.randn(N, D),), loss=lambda y: F.cross_entropy(y, target))
    return found, 4 * N * 500, f"log-probabilities of the loss, {N} x 500 float32"


def norms() -> tuple[memory.Profile, int, str]:
    x = torch.randn(N, D, dtype=torch.bfloat16, requires_grad=True)
    # h, once: squared and a factor. A reciprocal per row is not worth a word.
    return memory.profile(PythonNorm(), x), 4 * X, "1 float32 tensor in norms of a 16-bit model"


def mode() -> tuple[memory.Profile, int, str]:
    found = memory.profile(Frozen().eval(), torch.randn(N, D))
    return found, 2 * 4 * X, "the model is in evaluation mode"


CASES: list[tuple[str, Callable[[], tuple[memory.Profile, int, str]]]] = [
    ("copies", copies(1)),
    ("copies", copies(2)),
    ("wasted", wasted),
    ("frozen", frozen),
    ("dropout", dropout(True)),
    ("dropout", dropout(False)),
    ("attention", attention),
    ("loss", loss),
    ("norms", norms),
    ("mode", mode),
]


@pytest.mark.parametrize(("cause", "build"), CASES)
def test_a_line_counts_its_own_bytes(
    cause: str, build: Callable[[], tuple[memory.Profile, int, str]]
) -> None:
    """Kind: an advice that is off by a factor, or misses a term."""
    found, size, said = build()
    advice = only(found, cause)
    assert advice.bytes == size
    assert said in advice.text
    assert str(advice).startswith(mib(size))
    assert advice.bytes <= found.saved_bytes


@pytest.mark.parametrize("kind", ["frozen", "trained"])
def test_copies_of_parameters_are_told_apart(kind: str) -> None:
    """Kind: a frozen parameter's bytes in a trained one's line."""
    found, size, said = parameters(kind)()
    (advice,) = [a for a in advise(found) if a.cause == "parameters" and kind in a.text]
    assert advice.bytes == size
    assert said in advice.text


def test_lines_are_sorted_and_those_below_one_per_cent_are_left_out() -> None:
    """Kind: a threshold that is never met."""
    target = torch.zeros(2, dtype=torch.long)

    def found(width: int) -> memory.Profile:
        model = nn.Sequential(nn.Dropout(0.5), nn.Linear(width, 300), nn.Linear(300, 3))
        x = torch.randn(2, width)
        return memory.profile(model, x, loss=lambda y: F.cross_entropy(y, target), cuda_rules=True)

    for width in (16, 4096):
        advice = advise(found(width))
        sizes = [a.bytes for a in advice]
        assert sizes == sorted(sizes, reverse=True)
        # 24 bytes of log-probabilities.
        assert ("loss" in {a.cause for a in advice}) == (0.01 * found(width).saved_bytes <= 24)


def test_units() -> None:
    """Kind: mega where mebi is meant."""
    assert [mib(n) for n in (9_999, 10_000, MIB - 1, MIB, 10_000 * MIB)] == [
        "9999 B",
        "9.8 KiB",
        "1024.0 KiB",
        "1.0 MiB",
        "9.77 GiB",
    ]
    assert mib(-2.5 * MIB) == "-2.5 MiB"
    assert MIB == 1024 * 1024


def test_the_report_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind: a total that is not the sum of what stands below it."""
    model = nn.Sequential(*(nn.Linear(D + i, D + i + 1) for i in range(4)), nn.Tanh())
    found = memory.profile(model, torch.randn(N, D))
    rows = found.rows()
    assert sum(r.bytes for r in rows) == sum(found.by("role").values()) == found.saved_bytes
    assert sum(r.share for r in rows) == pytest.approx(1)
    shown: dict[str, Any] = found.to_dict()
    assert sum(r["bytes"] for r in shown["saved"]) == shown["saved_bytes"]
    rest = sum(r.bytes for r in rows[1:])
    assert f"and {len(rows) - 1} more, {mib(rest)} together" in found.table(limit=1)


class Tower(nn.Module):
    """A frozen tower, a trained bridge, a frozen language model."""

    def __init__(self) -> None:
        super().__init__()
        frozen = [nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh()]
        self.vision = nn.Sequential(*frozen).requires_grad_(False)
        self.bridge = nn.Linear(16, 16)
        self.language = nn.Sequential(nn.Linear(16, 16), nn.Tanh()).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.language(self.bridge(self.vision(x)))


def test_advice_tells_a_wasted_tower_from_one_that_a_gradient_passes_through() -> None:
    x = torch.randn(8, 16)
    found = memory.profile(Tower(), x)
    assert "wasted" not in names(found)
    (frozen,) = [a for a in advise(found) if a.cause == "frozen"]
    assert frozen.bytes == x.nbytes  # tanh's result
    assert "language" in frozen.text
    # As after enable_input_require_grads(): the tower keeps both results of its tanh for nothing,
    # but the second is what the bridge needs, too.
    wasted = memory.profile(Tower(), x.clone().requires_grad_())
    (advice,) = [a for a in advise(wasted) if a.cause == "wasted"]
    assert advice.bytes == x.nbytes
    assert "vision" in advice.text
    assert "detach" in advice.remedy


@pytest.mark.parametrize("trained", [False, True], ids=["input", "after-a-trained-layer"])
def test_advice_on_a_checkpointed_tower(trained: bool) -> None:
    """As after enable_input_require_grads() with checkpointing: a frozen tower's regions keep their
    inputs, for nothing unless something trained lies before it."""

    class Region(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(
                lambda t: torch.tanh(F.linear(t, self.weight)), x, use_reentrant=False
            )

    first = nn.Linear(16, 16).requires_grad_(trained)
    vision = nn.Sequential(*(Region(16, 16) for _ in range(3))).requires_grad_(False)
    x = torch.randn(8, 16, requires_grad=True)
    found = memory.profile(nn.Sequential(first, vision, nn.Linear(16, 16)), x)
    inputs = [r for r in found.saved if r.operation == "checkpoint"]
    assert [r.useful for r in inputs] == 3 * [trained]
    assert ("wasted" in names(found)) != trained


def test_advice_on_eager_attention_dropout_and_evaluation_mode() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.1)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            p = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
            return self.drop(p) @ v

    q, k, v = (torch.randn(2, 4, 33, 8, requires_grad=True) for _ in range(3))
    found = memory.profile(Attention(), (q, k, v), cuda_rules=True)
    by_cause = {a.cause: a for a in advise(found)}
    scores = 2 * 4 * 33 * 33
    assert by_cause["dropout"].bytes == scores
    # Probabilities, and dropped-out ones: a factor of the product with v.
    assert by_cause["attention"].bytes == scores * (4 + 4)
    assert "33 x 33" in by_cause["attention"].text
    assert "mode" in names(memory.profile(Attention().eval(), (q, k, v)))


def test_advice_on_copies_of_parameters_under_autocast() -> None:
    base = nn.Linear(32, 32).requires_grad_(False)
    x = torch.randn(4, 32, requires_grad=True)

    def forward(t: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return base(t)

    found = memory.profile(forward, x, module=base)
    (record,) = [r for r in found.saved if r.source]
    assert (record.source, record.bytes) == ("weight", 32 * 32 * 2)
    (frozen,) = [a for a in advise(found) if a.cause == "parameters"]
    assert frozen.remedy.startswith("load the frozen model in the dtype")
    base.requires_grad_(True)
    (trained,) = [
        a for a in advise(memory.profile(forward, x, module=base)) if a.cause == "parameters"
    ]
    assert "1 trained parameter" in trained.text
    assert "adapter_dtype" in trained.remedy
