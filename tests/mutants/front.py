"""Faults in what lets a call pass by its checks and the dispatcher."""

TESTS = [
    *("tests/runtime/test_front.py", "tests/runtime/test_front_calls.py"),
    *("tests/runtime/test_front_prepared.py", "tests/runtime/test_front_nodes.py"),
    "tests/hf/test_methods_engines.py::test_a_plain_layer_has_no_graph_for_each_length",
]

_FRONT = "petal_kernels/_runtime/front.py"
_LIBRARY = "petal_kernels/_runtime/library.py"
_ROWS = "petal_kernels/_runtime/rows.py"
_INFO = "petal_kernels/_build_info.py"
_LINEAR = "petal_kernels/ops/lowrank_linear/op.py"
_MLP = "petal_kernels/ops/gated_mlp/op.py"
_ARGUMENTS = "petal_kernels/ops/lowrank_linear/arguments.py"
_COMPILED = "petal_kernels/ops/lowrank_linear/compiled.py"
_MLP_COMPILED = "petal_kernels/ops/gated_mlp/compiled.py"
_FUNCTION = "petal_kernels/ops/lowrank_linear/function.py"
_MLP_ARGUMENTS = "petal_kernels/ops/gated_mlp/arguments.py"

MUTANTS = [
    (_FRONT, "    if torch.compiler.is_compiling():\n        return None\n", ""),
    (_FRONT, "if len(self) >= _MOST:", "if len(self) > 1 << 20:"),
    (_LINEAR, "if key is None:  # a graph", "if False:  # a graph"),
    (_MLP, "if key is None:  # a graph", "if False:  # a graph"),
    # A key that leaves out a part of the call: its options, all but its tensors, the backend.
    (_LINEAR, "front.signature((given, name))", "front.signature((given[:8], name))"),
    (_LINEAR, "front.signature((given, name))", "front.signature((given[8:], name))"),
    (_LINEAR, "front.signature((given, name))", "front.signature((given, 0))"),
    (_MLP, "front.signature((given, name))", "front.signature((given, 0))"),
    (_LINEAR, "    name = rt.name_of(backend)\n", '    name = backend or "auto"\n'),
    (_LIBRARY, "key = front.signature(args)", "key = front.signature(args[:-1])"),
    (_LIBRARY, "key = front.signature(args)", "key = front.signature(args[1:])"),
    # Whoever watches sees nothing; where nothing is known, nobody looks.
    (
        _LIBRARY,
        "            return overload(*args)\n        run",
        "            key = b''\n        run",
    ),
    (_FUNCTION, "inference = not save and hidden is None", "inference = hidden is None"),
    # What a known call computes with: another's settings, tensors in another order.
    (_LINEAR, "trains = torch.is_grad_enabled() and _any", "trains = _any"),
    (
        _ARGUMENTS,
        "_list(ups), weights, biases, _list(base), core)",
        "_list(ups), weights, biases, (), core)",
    ),
    (
        _ARGUMENTS,
        "downs = [down] if isinstance(down, Tensor) and down.dim() == 2",
        "downs = [down] if down is not None",
    ),
    (
        _ARGUMENTS,
        "biases = [None] * len(weights) if biases is None",
        "biases = [None] * len(weights) if weights",
    ),
    (
        _MLP_ARGUMENTS,
        "(given.biases, given.downs, given.ups)",
        "(given.biases, given.ups, given.downs)",
    ),
    (_ROWS, "dx.addmm_(dy, w)", "dx.addmm_(dys[0], w)"),
    # Of calls in compiled code: which they are, and what Python's backward is told for them.
    (_COMPILED, "t.hidden is not None or t.core", "t.core"),
    (_COMPILED, "t.core is not None or t.base", "t.base"),
    (_COMPILED, "or t.core is not None or t.base", "or t.core is not None"),
    (_COMPILED, "    if is_large(t.x, *t.ups):\n        return None\n", ""),
    (_COMPILED, "(each and next(of_biases) for each in biased)", "(False for each in biased)"),
    (_MLP_COMPILED, "s.recompute or", "False or"),
    (_MLP_COMPILED, "*[None] * n, *saved[2 + 2 * n :]", "*[None] * n, *saved[3 + 2 * n :]"),
    (_LINEAR, "lists = not isinstance(given.ups, Tensor)", "lists = True"),
    (_INFO, ' or _record()["facts"].get("torch") != torch_version', ""),
]
