"""Mixtures of low-rank experts: PETAL's instruction experts, mixtures of adapters and of LoRA.

    InstructionExperts  e' = keep e + mix sum_j g_j (B_j (A_j e + a_j) + b_j)   on embeddings
    ExpertAdapter       h + s sum_j g_j (B_j act(A_j h + a_j) + b_j)            on a module's output
    ExpertLoRALinear    base(x) + alpha / r sum_j g_j B_j (A_j x)               on a linear

Gates g: "softmax" (a trained router, zero at first, so that step 0 is the mean; with `top_k` only
the largest), "mean", or "domain": the caller says by an integer for each token which expert serves
it (Context-PEFT: one for image tokens, one for text). Each forward is one operator call.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from petal_kernels._runtime import checks
from petal_kernels._runtime.autocast import autocast_off
from petal_kernels._runtime.numerics import ACTIVATIONS
from petal_kernels.nn.arguments import (
    check_choice,
    check_index,
    check_module,
    check_range,
    check_rows,
    check_size,
    check_storage,
    check_values,
)
from petal_kernels.nn.frozen_linear import check_input, compute_dtype
from petal_kernels.nn.gated_adapter import INIT_STD, Near
from petal_kernels.nn.routed_lora import linear_features
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


class InstructionExperts(LowRankExperts):
    """PETAL's experts on the embeddings of a Q-Former, [queries; instruction].

    tokens  "text": the learned queries pass by (the paper's figure); "all" (the released code)
    keep, mix  0.6 and 0.4; at step 0 the embedding is then about 0.6 e
    init    "normal": weights N(0, 0.02^2), biases zero, as released; "identity": up-projections
            zero and keep = 1, so that step 0 changes nothing
    gate    the paper's figure shows a trained gate without a formula: "softmax" of a router is our
            reading of it, "mean" the released code
    """

    def __init__(
        self,
        features: int,
        experts: int = 6,
        r: int = 64,
        *,
        gate: str = "softmax",
        top_k: int | None = None,
        router_input: str = "token",
        router_noise: float = 0.0,
        tokens: str = "text",
        keep: float | None = None,
        mix: float = 0.4,
        init: str = "normal",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_choice("gate", gate, GATES[:2])
        check_size("features", features)
        super().__init__(
            features,
            features,
            experts,
            r,
            gate=gate,
            top_k=top_k,
            router_input=router_input,
            router_noise=router_noise,
            device=device,
            dtype=dtype,
        )
        check_choice("tokens", tokens, TOKENS)
        check_choice("init", init, ("normal", "identity"))
        if keep is not None:
            checks.check_number("keep", keep)
        if init == "identity" and keep not in (None, 1.0):
            raise ValueError(f"keep: want 1.0 with init='identity', got {keep}")
        default = 0.6 if init == "normal" else 1.0
        self.tokens, self.init = tokens, init
        self.keep = default if keep is None else checks.check_number("keep", keep)
        self.mix = checks.check_number("mix", mix)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            parameter.zero_()
        self.down.normal_(0.0, INIT_STD)
        if self.init == "normal":
            self.up.normal_(0.0, INIT_STD)

    def forward(
        self, embeddings: Tensor, queries: int = 0, mask: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """The enhanced embeddings [B, T, features], and the routing of the tokens that were served.

        queries  how many leading tokens are learned queries (left alone with tokens="text")
        mask     [B, T], nonzero where a token counts for a pooled router
        """
        check_rows("embeddings", embeddings, self.in_features, lead=("B", "T"))
        check_index("queries", queries, embeddings.shape[1] + 1)
        if mask is not None:
            checks.check_mask("mask", mask, tuple(embeddings.shape[:-1]))
        first = queries if self.tokens == "text" else 0
        served = embeddings[:, first:] if first else embeddings
        out, routing = self.combine(
            served,
            base="input",
            keep=self.keep,
            mix=self.mix,
            mask=None if mask is None else mask[:, first:],
            training=self.training,
        )
        if first:
            out = torch.cat((embeddings[:, :first].to(out.dtype), out), dim=1)
        return out, routing

    def extra_repr(self) -> str:
        tail = f"tokens={self.tokens!r}, keep={self.keep}, mix={self.mix}"
        return f"{super().extra_repr()}, {tail}"


class ExpertAdapter(LowRankExperts):
    """A mixture of bottleneck adapters on a module's output; up-projections are zero at first."""

    def __init__(
        self,
        features: int,
        experts: int,
        r: int,
        *,
        gate: str = "softmax",
        top_k: int | None = None,
        router_input: str = "token",
        router_noise: float = 0.0,
        activation: str = "gelu_tanh",
        shared_down: bool = False,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_size("features", features)
        checks.check_number("scale", scale)
        super().__init__(
            features,
            features,
            experts,
            r,
            gate=gate,
            top_k=top_k,
            router_input=router_input,
            router_noise=router_noise,
            activation=activation,
            shared_down=shared_down,
            device=device,
            dtype=dtype,
        )
        self.scale = float(scale)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            parameter.zero_()
        bound = 1.0 / math.sqrt(self.in_features)
        self.down.uniform_(-bound, bound)

    def forward(
        self, h: Tensor, *, mask: Tensor | None = None, domain: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """The adapted h [..., features], and its routing.

        mask    [B, L], nonzero where a token counts for a pooled router
        domain  integers [..., tokens] or [B], the expert of each token or sample (gate="domain")
        """
        self._check(h, None, mask, domain, "h")
        return self.combine(
            h,
            base="input",
            keep=1.0,
            mix=self.scale,
            mask=mask,
            domain=domain,
            training=self.training,
        )


class ExpertLoRALinear(LowRankExperts):
    """A frozen linear and a mixture of low-rank updates of it; up-projections are zero at first.

    base    anything called like a linear, with `in_features` and `out_features` (or Conv1D's
            `nx`, `nf`); a child unless `own_base` is False
    alpha   the update is scaled by alpha / r (default alpha = r)
    device  of the update; that of the base by default
    """

    base: nn.Module

    def __init__(
        self,
        base: nn.Module,
        experts: int,
        r: int,
        *,
        gate: str = "softmax",
        top_k: int | None = None,
        router_input: str = "token",
        router_noise: float = 0.0,
        shared_down: bool = False,
        alpha: float | None = None,
        own_base: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        in_features, out_features = linear_features(check_module("base", base))
        checks.check_bool("own_base", own_base)
        if alpha is not None:
            checks.check_number("alpha", alpha)
        super().__init__(
            in_features,
            out_features,
            experts,
            r,
            gate=gate,
            top_k=top_k,
            router_input=router_input,
            router_noise=router_noise,
            shared_down=shared_down,
            bias=False,
            device=next((p.device for p in base.parameters()), None) if device is None else device,
            dtype=dtype,
        )
        if own_base:
            self.base = base
        else:
            self.__dict__["base"] = base
        self.scale = 1.0 if alpha is None else float(alpha) / r
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = 1.0 / math.sqrt(self.in_features)
        self.down.uniform_(-bound, bound)
        self.up.zero_()
        if self.router is not None:
            self.router.zero_()

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, domain: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """base(x) updated [..., out_features], and its routing; arguments as ExpertAdapter's."""
        return self.adapted(self.base, x, mask=mask, domain=domain)

    def adapted(
        self,
        base: nn.Module,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        domain: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """The same on top of `base`."""
        check_module("base", base)
        self._check(x, None, mask, domain)
        check_values("x", x, self.down)
        check_input(x, base)
        return self.combine(
            x,
            base=base(x),
            keep=1.0,
            mix=self.scale,
            mask=mask,
            domain=domain,
            training=self.training,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}"
