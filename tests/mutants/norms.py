"""Faults in what keeps a norm's input in its output's place, and in what decides that it may."""

TESTS = [
    "tests/ops/frozen_norm/test_op.py",
    "tests/hf/test_norms.py",
    "tests/hf/test_lora_norms_own.py",
    "tests/hf/test_lora_norms_kept.py",
    "tests/hf/test_lora_norms.py",
]

_FORMED = "petal_kernels/_runtime/formed.py"
_OP = "petal_kernels/ops/frozen_norm/op.py"
_LINEAR = "petal_kernels/ops/lowrank_linear/function.py"
_MLP = "petal_kernels/ops/gated_mlp/function.py"
_NORMS = "petal_kernels/hf/norms.py"
_LORA = "petal_kernels/hf/methods/lora.py"
_FILES = "petal_kernels/hf/files.py"

MUTANTS = [
    (_FORMED, "self._versions != (y._version, source._version)", "False"),
    (_FORMED, "!= (y._version, source._version)", "!= (0, source._version)"),
    (_FORMED, "!= (y._version, source._version)", "!= (y._version, 0)"),
    (_FORMED, "self._source = TensorWeakRef(source)", "self._source = lambda: source"),
    (_FORMED, "getattr(y.grad_fn,", "getattr(y.grad_fn and y.grad_fn.next_functions[0][0],"),
    (_FORMED, "        return (source, *self.others)", "        return (source, None, None)"),
    (_OP, "formed.put(ctx, y, again, x, weight, bias)", "pass"),
    (
        _OP,
        "formed.put(ctx, y, again, x, weight, bias)",
        "formed.put(ctx, y, again, x, weight, None)",
    ),
    (_OP, "functools.partial(_again, kind, eps", "functools.partial(_again, kind, 1e-6"),
    (_OP, "return result_of(y, x.shape), moments", "return y.view(x.shape), moments"),
    (
        _LINEAR,
        "x_parts, ctx.form_x = formed.kept(t.x if",
        "x_parts, ctx.form_x = (lambda x: ((x,), None))(t.x if",
    ),
    (
        _MLP,
        "x_parts, ctx.form_x = formed.kept(t.x if",
        "x_parts, ctx.form_x = (lambda x: ((x,), None))(t.x if",
    ),
    (_LINEAR, "x = formed.again(rest[sum(counts) :], ctx.form_x)", "x = rest[sum(counts)]"),
    (_MLP, "x = formed.again(rest[ends:], ctx.form_x)", "x = rest[ends]"),
    (_NORMS, "    if autocast_on(x.device.type):\n        return False\n", ""),
    (_NORMS, "if not now(self.method).on or self.merged:", "if self.merged:"),
    (_NORMS, "if not now(self.method).on or self.merged:", "if not now(self.method).on:"),
    (_NORMS, "if torch.compiler.is_compiling() or len", "if len"),
    (_NORMS, "x if x.dtype in _DTYPES and", "x if"),
    (_NORMS, "(parameter.dtype, parameter.device) != (x.dtype, x.device)", "False"),
    (_NORMS, "if parameter.requires_grad and torch.is_grad_enabled():", "if False:"),
    (_NORMS, ') or "forward" in module.__dict__:', "):"),
    (_NORMS, "in _DTYPES and _is_plain(x)", "in _DTYPES"),
    (_NORMS, "for training in (False, True)", "for training in (False,)"),
    (_NORMS, "for dtype in (torch.float32, torch.bfloat16)", "for dtype in (torch.float32,)"),
    (_NORMS, "1e-2, 1e-3, 1e-5, 1e3]", "1.0, 1.0, 1.0, 1e3]"),
    (
        _NORMS,
        "any(True for each in (module.children, module.buffers) for _ in each())",
        "False",
    ),
    (_NORMS, "eps = getattr(module, self.norm.eps)", "eps = 1e-3"),
    (_NORMS, "if width_of(modules[name]) == width]", "]"),
    (_NORMS, "        if where in layers:\n            return\n", ""),
    (_NORMS, "        if not layers and lists:\n            return\n", ""),
    (_NORMS, "    needed = False\n", ""),
    (_LORA, 'if "_petal_copy" in module.__dict__:', "if False:"),
    (_LORA, 'self.config.frozen_norms == "folded"', "False"),
    (_LORA, "            self._take_norms(hand)", "        self._take_norms(hand)"),
    (_FILES, '    "frozen_norms",\n', ""),
]
