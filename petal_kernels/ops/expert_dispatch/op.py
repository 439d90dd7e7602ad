"""``expert_dispatch``: what users call, and how their arguments become one ``Call``."""

from __future__ import annotations

import torch
from torch import Tensor

from petal_kernels._runtime import backends as rt
from petal_kernels._runtime.first_order import check_transforms
from petal_kernels._runtime.numerics import wide_dtype
from petal_kernels._runtime.rows import flat_rows
from petal_kernels.ops.expert_dispatch import planner, routing
from petal_kernels.ops.expert_dispatch.arguments import Call, Given, Settings, Tensors, check
from petal_kernels.ops.expert_dispatch.function import BACKENDS as BACKENDS
from petal_kernels.ops.expert_dispatch.function import (
    NAME,
    ExpertDispatchFunction,
    PooledLogitsFunction,
    choice_op,
    explanation,
    forward_op,
)


def expert_dispatch(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    base: Tensor | str | None = "input",
    keep: float = 1.0,
    mix: float = 1.0,
    activation: str = "identity",
    gate: str = "softmax",
    router: Tensor | None = None,
    router_bias: Tensor | None = None,
    noise: Tensor | None = None,
    top_k: int | None = None,
    renormalize: bool = True,
    router_input: str = "token",
    mask: Tensor | None = None,
    gates: Tensor | None = None,
    indices: Tensor | None = None,
    return_routing: bool = False,
    plan: str = "auto",
    backend: str | None = None,
) -> Tensor | tuple[Tensor, routing.Routing]:
    """A mixture of low-rank experts, each token's or each sample's own.

    ``out = keep * H + mix * sum_e g_e * (act(x down_e^T + down_bias_e) up_e^T + up_bias_e)`` with
    H = ``base`` and g by ``gate``; ``reference.py`` writes out every gate.

    Dims: B samples, L tokens, D input width, E experts, r rank of each, O output width.

    Args:
        x: ``[..., D]``; ``[B, L, D]`` where a sample's tokens share their gates.
        down: ``[E, r, D]``, or ``[1, r, D]``: one down-projection for all experts.
        up, down_bias, up_bias: ``[E, O, r]``, ``[E or 1, r]``, ``[E, O]``.
        base: H: ``"input"`` (x itself, O = D), ``[..., O]`` (a frozen linear's output), or None.
        keep, mix: of the base, and of the sum over experts (alpha / r for LoRA); finite.
        activation: "identity", "relu", "gelu" (erf), "gelu_tanh" (gelu_new) or "silu".
        gate: "mean" (1 / E each), "softmax" (of the router's logits) or "given".
        router, router_bias, noise: softmax: ``[E, D]``, ``[E]``, and ``[..., E]`` added to the
            logits. A router of zeros makes step 0 the mean (with ``top_k``, the first experts').
        top_k: softmax over the logits: only the k largest of each token (sample, if pooled); of
            equal ones the first experts.
        renormalize: with top_k, the softmax is over the chosen alone, so that their gates sum to 1.
        router_input: "token", or "pooled": the logits of the mean over a sample's tokens, one
            choice per instruction.
        mask: pooled: ``[B, L]``, nonzero where a token counts; default all.
        gates: given: ``[..., E]`` or ``[B, E]``, any numbers; with ``indices`` their shape, default
            ones.
        indices: given: integers ``[..., k]`` or ``[B, k]``, the experts of a token or sample;
            weights of one that is named twice add up. On a CPU an index outside 0 .. E - 1 raises;
            on a GPU that would cost a host synchronisation, and it is ignored.
        return_routing: return ``(out, Routing)``: logits, choice, losses, usage.
        plan: "stationary", "sorted", or "auto" by shape (``planner.py``).
        backend: a backend's name; default ``use_backend``'s, ``PETAL_BACKEND``'s or the first that
            can run.

    Returns:
        ``[..., O]`` in x's dtype, or with the ``Routing``.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name. x and base share one dtype;
            parameters have the same or float32, and get their gradients in their own.
        RuntimeError: a named backend that cannot run here, with its reasons.

    Differentiable once, also in the logits of the ``Routing``. Saved for backward: x where a
    projection of it is trained, z (N E r values, or N k r sorted), the logits and the choice.
    Deterministic: of equal inputs, the same bits. Source: see ``reference.py``.
    """
    given = Given(**locals())
    check_transforms(NAME, given)
    call, name, lead, pooled = prepare(given)
    grads = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in call.tensors)
    if grads:
        out, logits, chosen = ExpertDispatchFunction.apply(name, *call.settings, *call.tensors)
    else:
        found = forward_op(list(call.tensors), *call.settings, False, name)
        out, _, logits, chosen = found[:4]
    out = out.view(*lead, out.shape[-1])
    if not return_routing:
        return out  # type: ignore[no-any-return]
    if pooled is not None:
        return out, pooled
    experts = up.shape[0]
    return out, routing.Routing(
        logits.view(*lead, experts) if call.routed else None,
        chosen.view(*lead, experts) if top_k is not None else None,
    )


def prepare(
    given: Given,
) -> tuple[Call, str, tuple[int, ...], routing.Routing | None]:
    """Check, flatten and reduce: the call, the backend's name, the leading dims, and the routing
    where it was settled before the call."""
    check(given)
    name, x, base, top_k = rt.name_of(given.backend), given.x, given.base, given.top_k
    experts, rank = given.up.shape[0], given.up.shape[2]
    gate, gates, indices = given.gate, given.gates, given.indices
    router, router_bias, noise = given.router, given.router_bias, given.noise
    chosen, settled, k = None, None, top_k or 0
    if given.router_input == "pooled":
        logits = PooledLogitsFunction.apply(x, router, router_bias, given.mask, noise)
        chosen = None if top_k is None else routing.choose(logits, top_k)
        gates = routing.gates(logits, chosen, given.renormalize)
        settled = routing.Routing(logits, chosen)
        gate, router, router_bias, noise = "given", None, None, None
    elif gate == "given" and indices is not None:
        k, chosen = indices.shape[-1], choice_op(indices, experts)
        hit = indices.unsqueeze(-1) == torch.arange(experts, device=x.device)
        hit = hit.to(wide_dtype(x.dtype) if gates is None else gates.dtype)
        gates = (hit if gates is None else gates.unsqueeze(-1) * hit).sum(-2)
    if gate == "given":
        settled = routing.Routing(None, chosen) if settled is None else settled
    elif top_k is not None:
        gate = "topk"
    shared = gates is not None and gates.dim() < x.dim()
    length = x.shape[1] if shared else 1
    plan = given.plan
    if plan == "auto":
        plan = planner.choose(x.device.type, experts, rank, k, length)
    settings = Settings(
        given.activation,
        gate,
        k,
        given.renormalize,
        length,
        isinstance(base, str),
        float(given.keep),
        float(given.mix),
        plan,
    )
    tensors = Tensors(
        flat_rows(x),
        given.down,
        given.down_bias,
        given.up,
        given.up_bias,
        flat_rows(base) if isinstance(base, Tensor) else None,
        router,
        router_bias,
        flat_rows(noise),
        flat_rows(gates),
        flat_rows(chosen),
    )
    assert tensors.x is not None
    return Call(tensors, settings, tensors.x), name, tuple(x.shape[:-1]), settled


def _explain(given: Given) -> rt.Explanation:
    call, name, _, _ = prepare(given)
    return explanation(call, name)


rt.register_explainer(expert_dispatch, Given, _explain)
