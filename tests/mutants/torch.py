"""Faults in the algebra shared by every backend: the torch backend, the autograd functions, the
generator."""

TESTS = [
    "tests/test_ops.py",
    "tests/test_contract.py",
    "tests/test_philox.py",
    "-k",
    "(torch or reference or gradcheck or masks or lanes or scale) and not inductor",
]

_LINEAR = "petal_kernels/ops/lowrank_linear/torch_impl.py"
_CONTRACT = "petal_kernels/ops/mode_contract/torch_impl.py"

MUTANTS = [
    (
        _LINEAR,
        "dups = [\n            (dy.t() @ m).mul_(scale)",
        "dups = [\n            (dy.t() @ m).mul_(1.0)",
    ),
    (_LINEAR, "g = [(dy @ up.to(dtype)).mul_(scale)", "g = [(dy @ up.to(dtype))"),
    (_LINEAR, "g = [gk.mul_(mask)", "g = [gk"),
    (_LINEAR, "g = [gk @ c.to(dtype).t()", "g = [gk @ c.to(dtype)"),
    (_LINEAR, "dh = dh.add_(gk)", "dh = gk"),
    (
        _LINEAR,
        "ddown = (dh.t() @ _drop_input(x, rng, dropout, dropout_at))",
        "ddown = (dh.t() @ x)",
    ),
    (_LINEAR, "dx = dy @ w if dx is None else dx.addmm_(dy, w)", "dx = dy @ w"),
    (
        _LINEAR,
        "torch.addmm(base[k], m, p.t(), alpha=scale)",
        "torch.addmm(base[0], m, p.t(), alpha=scale)",
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
        "petal_kernels/ops/lowrank_linear/op.py",
        "grads += [dy if w else None for dy, w in zip(dys, want_base",
        "grads += [dys[0] if w else None for dy, w in zip(dys, want_base",
    ),
]
