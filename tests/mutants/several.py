"""Faults in what takes adapters out of a model and puts them back, and in combining them."""

TESTS = [
    "tests/hf/test_combine.py",
    "tests/hf/test_several_calls.py",
    "tests/hf/test_several.py",
    "-m",
    "not slow",
]

_INSTALLED = "petal_kernels/hf/installed.py"
_SEVERAL = "petal_kernels/hf/several.py"
_COMBINING = "petal_kernels/hf/combining.py"
_PARTS = "petal_kernels/hf/parts.py"
_CONTEXT = "petal_kernels/hf/context.py"
_BLOCKS = "petal_kernels/hf/blocks.py"

MUTANTS = [
    (_COMBINING, "(weight * lora.scale)", "lora.scale"),
    (_COMBINING, "(weight * lora.scale)", "weight"),
    (_COMBINING, "        alpha_pattern=dict(other),\n", ""),
    (_COMBINING, 'if config.bias != "none":', "if False:"),
    (_PARTS, "        if bound.method is not self.method:\n", "        if False:\n"),
    (
        _PARTS,
        "if in_backward() if bound is None else bound.method is not self:",
        "if bound is not None and bound.method is not self:",
    ),
    (
        _PARTS,
        "if in_backward() if bound is None else bound.method is not self:",
        "if in_backward():",
    ),
    (_CONTEXT, "if owner is not None and owner.switched and in_backward():", "if False:"),
    (_BLOCKS, "for each in self._adapters.values():", "for each in [self.installed]:"),
    (_SEVERAL, "                made.mark_gone(each)\n", "                pass\n"),
    (_SEVERAL, "            each.method.switched = True\n", ""),
    (_SEVERAL, "            check_holders(self.model)\n", "            pass\n"),
    (
        _SEVERAL,
        "            own.put_back(self)\n            self._use(before, own)\n",
        "            own.put_back(self)\n",
    ),
    (_SEVERAL, "            own.put_back(self)\n            raise\n", "            raise\n"),
    (_SEVERAL, "        self.installed.check_forwards(what)\n", ""),
    (_INSTALLED, "        self._check_free()\n", ""),
    (_INSTALLED, "            wrapper.train(wrapper.base.training)\n", ""),
    (_INSTALLED, "            self.adapter.to(device)", "            pass"),
    (_INSTALLED, '            or module.__dict__.get("forward") is not forward\n', ""),
]
