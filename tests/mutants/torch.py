"""Faults in the algebra shared by every backend: the torch backend, the autograd functions, the
generator."""

TESTS = [
    "tests/ops/test_ops.py",
    "tests/ops/test_contract.py",
    "tests/ops/test_writes.py",
    "tests/runtime/test_philox.py",
    "tests/ops/gated_bottleneck/test_op.py",
    "tests/ops/gated_mlp/test_op.py",
    "tests/ops/frozen_norm/test_op.py",
    "tests/ops/expert_dispatch/test_op.py",
    "tests/nn/test_experts.py",
    "tests/nn/test_mutual_information.py",
    "-k",
    "(torch or reference or gradcheck or masks or lanes or scale or saved or test_gated "
    "or test_expert or mutual) "
    "and not inductor and not triton and not native",
]

_LINEAR = "petal_kernels/ops/lowrank_linear/torch_impl.py"
_LINEAR_FUNCTION = "petal_kernels/ops/lowrank_linear/function.py"
_GATED = "petal_kernels/ops/gated_bottleneck/torch_impl.py"
_GATED_OP = "petal_kernels/ops/gated_bottleneck/op.py"
_GATED_FUNCTION = "petal_kernels/ops/gated_bottleneck/function.py"
_MLP = "petal_kernels/ops/gated_mlp/torch_impl.py"
_MLP_FUNCTION = "petal_kernels/ops/gated_mlp/function.py"
_MLP_PRODUCTS = "petal_kernels/ops/gated_mlp/products.py"
_NORM = "petal_kernels/ops/frozen_norm/torch_impl.py"
_NORM_REFERENCE = "petal_kernels/ops/frozen_norm/reference.py"
_EXPERTS = "petal_kernels/ops/expert_dispatch/torch_impl.py"
_EXPERTS_OP = "petal_kernels/ops/expert_dispatch/op.py"
_EXPERTS_FUNCTION = "petal_kernels/ops/expert_dispatch/function.py"
_ROUTING = "petal_kernels/ops/expert_dispatch/routing.py"
_INFORMATION = "petal_kernels/nn/mutual_information.py"
_CONTRACT = "petal_kernels/ops/mode_contract/torch_impl.py"

MUTANTS = [
    # frozen_norm: the mean, the second rounding, 1 + w, what a gradient is made of
    (_NORM, "rows = rows if mean is None else rows - mean", "rows = rows"),
    (_NORM, "    if call.rounded:\n        y = y.to(x.dtype)\n", ""),
    (_NORM, "weight.to(y.dtype) + call.offset if call.offset else ", ""),
    (_NORM, "(rows.pow(2).mean(-1, keepdim=True) + eps)", "(rows.pow(2).mean(-1, keepdim=True))"),
    (_NORM, "g = g * (wide(call.weight) + call.offset)", "g = g * wide(call.weight)"),
    (_NORM, "    if call.centered:\n        dx -= g.mean(-1, keepdim=True)\n", ""),
    (_NORM, "xhat * (g * xhat).mean(-1", "xhat * g.mean(-1"),
    (_NORM, "dx.mul_(rho)", "dx"),
    (_NORM_REFERENCE, '    if kind == "layer":\n        dx = dx - g.mean(-1, keepdim=True)\n', ""),
    (
        _LINEAR,
        "(dy.t() @ m).mul_(scale).to(up.dtype)",
        "(dy.t() @ m).mul_(1.0).to(up.dtype)",
    ),
    (_LINEAR, "(dy @ up.to(dtype)).mul_(scale) for", "(dy @ up.to(dtype)) for"),
    (_LINEAR, "g = [gk.mul_(mask)", "g = [gk"),
    (_LINEAR, "g = [gk @ c.to(dtype).t()", "g = [gk @ c.to(dtype)"),
    (_LINEAR, "total = total.add_(gk)", "total = gk"),
    (_LINEAR, "zip(g, _inputs(call, t.x, rng), t.downs", "zip(g, [t.x] * len(t.downs), t.downs"),
    (_LINEAR, "dx = dy @ w if dx is None else dx.addmm_(dy, w)", "dx = dy @ w"),
    (
        _LINEAR,
        "torch.addmm(t.base[k], m, p.t(), alpha=scale)",
        "torch.addmm(t.base[0], m, p.t(), alpha=scale)",
    ),
    (
        _CONTRACT,
        "(modes @ core.reshape(rank * rank, rank).t())",
        "(modes @ core.reshape(rank, rank * rank))",
    ),
    (_CONTRACT, "dmodes = diagonal * c if", "dmodes = diagonal * p if"),
    (
        "petal_kernels/_runtime/philox.py",
        "return LEVELS / (LEVELS - threshold(p))",
        "return LEVELS / (LEVELS - threshold(p) + 64)",
    ),
    (
        "petal_kernels/_runtime/philox.py",
        "p1 & _MASK32,\n        ((p0",
        "p0 & _MASK32,\n        ((p0",
    ),
    (
        "petal_kernels/ops/lowrank_linear/function.py",
        "own(dy, ctx, k - counts.ups) if want",
        "own(dys[0], ctx, k - counts.ups) if want",
    ),
    (_GATED, "* (1 - m.gate)).to(dtype))", "* m.gate).to(dtype))"),
    (_GATED, "        dz = (d * t.left).view_as(z)\n", "        dz = d.reshape_as(z)\n"),
    (_GATED, "dz = torch.ops.aten.threshold_backward(dz, z, 0)", "pass"),
    (_GATED, "    if mask is not None:\n        dv = dv * mask\n", ""),
    (_GATED, "logit_h = m.y if s.gate_sees_output else t.x", "logit_h = t.x"),
    (_GATED, "both = dwx + dwh if s.gate", "both = dwx if s.gate"),
    (
        _GATED,
        "return dh, dh if s.gate_sees_output else dy, through_gate",
        "return dh, dh, through_gate",
    ),
    (_GATED, "share = 1.0 / length", "share = 1.0"),
    (_GATED, "dv = du if s.scale == 1.0 else du * s.scale", "dv = du"),
    (_GATED, "return mean.expand_as(per_token)", "return per_token"),
    (_GATED_FUNCTION, "or (s.add_gate_input and norm)", "or False"),
    (_GATED_FUNCTION, "columns = flat[:, ctx.first", "columns = flat[:, 0 * ctx.first"),
    (_GATED_OP, "rank * (length + tokens) < 2 * length * tokens", "tokens < 0"),
    (_GATED_OP, "kept.sum(-1, keepdim=True).clamp_min(1)", "kept.shape[-1]"),
    (
        _GATED_FUNCTION,
        'passed["residual"] = own(dout)',
        'passed["residual"] = 2 * dout',
    ),
    (_MLP, "scaled_mask(of.rng, of.dropout, 0,", "scaled_mask(of.rng, of.dropout, 1,"),
    (_MLP, "        dp.mul_(u)\n", ""),
    (_MLP, "_down(a if u is None else a * u, product)", "_down(a, product)"),
    (_MLP_FUNCTION, "            drop = drop.after(last)\n", "            drop = drop.after(1)\n"),
    (_MLP_FUNCTION, "else drop.after(last)\n", "else drop.after(1)\n"),
    (_MLP_FUNCTION, "dbiases[last] = dy.sum(0)", "dbiases[last] = dy[0].clone()"),
    # A gradient that stays in a copy of dp.
    (_MLP_FUNCTION, "dp.copy_(rows.view(dp.shape))", "pass"),
    # x kept where nothing reads it.
    (_MLP_FUNCTION, "t.x if reads_x else None", "t.x"),
    # The update of `up` alone draws the gate's mask.
    (_MLP_PRODUCTS, "mine, drop.after(updated[0]), save", "mine, drop, save"),
    (_MLP_PRODUCTS, "h[:, at : at + place.up.shape[1]]", "h[:, : place.up.shape[1]]"),
    (
        _MLP_PRODUCTS,
        "dx = dy @ place.weight if dx is None else dx.addmm_(dy, place.weight)",
        "dx = dy @ place.weight",
    ),
    (_ROUTING, "descending=True, stable=True", "descending=False, stable=True"),
    (_ROUTING, "return g * (dgates - inner)", "return g * dgates"),
    (_ROUTING, "offsets[1:] = chosen.sum(0).cumsum(0)", "offsets[1:] = chosen.sum(0)"),
    (_ROUTING, "experts * (self.usage() * p).sum()", "(self.usage() * p).sum()"),
    (_EXPERTS, "dl if dlogits is None else dl + dlogits", "dl"),
    (
        _EXPERTS,
        "dgates.view(-1, s.tokens_per_gate, call.experts).sum(1)",
        "dgates[: t.gates.shape[0]]",
    ),
    (_EXPERTS, 'grads["down"][own] += dz.t()', 'grads["down"][own] = dz.t()'),
    (_EXPERTS, "index_add_(0, rows, dz @ t.down[own]", "index_copy_(0, rows, dz @ t.down[own]"),
    (_EXPERTS, "dz = dz.sum(1) if call.shared_down else", "dz = dz[:, 0] if call.shared_down else"),
    (_EXPERTS_OP, "length = x.shape[1] if shared else 1", "length = 1"),
    (_EXPERTS_FUNCTION, '{"base": s.keep * dout}', '{"base": dout}'),
    (_EXPERTS_FUNCTION, "dx = into / ctx.shape[1] if kept", "dx = into if kept"),
    (
        _INFORMATION,
        "torch.cat((answers.weights, -other.weights)",
        "torch.cat((answers.weights, other.weights)",
    ),
    (_INFORMATION, "(2 * mean - own)", "(2 * mean + own)"),
    (_INFORMATION, "torch.logsumexp(marginal.squeeze(1), 0)\n", "marginal.mean()\n"),
    (_LINEAR_FUNCTION, "result_of(y, (*lead, y.shape[1]))", "y.view(*lead, y.shape[1])"),
    (_MLP_FUNCTION, "result_of(y, (*t.x.shape[:-1], y.shape[-1]))", "y.view(*t.x.shape[:-1], -1)"),
]
