"""The expert modules against loops written from the formulas; initialisations, gates, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petal_kernels.nn import ExpertAdapter, ExpertLoRALinear, InstructionExperts

B, L, Q, D, E, R = 3, 11, 4, 24, 5, 8


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(module: Any) -> Any:
    """Every trainable parameter drawn, in fp64: initial zeros would hide mistakes."""
    module = module.double()
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(draw(*p.shape, seed=5 + i) / max(p.shape[-1], 1) ** 0.5)
    return module


def loop(m: Any, x: Tensor, g: Tensor) -> Tensor:
    """sum_e g_e expert_e(x), one expert at a time."""
    total = torch.zeros(*x.shape[:-1], m.out_features, dtype=x.dtype)
    act = {"identity": lambda t: t, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}
    for e in range(m.experts):
        own = 0 if m.shared_down else e
        z = F.linear(x, m.down[own], None if m.down_bias is None else m.down_bias[own])
        y = F.linear(act[m.activation](z), m.up[e], None if m.up_bias is None else m.up_bias[e])
        total = total + g[..., e, None] * y
    return total


def top(logits: Tensor, k: int) -> Tensor:
    values, indices = logits.topk(k, dim=-1)
    return torch.zeros_like(logits).scatter(-1, indices, values.softmax(-1))


@pytest.mark.parametrize("tokens", ["text", "all"])
@pytest.mark.parametrize("gate", ["mean", "softmax", "pooled", "top", "pooled-top"])
def test_instruction_experts(gate: str, tokens: str) -> None:
    options: dict[str, Any] = {"gate": "mean" if gate == "mean" else "softmax"}
    options |= {"router_input": "pooled"} if "pooled" in gate else {}
    options |= {"top_k": 2} if "top" in gate else {}
    m = filled(InstructionExperts(D, E, R, tokens=tokens, **options))
    x = draw(B, Q + L, D, seed=1).requires_grad_()
    mask = torch.ones(B, Q + L)
    mask[1, -4:] = 0
    first = Q if tokens == "text" else 0
    served, kept = x[:, first:], mask[:, first:]
    if gate == "mean":
        g = torch.full((*served.shape[:2], E), 1 / E, dtype=torch.float64)
    else:
        seen = served
        if "pooled" in gate:
            seen = (served * kept.unsqueeze(-1)).sum(1) / kept.sum(1, keepdim=True)
        logits = seen @ m.router.t()
        g = top(logits, 2) if "top" in gate else logits.softmax(-1)
        g = g.unsqueeze(1).expand(-1, served.shape[1], -1) if "pooled" in gate else g
    want = torch.cat((x[:, :first], 0.6 * served + 0.4 * loop(m, served, g)), dim=1)
    got, _ = m(x, Q, mask)
    torch.testing.assert_close(got, want)
    leaves = (x, *m.parameters())
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), leaves),
        torch.autograd.grad(want.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_full_size_counts() -> None:
    """594,816 for six experts of rank 64 as released; a router adds 6 x 768."""
    mean = InstructionExperts(768, gate="mean", device="meta")
    assert sum(p.numel() for p in mean.parameters()) == 594_816
    gated = InstructionExperts(768, device="meta")
    assert sum(p.numel() for p in gated.parameters()) == 594_816 + 6 * 768


def test_initialisations() -> None:
    torch.manual_seed(0)
    x = torch.randn(B, L, D)
    normal = InstructionExperts(D, E, R)
    assert 0.015 < normal.up.std() < 0.025
    assert normal.router is not None
    assert not normal.router.any()
    mean = InstructionExperts(D, E, R, gate="mean")
    mean.load_state_dict({k: v for k, v in normal.state_dict().items() if k != "router"})
    torch.testing.assert_close(normal(x)[0], mean(x)[0])
    identity = InstructionExperts(D, E, R, init="identity")
    assert identity.keep == 1.0
    torch.testing.assert_close(identity(x)[0], x)
    with pytest.raises(ValueError, match=r"keep: want 1\.0 with init='identity', got 0\.6"):
        InstructionExperts(D, E, R, init="identity", keep=0.6)
    torch.testing.assert_close(ExpertAdapter(D, E, R)(x)[0], x)
    base = nn.Linear(D, 2 * D)
    torch.testing.assert_close(ExpertLoRALinear(base, E, R)(x)[0], base(x))


@pytest.mark.parametrize("shared", [False, True])
def test_expert_adapter(shared: bool) -> None:
    m = filled(ExpertAdapter(D, E, R, shared_down=shared, scale=0.5))
    h = draw(B, L, D, seed=1)
    want = h + 0.5 * loop(m, h, (h @ m.router.t()).softmax(-1))
    torch.testing.assert_close(m(h)[0], want)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_expert_lora(shared: bool, top_k: int | None) -> None:
    base = nn.Linear(D, 2 * D)
    m = filled(ExpertLoRALinear(base, E, R, shared_down=shared, top_k=top_k, alpha=2 * R))
    x = draw(B, L, D, seed=1)
    logits = x @ m.router.t()
    g = logits.softmax(-1) if top_k is None else top(logits, top_k)
    torch.testing.assert_close(m(x)[0], base(x) + 2 * loop(m, x, g))


def test_the_domain_of_a_token_chooses_its_expert() -> None:
    """Image tokens 0, text tokens 1; by sample too."""
    m = filled(ExpertAdapter(D, 2, R, gate="domain"))
    assert m.router is None
    h, domain = draw(B, L, D, seed=1), torch.zeros(B, L, dtype=torch.long)
    domain[:, 4:] = 1
    torch.testing.assert_close(
        m(h, domain=domain)[0], h + loop(m, h, F.one_hot(domain, 2).double())
    )
    sample = torch.tensor([1, 0, 1])
    g = F.one_hot(sample, 2).double().unsqueeze(1).expand(-1, L, -1)
    torch.testing.assert_close(m(h, domain=sample)[0], h + loop(m, h, g))
    with pytest.raises(TypeError, match="domain: want an integer Tensor"):
        m(h)
    with pytest.raises(ValueError, match="domain: want None with gate='softmax'"):
        ExpertAdapter(D, 2, R).double()(h, domain=domain)


def test_noise_moves_the_choice_while_training_only() -> None:
    torch.manual_seed(0)
    m = InstructionExperts(D, E, R, top_k=1, router_noise=1.0)
    x = torch.randn(B, L, D)
    usage = m(x)[1].usage()
    assert (usage > 0).sum() > 1
    assert m.eval()(x)[1].usage().tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_autocast_and_a_16_bit_base() -> None:
    m = InstructionExperts(D, E, R)
    x = torch.randn(B, L, D)
    with torch.autocast("cpu", torch.bfloat16):
        out, routing = m(x)
    assert out.dtype == torch.bfloat16
    assert routing.logits is not None
    assert routing.logits.dtype == torch.float32
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in m.parameters())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"top_k": 9}, "top_k: want 1 <= top_k <= 5 experts, got 9"),
        ({"top_k": 2, "gate": "mean"}, "top_k: want None with gate='mean', got 2"),
        ({"gate": "mean", "router_input": "pooled"}, "router_input: want 'token' with gate='mean'"),
        ({"router_noise": -1.0}, "router_noise: want a finite number >= 0"),
        ({"gate": "domain"}, r"gate: want one of \('softmax', 'mean'\), got 'domain'"),
        ({"tokens": "image"}, "tokens: want one of"),
        ({"experts": 0}, "experts: want an integer >= 1, got 0"),
    ],
)
def test_refusals(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        InstructionExperts(D, **{"experts": E, "r": R} | options)
