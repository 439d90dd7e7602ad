"""First values of LoRA's A and B by PEFT's names, drawn or taken out of the base's weight.

What is taken out of the weight W stays in it: PEFT writes W - s B0 A0 over it, here the base is
never written and the update is s (B A - B0 A0), with the first factors kept beside A and B.

Sources: PiSSA, Meng et al., 2024 (the largest singular values, their roots on both sides); OLoRA,
Buyukakyuz, 2024 (the first columns and rows of a QR decomposition).
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from petal_kernels._runtime.numerics import wide

DRAWN = (True, False, "gaussian")
TAKEN = ("pissa", "pissa_niter_N", "olora")
_NITER = re.compile(r"pissa_niter_(\d{1,6})", re.ASCII)


def check_init(name: str, value: object) -> None:
    """ValueError unless `value` names an initialisation."""
    # 1 == True: a number is none.
    if isinstance(value, (bool, str)) and (value in DRAWN or is_taken(value)):
        return
    raise ValueError(f"{name}: want one of {(*DRAWN, *TAKEN)} (N a number), got {value!r}")


def is_taken(init: bool | str) -> bool:
    """Whether A and B are taken out of the base's weight."""
    if not isinstance(init, str):
        return False
    return init in ("pissa", "olora") or _NITER.fullmatch(init) is not None


def taken(weight: Tensor, r: int, init: str, scale: float) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] with s B A the part of W [out, in] that `init` means, in the dtype
    of sums; ValueError where W has no such part."""
    if r > min(weight.shape):
        raise ValueError(
            f"r: want at most {min(weight.shape)}, the rank of a weight {list(weight.shape)}, with "
            f"init={init!r}, got {r}"
        )
    w = wide(weight.detach())
    if init == "olora":
        q, rest = torch.linalg.qr(w)
        return rest[:r].contiguous(), q[:, :r].contiguous()
    if scale <= 0.0:
        raise ValueError(f"alpha: want a number > 0 with init={init!r}, got a scale of {scale}")
    steps = _NITER.fullmatch(init)
    if steps is None:
        left, values, right = torch.linalg.svd(w, full_matrices=False)
        left, values, right = left[:, :r], values[:r], right[:r]
    else:
        left, values, right = torch.svd_lowrank(w, q=r, niter=int(steps[1]))
        right = right.mT
    roots = (values / scale).sqrt()
    return (roots.unsqueeze(1) * right).contiguous(), (left * roots).contiguous()
