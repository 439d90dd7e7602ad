"""Numbers and checks of the tests that run Triton kernels in the interpreter."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.ops import triton_audit


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Rows of length about one, the same for the same shape and seed."""
    g = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return (torch.randn(shape, generator=g) / shape[-1] ** 0.5).to(dtype)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 7) -> Tensor:
    """Standard normal numbers, the same for the same seed."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g).to(dtype)


def close(got: Tensor | None, want: Tensor, tolerance: float) -> None:
    """No element further from what is wanted than this share of the largest."""
    assert got is not None
    assert got.shape == want.shape
    worst = float((got.double() - want).abs().max() / want.abs().max())
    assert worst <= tolerance, f"error {worst:.2e} of the largest value"


def clean(audit: triton_audit.Audit) -> None:
    """No launch stored an element twice."""
    for launch in audit.launches:
        assert not launch.rewritten(), f"{launch.kernel}: stored twice: {launch.rewritten()}"


def expect(audit: triton_audit.Audit, fragment: str, *wanted: int) -> None:
    """Compulsory bytes within 2 %, launch by launch."""
    launches = audit.of(fragment)
    assert [launch.kernel for launch in launches], f"no launch of {fragment}"
    for launch, want in zip(launches, wanted, strict=True):
        moved = launch.moved()
        assert abs(moved - want) <= 0.02 * want, f"{launch.kernel}: {moved} bytes, not {want}"
