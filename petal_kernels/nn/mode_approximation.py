"""Mode approximation: one set of shared low-rank factors, one small vector per adapted matrix.

Every adapted matrix ("mode") k of a model gets the update dW_k = s V M_k^T U, where

    M_k[a, b] = sum_c C[a, b, c] p_k[c]          core "tucker": C is [R, R, R]
    M_k       = diag(lambda * p_k)               core "cp":     lambda is [R]

U [R, D], V [O, R] and the core belong to the whole model; p_k [R] is all that a mode adds.
`contract` computes P_k = s V M_k^T for every mode in one call, once per forward of the model, and
`forward` applies the modes that read one input: y_k = base_k + drop(x U^T) P_k^T.

Initialisation: U kaiming-uniform(a=sqrt 5), V zero (so that every dW_k is zero at step 0), the
Tucker core and each p_k xavier-uniform (p_k as an R x 1 matrix). The CP weights lambda start at
one, the neutral choice: no initial value is published for them, and p_k already carries the scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from petal_kernels._runtime import checks, philox
from petal_kernels.nn.arguments import (
    check_choice,
    check_index,
    check_rows,
    check_size,
    check_storage,
)
from petal_kernels.nn.gated_adapter import Near
from petal_kernels.ops.lowrank_linear import lowrank_linear
from petal_kernels.ops.mode_contract import mode_contract

CORES = ("cp", "tucker")


class ModeApproximation(nn.Module):
    """Shared factors `down` (U), `up` (V), `core` and the mode vectors of `n_modes` matrices.

    Parameters are kept in `dtype` (float32 by default, whatever the frozen model uses).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        n_modes: int,
        *,
        core: str = "cp",
        scale: float = 1.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_choice("core", core, CORES)
        self.in_features = check_size("in_features", in_features)
        self.out_features = check_size("out_features", out_features)
        self.r, self.n_modes = check_size("r", r), check_size("n_modes", n_modes)
        philox.check_probability(dropout)
        check_storage(device, dtype)
        self.core_kind = core
        self.scale, self.dropout = checks.check_number("scale", scale), float(dropout)
        self.down = nn.Parameter(torch.empty(r, in_features, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(out_features, r, device=device, dtype=dtype))
        core_shape = (r,) if core == "cp" else (r, r, r)
        self.core = nn.Parameter(torch.empty(core_shape, device=device, dtype=dtype))
        self.modes = nn.Parameter(torch.empty(n_modes, r, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = 1.0 / math.sqrt(self.in_features)
        self.down.uniform_(-bound, bound)
        self.up.zero_()
        if self.core_kind == "cp":
            self.core.fill_(1.0)
        else:
            bound = math.sqrt(3.0) / self.r
            self.core.uniform_(-bound, bound)
        bound = math.sqrt(6.0 / (self.r + 1))
        self.modes.uniform_(-bound, bound)

    def contract(
        self, index: slice | Sequence[int] | None = None, *, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, ...]:
        """P_k [out_features, r] of the modes `index` (all by default), rounded once to `dtype`."""
        check_storage(None, dtype)
        modes: Tensor = self.modes
        if index is not None:
            chosen = self._chosen(index)
            modes = modes[index if isinstance(index, slice) else chosen]
        stacked = mode_contract(self.core, modes, self.up, scale=self.scale, dtype=dtype)
        # unbind, not indexing: the backward of K selects would add K zero-filled [K, O, R] tensors.
        return stacked.unbind(0)

    def forward(
        self,
        x: Tensor,
        index: slice | Sequence[int] | None = None,
        *,
        base: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """Outputs of the modes `index`, all reading `x`: base_k (if given) + drop(x U^T) P_k^T."""
        checks.check_device("x", check_rows("x", x, self.in_features), self.down.device)
        if base is not None:
            self._check_base(base, len(self._chosen(index)), x)
        ups = self.contract(index, dtype=x.dtype)
        return lowrank_linear(
            x,
            Near(x.dtype, x.device).parameter(self.down),
            ups,
            base=None if base is None else list(base),
            dropout=self.dropout,
            training=self.training,
        )

    def _chosen(self, index: slice | Sequence[int] | None) -> list[int]:
        """The numbers of the modes `index`; raises unless there are some."""
        if index is None:
            return list(range(self.n_modes))
        if not isinstance(index, (slice, list, tuple, range)):
            raise TypeError(f"index: want a slice or a list of ints, got {type(index).__name__}")
        chosen = list(range(self.n_modes)[index]) if isinstance(index, slice) else list(index)
        for each in chosen:
            check_index("index", each, self.n_modes)
        if not chosen:
            raise ValueError(f"index: want at least one of the {self.n_modes} modes, got none")
        return chosen

    def _check_base(self, base: Sequence[Tensor], count: int, x: Tensor) -> None:
        if not isinstance(base, (list, tuple)):
            raise TypeError(f"base: want a sequence of tensors, got {type(base).__name__}")
        if len(base) != count:
            raise ValueError(f"base: want {count} tensors, one for each mode, got {len(base)}")
        for k, each in enumerate(base):
            check_rows(f"base[{k}]", each, self.out_features, like=x)
            checks.check_dtype(f"base[{k}]", each, (x.dtype,), " like x")

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"n_modes={self.n_modes}, core={self.core_kind!r}, scale={self.scale}, "
            f"dropout={self.dropout}"
        )
