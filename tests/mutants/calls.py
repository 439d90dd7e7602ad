"""Faults in the checks of arguments: a malformed call that gets through, or fails another way."""

TESTS = ["tests/malformed", "-m", "not slow"]

_CHECKS = "petal_kernels/_runtime/checks.py"
_BACKENDS = "petal_kernels/_runtime/backends.py"
_ARGUMENTS = "petal_kernels/nn/arguments.py"
_LINEAR = "petal_kernels/ops/lowrank_linear/arguments.py"
_GATED = "petal_kernels/ops/gated_bottleneck/arguments.py"
_EXPERTS = "petal_kernels/ops/expert_dispatch/arguments.py"
_CONTRACT = "petal_kernels/ops/mode_contract/arguments.py"
_FROZEN = "petal_kernels/nn/frozen_linear.py"
_MODES = "petal_kernels/nn/mode_approximation.py"
_ADAPTER = "petal_kernels/nn/gated_adapter.py"
_LORA = "petal_kernels/nn/routed_lora.py"
_MIXTURE = "petal_kernels/nn/low_rank_experts.py"
_MIXTURES = "petal_kernels/nn/experts.py"
_BOUND = "petal_kernels/nn/mutual_information.py"
_FIELDS = "petal_kernels/hf/fields.py"
_STORED = "petal_kernels/hf/stored.py"
_FILES = "petal_kernels/hf/files.py"
_PROFILER = "petal_kernels/memory/profiler.py"
_ASKED = "petal_kernels/hf/asked.py"

MUTANTS = [
    (_CHECKS, "if value.layout is not torch.strided or value.is_nested:", "if False:"),
    (_CHECKS, "if value.layout is not torch.strided or value.is_nested:", "if value.is_nested:"),
    (_CHECKS, "if not -sys.float_info.max <= value <= sys.float_info.max:", "if value != value:"),
    (_CHECKS, "if not -sys.float_info.max <= value <= sys.float_info.max:", "if False:"),
    (_CHECKS, "    if not isinstance(value, str):  # an array", "    if False:  # an array"),
    (_CHECKS, "    if not isinstance(value, bool):\n", "    if False:\n"),
    (_CHECKS, "if tensor.is_complex() or tensor.is_quantized:", "if False:"),
    (_CHECKS, "    check_shape(name, tensor, (2,))\n", ""),
    (_CHECKS, "    check_dtype(name, tensor, (torch.int64,))\n", ""),
    (_BACKENDS, "if not isinstance(name, str) or name not in", "if name not in"),
    (_BACKENDS, "any(known is operator", "any(known == operator"),
    (_ARGUMENTS, "if dtype is not None and dtype not in checks.FLOATING:", "if False:"),
    (_ARGUMENTS, "        if tensor.is_meta and not like.is_meta:", "        if False:"),
    (_ARGUMENTS, "    if least < low or most > high:", "    if most > high:"),
    (_ARGUMENTS, "or not 0 <= value < count:", "or not 0 <= value <= count:"),
    (_LINEAR, '    checks.check_bool("training", given.training)\n', ""),
    (_LINEAR, "        if each is not None:  # whether", "        if False:  # whether"),
    (_LINEAR, "    philox.check_probability(given.dropout)\n", ""),
    (_GATED, '    checks.check_bool("training", given.training)\n', ""),
    (_GATED, '    checks.check_number("scale", given.scale)\n', ""),
    (_GATED, "        if value is None and got is not None:", "        if False:"),
    (_EXPERTS, '    checks.check_number("mix", given.mix)\n', ""),
    (_EXPERTS, '    checks.check_bool("renormalize", given.renormalize)\n', ""),
    (_EXPERTS, '    checks.check_bool("return_routing", given.return_routing)\n', ""),
    (_CONTRACT, "        checks.check_device(name, tensor, core.device)\n", ""),
    (_FROZEN, "    _check_group(x, bases, down, ups, hidden, training)\n", ""),
    (
        _MODES,
        "            self._check_base(base, len(self._chosen(index)), x)\n",
        "            pass\n",
    ),
    (_ADAPTER, "        self._check(h, x, vision, mask, dropout, residual, norm, training)\n", ""),
    (_LORA, "        self._check(x, vision)\n", ""),
    (_MIXTURES, '        self._check(h, None, mask, domain, "h")\n', ""),
    (_MIXTURE, '        check_range("domain", domain, 0, self.experts - 1)\n', ""),
    (_BOUND, '        check_range("labels", kept, 0, self.club.outputs - 1)\n', ""),
    (_FIELDS, "want(isinstance(value, str) and value in choices", "want(value in choices"),
    (_FIELDS, "-largest <= value <= largest", "abs(value) < float('inf')"),
    (_FIELDS, "re.compile(value)", "pass"),
    (_STORED, "        if not isinstance(state, Mapping):", "        if False:"),
    (_FILES, "    if not isinstance(given, (str, os.PathLike)):", "    if False:"),
    (_STORED, '        files.path_of(path, "path")\n', ""),
    (_ASKED, '        path_of(checkpoint, "checkpoint")', "        pass"),
    ("petal_kernels/hf/unloading.py", "        path_of(directory)\n", ""),
    ("petal_kernels/hf/hub.py", "    if not isinstance(value, kinds):", "    if False:"),
    ("petal_kernels/hf/blocks.py", '        self._check_values("input_ids", input_ids)\n', ""),
    ("petal_kernels/memory/arguments.py", '    check_bool("backward", backward)\n', ""),
]
