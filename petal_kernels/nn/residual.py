"""Scale/shift residual and batch context, the two small parts that PETAL keeps from Aurora.

Residual: a layer's output gains  0.1 (a * s + t),  a being the output of one of its attention
blocks (after the block's LayerNorm) and s, t vectors of the hidden width drawn from N(0, 0.0002^2).
Context: the output c of a cross-attention block gains, at its first token only, 0.1 times the mean
over the batch of a_q[:, 0] (a's first query); gradients flow to every sample, in evaluation too. A
residual that reads c reads it after this addition: c is what the layer itself goes on with.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from petal_kernels._runtime import checks
from petal_kernels.nn.arguments import check_rows, check_size, check_storage, check_values

RESIDUAL_SCALE = 0.1
CONTEXT_SCALE = 0.1
INIT_STD = 0.0002


class ScaleShift(nn.Module):
    """Adds 0.1 (a * scale + shift) to `y`, computed in y's dtype."""

    def __init__(
        self,
        features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.features = check_size("features", features)
        check_storage(device, dtype)
        self.scale = nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        self.shift = nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.scale.normal_(0.0, INIT_STD)
        self.shift.normal_(0.0, INIT_STD)

    def forward(self, y: Tensor, a: Tensor) -> Tensor:
        check_values("y", check_rows("y", y, self.features), self.scale)
        check_rows("a", a, self.features, like=y)
        # The factor goes onto the vectors: every token-sized operand is then passed over once.
        scale = (RESIDUAL_SCALE * self.scale).to(y.dtype)
        shift = (RESIDUAL_SCALE * self.shift).to(y.dtype)
        return torch.addcmul(y, a.to(y.dtype), scale).add_(shift)

    def extra_repr(self) -> str:
        return f"features={self.features}"


def batch_context(c: Tensor, a: Tensor) -> Tensor:
    """`c` [B, T, D] with 0.1 * mean over the batch of a[:, 0] added to its first token."""
    if checks.check_floating("c", c).dim() != 3:
        raise ValueError(f"c: want shape [B, T, D], got {list(c.shape)}")
    check_rows("a", a, c.shape[-1], lead=("B", "T"))
    if a.is_meta != c.is_meta:
        raise ValueError(f"a: want a tensor on device {c.device} like c, got {a.device}")
    if not a.shape[0] or not a.shape[1]:
        raise ValueError(f"a: want B >= 1 and T >= 1, got {list(a.shape)}")
    context = CONTEXT_SCALE * a[:, 0].mean(dim=0)
    # A new tensor: somebody's hook may hold the block's output, so it is not written in place.
    return torch.cat([c[:, :1] + context.to(c.dtype), c[:, 1:]], dim=1)
