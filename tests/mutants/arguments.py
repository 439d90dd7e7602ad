"""Faults in what an argument does, in whose storage a gradient lies, and in what is refused."""

TESTS = [
    "tests/ops/test_scalars.py",
    "tests/ops/test_views.py",
    "tests/ops/test_gradients.py",
    "tests/runtime/test_first_order.py",
    "tests/nn/test_arguments.py",
    "tests/nn/test_experts.py",
]

_FIRST = "petal_kernels/_runtime/first_order.py"
_CONTRACT = "petal_kernels/ops/mode_contract/torch_impl.py"
_CONTRACT_OP = "petal_kernels/ops/mode_contract/op.py"
_CONTRACT_TRITON = "petal_kernels/ops/mode_contract/triton_impl.py"
_CONTRACT_KERNELS = "petal_kernels/ops/mode_contract/triton_kernels.py"
_LINEAR = "petal_kernels/ops/lowrank_linear/torch_impl.py"
_LINEAR_OP = "petal_kernels/ops/lowrank_linear/op.py"
_LINEAR_FUNCTION = "petal_kernels/ops/lowrank_linear/function.py"
_GATED = "petal_kernels/ops/gated_bottleneck/torch_impl.py"
_GATED_OP = "petal_kernels/ops/gated_bottleneck/op.py"
_GATED_FUNCTION = "petal_kernels/ops/gated_bottleneck/function.py"
_GATED_SETTINGS = "petal_kernels/ops/gated_bottleneck/settings.py"
_EXPERTS = "petal_kernels/ops/expert_dispatch/torch_impl.py"
_EXPERTS_OP = "petal_kernels/ops/expert_dispatch/op.py"
_EXPERTS_SETTINGS = "petal_kernels/ops/expert_dispatch/settings.py"
_ADAPTER = "petal_kernels/nn/gated_adapter.py"
_LORA = "petal_kernels/nn/routed_lora.py"
_VALUE = "petal_kernels/nn/value_adapter.py"
_MODES = "petal_kernels/nn/mode_approximation.py"
_MIXTURE = "petal_kernels/nn/low_rank_experts.py"
_MIXTURES = "petal_kernels/nn/experts.py"
_INFORMATION = "petal_kernels/nn/mutual_information.py"

MUTANTS = [
    # A scalar lost in a gradient.
    (_CONTRACT, "diagonal = scale * (", "diagonal = (scale if up is not None else 1.0) * ("),
    (_CONTRACT, "dm = (scale * (flat if up is None", "dm = (1.0 * (flat if up is None"),
    (_CONTRACT, "dup = scale * torch.einsum", "dup = torch.einsum"),
    (_CONTRACT, "dup = scale * (flat.t()", "dup = (flat.t()"),
    (_CONTRACT, "return (out * scale).to(dtype)", "return out.to(dtype)"),
    (_CONTRACT, "d = dout.to(c.dtype)", "d = wide(dout)"),
    (_CONTRACT_TRITON, "_sum(part, dup, scale)", "_sum(part, dup, 1.0)"),
    (_LINEAR, "(dy.t() @ m).mul_(scale)", "(dy.t() @ m)"),
    (_LINEAR, "(dy @ up.to(dtype)).mul_(scale) for", "(dy @ up.to(dtype)) for"),
    (_LINEAR, "outputs.append((m * scale) @ p.t())", "outputs.append(m @ p.t())"),
    (_GATED, "dv = du if s.scale == 1.0 else du * s.scale", "dv = du"),
    (_GATED, "w, b, s.norm_eps)", "w, b, 1e-5)"),
    (_GATED, "    if mask is not None:\n        dv = dv * mask\n", ""),
    (_GATED_SETTINGS, "s.norm_eps]", "1e-5]"),
    (_GATED_SETTINGS, "[s.scale,", "[abs(s.scale),"),
    (
        _EXPERTS,
        "tt = (dout @ _flat_up(call, dtype)).view(n, experts, r).mul_(s.mix)",
        "tt = (dout @ _flat_up(call, dtype)).view(n, experts, r)",
    ),
    (_EXPERTS, "dgates = dgates + s.mix * wide(", "dgates = dgates + wide("),
    (_EXPERTS, "(ga.t() @ dout).mul_(s.mix)", "(ga.t() @ dout)"),
    (_EXPERTS, "dy = dout.index_select(0, rows).mul_(s.mix)", "dy = dout.index_select(0, rows)"),
    (
        _EXPERTS,
        "dx = s.keep * dout if s.add_input else dout.new_zeros(n,",
        "dx = dout.clone() if s.add_input else dout.new_zeros(n,",
    ),
    (
        _CONTRACT_KERNELS,
        "t = tl.load(dout_ptr + rows + offs_a, mask=mask_a, other=0.0).to(tl.float32) * scale",
        "t = tl.load(dout_ptr + rows + offs_a, mask=mask_a, other=0.0).to(tl.float32)",
    ),
    (_CONTRACT_KERNELS, "dm *= scale", "dm *= 1.0"),
    (_EXPERTS_SETTINGS, "[s.keep,", "[abs(s.keep),"),
    # An argument lost on its way.
    (_GATED_OP, "float(given.norm_eps)", "1e-5"),
    (_GATED_OP, "float(given.scale)", "abs(float(given.scale))"),
    (_EXPERTS_OP, "float(given.keep)", "abs(float(given.keep))"),
    (_EXPERTS_OP, "given.renormalize,\n        length", "True,\n        length"),
    (_ADAPTER, "norm_eps=1e-5 if norm is None else norm.eps,", "norm_eps=1e-5,"),
    (_ADAPTER, "scale=self.scale,\n                dropout", "scale=1.0,\n                dropout"),
    (
        _ADAPTER,
        "activation=self.activation,\n                gate",
        'activation="gelu_tanh",\n                gate',
    ),
    (_ADAPTER, '"base": "input" if self.add_input else None', '"base": "input"'),
    (
        _ADAPTER,
        "variant=self.variant,\n                training",
        'variant="paper",\n                training',
    ),
    (
        _ADAPTER,
        "training=self.training if training is None else training",
        "training=self.training",
    ),
    (_ADAPTER, "                dropout=dropout,\n", ""),
    (_ADAPTER, "mask=mask,\n                scale", "mask=None,\n                scale"),
    (_ADAPTER, "features, rank, activation=activation, init", "features, rank, init"),
    (
        _ADAPTER,
        "            add_input=add_input,\n            variant=variant,\n            device",
        "            variant=variant,\n            device",
    ),
    (_LORA, "up if self.scale == 1.0 else up * self.scale", "up"),
    (_LORA, "variant=self.variant,\n                    update_at", "update_at"),
    (_LORA, "F.dropout(x.to(dtype), self.dropout, self.training)", "x.to(dtype)"),
    (
        _VALUE,
        "activation=self.activation,\n            )",
        'activation="gelu_tanh",\n            )',
    ),
    (_MODES, "scale=self.scale, dtype=dtype", "dtype=dtype"),
    (_MODES, "dropout=self.dropout,\n            training", "dropout=0.0,\n            training"),
    (_MIXTURE, '"top_k": self.top_k,', '"top_k": None,'),
    (_MIXTURE, '"mask": mask if self.router_input == "pooled" else None', '"mask": None'),
    (_MIXTURE, "self.router_noise * noise.to(wide)", "noise.to(wide)"),
    (
        _MIXTURE,
        "                keep=keep,\n                mix=mix,\n                act",
        "                mix=mix,\n                act",
    ),
    (_MIXTURE, "activation=self.activation,\n                return_routing", "return_routing"),
    (_MIXTURES, "float(alpha) / r\n        self.reset", "float(alpha)\n        self.reset"),
    (_INFORMATION, "objective - self.beta * self.mine", "objective - 0.1 * self.mine"),
    # A view read as if it were dense.
    (
        _GATED_OP,
        "if given.rng is None else given.rng.contiguous()",
        "if given.rng is None else given.rng",
    ),
    (_LINEAR_OP, "if rng is None else rng.contiguous()", "if rng is None else rng"),
    (_GATED_OP, ".clamp_min(1)).reshape(-1)", ".clamp_min(1)).view(-1)"),
    # Storage that is somebody else's.
    (_FIRST, "    return dout.clone()", "    return dout"),
    (
        _GATED_FUNCTION,
        'passed["base"] = own(dout)',
        'passed["base"] = passed.get("residual", dout)',
    ),
    (_GATED_FUNCTION, "return (own(dout, ctx, 0), *[None]", "return (dout, *[None]"),
    (
        "petal_kernels/_runtime/first_order.py",
        "return dout if _is_consumed(",
        "return dout if bool(",
    ),
    (
        "petal_kernels/_runtime/first_order.py",
        "return dout if _is_consumed(",
        "return dout if not (",
    ),
    (
        "petal_kernels/_runtime/first_order.py",
        'node.name() != "AddmmBackward0" or node.next_functions[0][0] is None',
        "True",
    ),
    (
        "petal_kernels/nn/routed_lora.py",
        "torch.ops.aten._unsafe_view(rows, (*x.shape[:-1], rows.shape[-1]))",
        "rows.view(*x.shape[:-1], rows.shape[-1])",
    ),
    (_GATED_FUNCTION, "passes_on = True", "passes_on = False"),
    (_LINEAR_FUNCTION, "own(dy, ctx, k - counts.ups) if want", "dy if want"),
    (_GATED, "value.clone() if shared else value", "value"),
    # A derivative that is not there.
    (_FIRST, "        found.append(leaf)\n", ""),
    (_FIRST, "kept = (*grads, *ctx.saved_tensors)", "kept = tuple(grads)"),
    (
        _FIRST,
        "            return None\n        found.append",
        "            continue\n        found.append",
    ),
    (_FIRST, "if grad is not None and _batched(grad):", "if False:"),
    (_FIRST, "functorch.is_legacy_batchedtensor(t) or", ""),
    (_FIRST, "        if functorch:\n            refuse", "        if False:\n            refuse"),
    (_FIRST, "if not functorch and forward_ad", "if False and forward_ad"),
    (_GATED_OP, "    check_transforms(NAME, given)\n", ""),
    (_EXPERTS_OP, "    check_transforms(NAME, given)\n", ""),
    (_CONTRACT_OP, "    check_transforms(_NAME, given)\n", ""),
    (
        _LINEAR_OP,
        "    check_transforms(NAME, given)\n",
        "",
    ),
]
