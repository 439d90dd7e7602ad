"""Faults that a share of the fuzzer must find within the calls that the suite makes.

Some lie in what the references share with the backends, where tests against a reference are blind.
"""

TESTS = ["tests/fuzz/test_fuzz.py"]

_LINEAR = "petal_kernels/ops/lowrank_linear/torch_impl.py"
_LINEAR_NATIVE = "petal_kernels/ops/lowrank_linear/native_impl.py"
_LINEAR_FUNCTION = "petal_kernels/ops/lowrank_linear/function.py"
_LINEAR_TRITON = "petal_kernels/ops/lowrank_linear/triton_kernels.py"
_CONTRACT = "petal_kernels/ops/mode_contract/torch_impl.py"
_GATED = "petal_kernels/ops/gated_bottleneck/torch_impl.py"
_GATED_OP = "petal_kernels/ops/gated_bottleneck/op.py"
_GATED_FUNCTION = "petal_kernels/ops/gated_bottleneck/function.py"
_GATED_NATIVE = "petal_kernels/ops/gated_bottleneck/native_impl.py"
_EXPERTS = "petal_kernels/ops/expert_dispatch/torch_impl.py"
_EXPERTS_FUNCTION = "petal_kernels/ops/expert_dispatch/function.py"
_ROUTING = "petal_kernels/ops/expert_dispatch/routing.py"
_NUMERICS = "petal_kernels/_runtime/numerics.py"
_PHILOX = "petal_kernels/_runtime/philox.py"

MUTANTS = [
    # an index
    (_LINEAR, "torch.addmm(t.base[k], m", "torch.addmm(t.base[0], m"),
    # a sign
    (_LINEAR, "total = total.add_(gk)", "total = total.sub_(gk)"),
    # a scale lost
    (_CONTRACT, "dup = scale * (flat.t()", "dup = (flat.t()"),
    (
        _EXPERTS,
        '"up_bias"] = _weighted_columns(g, dout).mul_(s.mix)',
        '"up_bias"] = _weighted_columns(g, dout)',
    ),
    # a mask from another stream, or of another definition
    (
        _LINEAR,
        "masks = philox.scaled_masks(rng, s",
        "masks = philox.scaled_masks(rng + 1, s",
    ),
    (_PHILOX, "_WEYL_1 = 0xBB67AE85", "_WEYL_1 = 0xBB67AE84"),
    (_PHILOX, "return LEVELS / (LEVELS - threshold(p))", "return 1 / (1 - p / 1.001)"),
    # gradients in one buffer
    (_LINEAR_FUNCTION, "own(dy, ctx, k - counts.ups) if want", "dy if want"),
    # a NaN hidden
    (_GATED, "    return u, Saved(None if t", "    return u.nan_to_num(), Saved(None if t"),
    (
        _EXPERTS,
        "return start.addmm_(a, up.t(), alpha=s.mix), z",
        "return start.addmm_(a, up.t(), alpha=s.mix).clamp_(-6e4, 6e4), z",
    ),
    # an input written
    (
        _EXPERTS,
        "return None if h is None else s.keep * h",
        "return None if h is None else h.mul_(s.keep)",
    ),
    # one wrong element in a ragged tail
    (
        _LINEAR_NATIVE,
        "    return ys, Saved(h)",
        "    ys[0][-1:, -1:] *= 1.03\n    return ys, Saved(h)",
    ),
    (
        _GATED_NATIVE,
        "    return out, saved\n",
        "    out[rows // 7 * 7 :, -1:] *= 1.05\n    return out, saved\n",
    ),
    # what depends on the number of calls
    (_CONTRACT, "dmodes = dm @ c", "dmodes = (1 + 1e-6 * torch.rand(())) * dm @ c"),
    # what references share with the backends
    (
        _NUMERICS,
        'approximate="tanh" if name == "gelu_tanh" else "none")\n    return z',
        'approximate="none")\n    return z',
    ),
    (_ROUTING, "    if renormalize:\n", "    if not renormalize:\n"),
    (_ROUTING, "indices[..., :k]", "indices[..., -k:]"),
    (_GATED_OP, "kept.sum(-1, keepdim=True).clamp_min(1)", "kept.shape[-1]"),
    (_EXPERTS_FUNCTION, "dx = into / ctx.shape[1] if kept", "dx = into if kept"),
]
