"""Faults in routes that join vision and text token by token, and in the scale of value adapters."""

TESTS = [
    "tests/nn/test_vision_routes.py",
    "tests/nn/test_arguments.py",
    "-k",
    "vision_routes or ValueAdapter",
]

_ROUTES = "petal_kernels/nn/vision_routes.py"
_ADAPTER = "petal_kernels/nn/gated_adapter.py"
_LORA = "petal_kernels/nn/routed_lora.py"
_VALUE = "petal_kernels/nn/value_adapter.py"
_OP = "petal_kernels/ops/gated_bottleneck/arguments.py"

MUTANTS = [
    (_ROUTES, "z @ (z.mT @ vision)", "vision @ (z.mT @ vision)"),
    (_ROUTES, 'z + vision if route == "add" else z * vision', "z + vision"),
    (_ROUTES, "wanted = sorted({1, length})", "return"),
    (_ROUTES, "        wanted = [length]", "        wanted = [1, length]"),
    (_ROUTES, "        wanted = [1]\n", "        return\n"),
    (_ADAPTER, "base = h if self.add_input else None", "base = h"),
    (_ADAPTER, "F.linear(h, near(down), near(self.down_bias))", "F.linear(h, near(down))"),
    (_LORA, 'z, v, route = joined(route, z, v), None, "none"', "pass"),
    (_VALUE, "self.scale * up, self.scale * bias", "self.scale * up, bias"),
    (_OP, 'route in ("add", "mul", "expand") and vision.shape[1] > 1', "False"),
]
