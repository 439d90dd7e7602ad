"""The weights of a mixture of low-rank experts, and the one operator call that all modules of
`experts` make of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from petal_kernels._runtime import checks
from petal_kernels._runtime.autocast import autocast_off
from petal_kernels._runtime.numerics import ACTIVATIONS
from petal_kernels.nn.arguments import (
    check_choice,
    check_range,
    check_rows,
    check_size,
    check_storage,
)
from petal_kernels.nn.frozen_linear import compute_dtype
from petal_kernels.nn.gated_adapter import Near
from petal_kernels.ops.expert_dispatch import expert_dispatch
from petal_kernels.ops.expert_dispatch.routing import Routing

GATES = ("softmax", "mean", "domain")
ROUTER_INPUTS = ("token", "pooled")
TOKENS = ("text", "all")


class LowRankExperts(nn.Module):
    """The weights of E experts of rank r and their router, kept in `dtype` (float32 by default).

    shared_down   one down-projection for all experts
    top_k         softmax: how many experts serve a token (default all)
    router_input  "token", or "pooled": one choice for all tokens of a sample
    router_noise  standard deviation of the noise on the logits while training
    bias          whether the projections have biases
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        experts: int,
        r: int,
        *,
        gate: str = "softmax",
        top_k: int | None = None,
        router_input: str = "token",
        router_noise: float = 0.0,
        activation: str = "identity",
        shared_down: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.in_features = check_size("in_features", in_features)
        self.out_features = check_size("out_features", out_features)
        self.experts, self.r = check_size("experts", experts), check_size("r", r)
        check_choice("gate", gate, GATES)
        check_choice("router_input", router_input, ROUTER_INPUTS)
        check_choice("activation", activation, ACTIVATIONS)
        if top_k is not None and gate != "softmax":
            raise ValueError(f"top_k: want None with gate={gate!r}, got {top_k}")
        if top_k is not None and check_size("top_k", top_k) > experts:
            raise ValueError(f"top_k: want 1 <= top_k <= {experts} experts, got {top_k}")
        checks.check_bool("shared_down", shared_down)
        checks.check_bool("bias", bias)
        check_storage(device, dtype)
        if checks.check_number("router_noise", router_noise) < 0.0:
            raise ValueError(f"router_noise: want a finite number >= 0, got {router_noise}")
        for name, value, default in (
            ("router_input", router_input, "token"),
            ("router_noise", router_noise, 0.0),
        ):
            if gate != "softmax" and value != default:
                raise ValueError(f"{name}: want {default!r} with gate={gate!r}, got {value!r}")
        self.gate, self.top_k, self.router_input = gate, top_k, router_input
        self.router_noise, self.activation = float(router_noise), activation
        self.shared_down = shared_down

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        downs = 1 if shared_down else experts
        self.down, self.up = parameter(downs, r, in_features), parameter(experts, out_features, r)
        self.down_bias = parameter(downs, r) if bias else None
        self.up_bias = parameter(experts, out_features) if bias else None
        self.router = parameter(experts, in_features) if gate == "softmax" else None

    def combine(
        self,
        x: Tensor,
        *,
        base: Tensor | str | None,
        keep: float,
        mix: float,
        mask: Tensor | None = None,
        domain: Tensor | None = None,
        training: bool,
    ) -> tuple[Tensor, Routing]:
        """keep * base + mix * the experts' weighted sum, and how it was routed."""
        self._check(x, base, mask, domain)
        checks.check_number("keep", keep)
        checks.check_number("mix", mix)
        checks.check_bool("training", training)
        dtype = compute_dtype(x)
        near = Near(dtype, x.device)
        routed: dict[str, Any] = {"gate": self.gate}
        if self.gate == "softmax":
            lead = x.shape[:1] if self.router_input == "pooled" else x.shape[:-1]
            noise = None
            if training and self.router_noise:
                noise = torch.randn(*lead, self.experts, device=x.device)
                wide = torch.float64 if dtype == torch.float64 else torch.float32
                noise = self.router_noise * noise.to(wide)
            routed |= {
                "router": near.optional(self.router),
                "noise": noise,
                "top_k": self.top_k,
                "router_input": self.router_input,
                "mask": mask if self.router_input == "pooled" else None,
            }
        elif self.gate == "domain":
            assert domain is not None
            routed = {"gate": "given", "indices": domain.unsqueeze(-1)}
        with autocast_off(x):
            out = expert_dispatch(
                near(x),
                near.parameter(self.down),
                near.parameter(self.up),
                near.optional(self.down_bias),
                near.optional(self.up_bias),
                base=near(base) if isinstance(base, Tensor) else base,
                keep=keep,
                mix=mix,
                activation=self.activation,
                return_routing=True,
                **routed,
            )
        assert isinstance(out, tuple)
        return out

    def _check(self, x: Any, base: Any, mask: Any, domain: Any, name: str = "x") -> None:
        check_rows(name, x, self.in_features)
        pooled = self.router_input == "pooled"
        if pooled and x.dim() != 3:
            raise ValueError(f"{name}: want shape [B, L, {self.in_features}], got {list(x.shape)}")
        if isinstance(base, str):
            check_choice("base", base, ("input",))
        elif base is not None:
            check_rows("base", base, self.out_features, like=x)
        if mask is not None:
            shape = checks.check_tensor("mask", mask).shape
            checks.check_mask("mask", mask, tuple(x.shape[:-1]) if pooled else shape)
        if self.gate != "domain":
            if domain is not None:
                got = type(domain).__name__
                raise ValueError(f"domain: want None with gate={self.gate!r}, got a {got}")
            return
        if domain is None:
            raise TypeError(
                "domain: want an integer Tensor [..., tokens] with gate='domain', got None"
            )
        checks.check_tensor("domain", domain)
        checks.check_dtype("domain", domain, (torch.int64, torch.int32))
        if domain.shape not in (x.shape[:-1], *((x.shape[:1],) if x.dim() == 3 else ())):
            want = list(x.shape[:-1])
            raise ValueError(f"domain: want shape {want} or [B], got {list(domain.shape)}")
        checks.check_device("domain", domain, x.device)
        check_range("domain", domain, 0, self.experts - 1)

    def extra_repr(self) -> str:
        shape = f"{self.in_features} -> {self.out_features}"
        parts = [f"{shape}, experts={self.experts}, r={self.r}, gate={self.gate!r}"]
        parts += [f"top_k={self.top_k}"] if self.top_k is not None else []
        parts += ["router_input='pooled'"] if self.router_input == "pooled" else []
        parts += [f"router_noise={self.router_noise}"] if self.router_noise else []
        parts += [f"activation={self.activation!r}"] if self.activation != "identity" else []
        parts += ["shared_down=True"] if self.shared_down else []
        return ", ".join(parts)
