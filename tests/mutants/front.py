"""Faults in what lets a call pass by its checks and the dispatcher."""

TESTS = [
    *("tests/runtime/test_front.py", "tests/runtime/test_front_calls.py"),
    "tests/hf/test_methods_engines.py::test_a_plain_layer_has_no_graph_for_each_length",
]

_FRONT = "petal_kernels/_runtime/front.py"
_LIBRARY = "petal_kernels/_runtime/library.py"
_ROWS = "petal_kernels/_runtime/rows.py"
_INFO = "petal_kernels/_build_info.py"
_LINEAR = "petal_kernels/ops/lowrank_linear/op.py"
_MLP = "petal_kernels/ops/gated_mlp/op.py"
_ARGUMENTS = "petal_kernels/ops/lowrank_linear/arguments.py"
_FUNCTION = "petal_kernels/ops/lowrank_linear/function.py"
_MLP_ARGUMENTS = "petal_kernels/ops/gated_mlp/arguments.py"

MUTANTS = [
    (_FRONT, "    if torch.compiler.is_compiling():\n        return None\n", ""),
    (_FRONT, "if len(self) >= _MOST:", "if len(self) > 1 << 20:"),
    (_LINEAR, "if key is not None:  # a graph", "if True:  # a graph"),
    (_MLP, "if key is not None:  # a graph", "if True:  # a graph"),
    # A key that leaves out a part of the call: its options, all but its tensors, the backend.
    (_LINEAR, "key = front.signature(given)", "key = front.signature(given[:8])"),
    (_LINEAR, "key = front.signature(given)", "key = front.signature(given[8:])"),
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
    (_INFO, ' or _record()["facts"].get("torch") != torch_version', ""),
]
