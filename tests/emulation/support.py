"""Inputs of the tests that execute the CUDA kernels under the emulation."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from petal_kernels.ops.lowrank_linear.arguments import Call, Settings, Tensors
from tests.emulation import build

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RNG = torch.tensor([0x0123_4567_89AB_CDEF, 0xFFFF_FFFE])  # the offset wraps at stream 2

# What another order of a sum may cost beyond the stated multiples of torch's own error.
FLOOR = {torch.float32: 1e-7, torch.float16: 2e-5, torch.bfloat16: 2e-4}

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


@functools.cache
def between_rows(dtype: torch.dtype) -> float:
    """What lies between padded rows: NaN, or a huge number where torch's own product reads it.

    On processors with AMX, oneDNN before 3.14 multiplies what lies behind a row of bfloat16 by
    zero (uxlfoundation/oneDNN issue 5717); the emulated operators leave the base's product to
    torch.
    """
    for width in (33, 77, 136):
        x = _with_between(torch.ones(70, width, dtype=dtype), 8, float("nan"))
        for outs in (19, 70, 133):
            if not bool(torch.isfinite(x @ torch.ones(outs, width, dtype=dtype).t()).all()):
                return torch.finfo(dtype).max / 4
    return float("nan")


def _with_between(t: Tensor, pad: int, value: float) -> Tensor:
    wide = torch.full((t.shape[0], t.shape[1] + pad), value, dtype=t.dtype)
    wide[:, : t.shape[1]] = t
    return wide[:, : t.shape[1]]


def pad_rows(t: Tensor, pad: int) -> Tensor:
    """The same values with a row stride of ``pad`` more elements, and `between_rows` there."""
    return _with_between(t, pad, between_rows(t.dtype))


@dataclass(frozen=True)
class Linear:
    """One call of lowrank_linear: sizes, then what varies."""

    rows: int = 70
    width: int = 77
    rank: int = 19
    outs: tuple[int, ...] = (70, 133)
    site: str = "bottleneck"
    p: float = 0.2
    fused: bool = False
    small: bool = True
    transposed: bool = False  # ups as views of [R, O]
    pad: int = 3
    source: str = "weights"  # "weights", "base", "none", "hidden"
    wide_parameters: bool = False  # float32 factors
    ranks: tuple[int, ...] = ()  # a down-projection of every output's own
    scales: tuple[float, ...] = ()  # in place of one for all

    def inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        n, d, r = self.rows, self.width, self.rank
        kept = torch.float32 if self.wide_parameters else dtype

        def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape).div(shape[-1] ** 0.5).to(dtype)

        ranks = self.ranks or (r,) * len(self.outs)
        ups = [randn(o, k, dtype=kept) for o, k in zip(self.outs, ranks, strict=True)]
        if self.transposed:
            ups = [up.t().contiguous().t() for up in ups]
        hidden = self.source == "hidden"
        down = [randn(k, d, dtype=kept) for k in self.ranks] or randn(r, d, dtype=kept)
        weights = [randn(o, d) for o in self.outs] if self.source == "weights" else []
        return {
            "x": None if hidden else pad_rows(randn(n, d), self.pad),
            "down": None if hidden else down,
            "hidden": pad_rows(randn(n, r), self.pad) if hidden else None,
            "ups": ups,
            "weights": weights,
            "biases": [randn(o) for o in self.outs] if weights else [],
            "base": [pad_rows(randn(n, o), self.pad) for o in self.outs]
            if self.source in ("base", "hidden")
            else [],
            "core": randn(len(self.outs), r, r, dtype=kept) if self.site == "mode" else None,
            "rng": RNG if self.p else None,
            "scale": list(self.scales) or 0.7,
            "dropout": self.p,
            "dropout_at": self.site,
        }


def error(got: Tensor, want: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    assert torch.isfinite(got).all()
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


def assert_close(name: str, got: Tensor, plain: Tensor, exact: Tensor, factor: float) -> None:
    """No further from the exact value than this multiple of plain torch's error."""
    bound = factor * error(plain, exact) + FLOOR[plain.dtype]
    assert error(got, exact) <= bound, f"{name}: {error(got, exact):.2e} > {bound:.2e}"


def wider(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, list):
        return [wider(v) for v in value]
    return value


def linear_call(**args: Any) -> Call:
    """What is not named is not given."""
    given: dict[str, Any] = {"hidden": None, "weights": [], "biases": [], "base": [], "core": None}
    given |= {"scale": 1.0, "dropout": 0.0, "dropout_at": "input"} | args
    down, scale = given.pop("down", None), given.pop("scale")
    given["downs"] = down if isinstance(down, list) else [] if down is None else [down]
    given["scales"] = scale if isinstance(scale, list) else [scale] * len(given["ups"])
    return Call(
        Tensors(*(given[n] for n in Tensors._fields)),
        Settings(*(given[n] for n in Settings._fields)),
    )


def run_linear(impl: Any, args: dict[str, Any], dys: list[Tensor]) -> dict[str, Tensor]:
    call, rng = linear_call(**args), args["rng"]
    ys, saved = impl.forward(call, rng, "update")
    inputs = {"x": "x", "down": "downs", "ups": "ups", "core": "core"}
    need = {field for name, field in inputs.items() if args[name] is not None} | {"hidden"}
    grads = impl.backward(call, saved, dys, rng, frozenset(need))
    found = {f"y{k}": y for k, y in enumerate(ys)} | {"h": saved.h}
    found |= {"dx": grads.x, "dh": grads.hidden, "dcore": grads.core}
    found |= {f"dup{k}": dup for k, dup in enumerate(grads.ups)}
    found |= {f"ddown{k}": ddown for k, ddown in enumerate(grads.downs or [])}
    return {k: v for k, v in found.items() if v is not None}
