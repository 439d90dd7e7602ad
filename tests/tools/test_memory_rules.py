"""CUDA's rule for attention and dropout on fake tensors: by whatever name they are called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import dropout as dropout_by_name
from torch.nn.functional import scaled_dot_product_attention as attention_by_name
from torch.utils.checkpoint import checkpoint

from petal_kernels import memory

P = 0.3
SHAPE = (4, 6, 16)
NUMBERS = 4 * 6 * 16
WHOLE_CHANNELS = 4 * 6  # numbers that dropout of whole channels draws


def aten(name: str) -> Callable[..., Tensor]:
    packet: Callable[..., Tensor] = getattr(torch.ops.aten, name)
    return packet


def in_place(x: Tensor) -> Tensor:
    return F.dropout(x + 1.0, P, inplace=True)


# What each keeps of x in float32. On CUDA only dropout out of place has a kernel of its own, with a
# mask of one byte; the others multiply by noise of x's dtype, as on a CPU.
DROPOUTS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "function": (lambda x: F.dropout(x, P), NUMBERS),
    "imported by name": (lambda x: dropout_by_name(x, P), NUMBERS),
    "keywords": (lambda x: F.dropout(input=x, p=P, training=True), NUMBERS),
    "module": (nn.Dropout(P), NUMBERS),
    "torch": (lambda x: torch.dropout(x, P, True), NUMBERS),
    "operator": (lambda x: aten("dropout")(x, P, True), NUMBERS),
    "overload": (lambda x: torch.ops.aten.dropout.default(x, P, True), NUMBERS),
    "in place": (in_place, 4 * NUMBERS),
    "of channels": (lambda x: F.dropout1d(x, P), 4 * WHOLE_CHANNELS),
    "alpha": (lambda x: F.alpha_dropout(x, P, True), 4 * NUMBERS),
    "evaluation": (lambda x: F.dropout(x, P, False), 0),
    "nothing dropped": (lambda x: F.dropout(x, 0.0), 0),
    "all dropped": (lambda x: F.dropout(x, 1.0), 4),
}


@pytest.mark.parametrize("way", DROPOUTS)
def test_dropout_keeps_what_cuda_keeps_by_any_name(way: str) -> None:
    forward, kept = DROPOUTS[way]
    x = torch.randn(SHAPE, requires_grad=True)
    model, batch = memory.fake_tensors(nn.Identity(), (x,))
    found = memory.profile(lambda t: forward(model(t)), batch)
    assert found.fake
    assert found.saved_bytes == kept
    assert memory.profile(forward, x, cuda_rules=True).saved_bytes == kept


B, H, L, D = 2, 3, 40, 8
# q, k, v and the output, one float32 per row of scores, two integers of the generator.
FUSED = 4 * (4 * B * H * L * D + B * H * L) + 16
ATTENTIONS: dict[str, Callable[..., Tensor]] = {
    "function": lambda *a, **k: F.scaled_dot_product_attention(*a, **k),
    "imported by name": attention_by_name,
    "operator": aten("scaled_dot_product_attention"),
    "overload": torch.ops.aten.scaled_dot_product_attention.default,
}


@pytest.mark.parametrize("way", ATTENTIONS)
def test_attention_keeps_what_cuda_keeps_by_any_name(way: str) -> None:
    attention = ATTENTIONS[way]
    q, k, v = (torch.randn(B, H, L, D, requires_grad=True) for _ in range(3))
    _, batch = memory.fake_tensors(nn.Identity(), (q, k, v))
    assert memory.profile(lambda *a: attention(*a, dropout_p=0.1), batch).saved_bytes == FUSED


@pytest.mark.parametrize("order", ["tokens", "heads"])
def test_the_output_lies_as_q_does(order: str) -> None:
    """Kind: a copy where heads are joined that the fused kernels' layout spares, counted for the
    linear that reads it; or none where q's heads lie apart."""
    joined = nn.Linear(H * D, 1, bias=False)
    shape = (B, L, H, D) if order == "tokens" else (B, H, L, D)
    q = torch.randn(shape, requires_grad=True)

    def forward(t: Tensor) -> Tensor:
        heads = t.transpose(1, 2) if order == "tokens" else t
        out = F.scaled_dot_product_attention(heads, heads * 2, heads * 3)
        y: Tensor = joined(out.transpose(1, 2).reshape(B, L, H * D))
        return y

    found = memory.profile(forward, q, module=joined, cuda_rules=True)
    attention = 4 * (4 * B * H * L * D + B * H * L)
    assert found.saved_bytes == attention + (4 * B * L * H * D if order == "heads" else 0)


def test_attention_keeps_its_mask_as_numbers() -> None:
    """As fused kernels add it to the scores: a mask of booleans is made numbers of q's dtype."""
    q = torch.randn(B, H, L, D, requires_grad=True)
    for dtype in (torch.bool, torch.float32):
        mask = torch.zeros(B, 1, L, L, dtype=dtype)
        found = memory.profile(
            lambda t, m: F.scaled_dot_product_attention(t, t, t, attn_mask=m),
            (q, mask),
            cuda_rules=True,
        )
        kept = {r.shape: r.bytes for r in found.saved}
        assert kept[(B, 1, L, L)] == 4 * B * L * L
        real = memory.profile(
            lambda t, m: F.scaled_dot_product_attention(t, t, t, attn_mask=m),
            (q, mask),
            cuda_rules=False,
        )
        assert {r.shape: r.bytes for r in real.saved}[(B, 1, L, L)] == 4 * B * L * L


def test_attention_under_autocast_keeps_16_bit_tensors() -> None:
    q = torch.randn(B, H, L, D, requires_grad=True)

    def forward(t: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.scaled_dot_product_attention(t, t * 2, t * 3)

    found = memory.profile(forward, q, cuda_rules=True)
    assert found.saved_bytes == 2 * 4 * B * H * L * D + 4 * B * H * L


def test_attention_in_double_precision_keeps_its_probabilities() -> None:
    """No fused kernel of CUDA's takes it."""
    q = torch.randn(B, H, L, D, requires_grad=True, dtype=torch.float64)
    found = memory.profile(lambda t: F.scaled_dot_product_attention(t, t, t), q, cuda_rules=True)
    assert (B, H, L, L) in {r.shape for r in found.saved}


@pytest.mark.parametrize("need_weights", [False, True])
def test_the_rule_reaches_into_functions_that_are_made_of_others(need_weights: bool) -> None:
    """nn.MultiheadAttention calls attention, or softmax and dropout, inside another function."""
    attention = nn.MultiheadAttention(16, 4, dropout=0.1, batch_first=True)
    x = torch.randn(2, 33, 16, requires_grad=True)

    def forward(t: Tensor) -> Tensor:
        out: Tensor = attention(t, t, t, need_weights=need_weights)[0]
        return out

    on_cpu, on_cuda = (memory.profile(forward, x, cuda_rules=r) for r in (False, True))
    scores = 2 * 4 * 33 * 33
    if need_weights:  # a mask of bytes for noise of floats
        assert on_cpu.saved_bytes - on_cuda.saved_bytes == scores * (4 - 1)
    else:
        assert all(r.shape[-2:] != (33, 33) for r in on_cuda.saved)
        assert "KeptAttentionFunctionBackward" in {r.operation for r in on_cuda.saved}


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_rule_holds_where_a_region_runs_again(reentrant: bool) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(P))
    x = torch.randn(5, 16, requires_grad=True)
    found = memory.profile(
        lambda t: checkpoint(model, t, use_reentrant=reentrant), x, cuda_rules=True
    )
    again = {b.operation for b in found.blocks if b.category == "recomputed"}
    assert "aten.native_dropout" in again
    assert "aten.bernoulli_.float" not in again


def test_a_backward_inside_the_step_keeps_the_rule() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(P))

    def step(t: Tensor) -> Tensor:
        first = checkpoint(model, t, use_reentrant=False)
        first.sum().backward()
        out: Tensor = model(t)
        return out

    found = memory.profile(step, torch.randn(5, 16, requires_grad=True), cuda_rules=True)
    made = [b.operation for b in found.blocks]
    assert made.count("aten.native_dropout") == 2 * 3  # forward, once more, forward


def test_the_rule_is_this_threads_alone_and_ends_with_the_profile() -> None:
    before = F.dropout, F.scaled_dot_product_attention, torch.dropout
    during: list[object] = []

    def step(t: Tensor) -> Tensor:
        during.extend((F.dropout, F.scaled_dot_product_attention, torch.dropout))
        return F.dropout(t, P)

    memory.profile(step, torch.randn(4, requires_grad=True), cuda_rules=True)
    assert tuple(during) == before
    assert torch._C._len_torch_function_stack() == 0


def test_what_the_rule_does_not_reach_is_said() -> None:
    """TorchScript enters operators by another door, and cuDNN's recurrent layers keep their own."""

    @torch.jit.script
    def scripted(x: Tensor) -> Tensor:
        return F.dropout(x, 0.3)

    x = torch.randn(5, 16, requires_grad=True)
    lstm = nn.ModuleDict({"words": nn.LSTM(16, 8, 2, dropout=0.5)})
    for model, batch in (
        (scripted, (x,)),
        (torch.jit.script(nn.Dropout(P)), (x,)),
        (lambda t: lstm["words"](t)[0], (x,)),
    ):
        found = memory.profile(model, batch, cuda_rules=True)
        (note,) = found.notes
        assert "CUDA's rule does not reach" in note
        assert (
            note in found.table().replace("\n", " ").replace("  ", " ") or "note" in found.table()
        )
        assert memory.profile(model, batch, cuda_rules=False).notes == []
    assert "words" in note
