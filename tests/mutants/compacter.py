"""Faults in Compacter, how its matrices are formed, drawn and shared; and in the modules other than
its own that VL-PET's places take."""

TESTS = [
    "tests/nn/test_compacter.py",
    "tests/nn/test_arguments.py",
    "tests/hf/test_methods.py",
    "tests/hf/test_counts.py",
    "tests/hf/test_config.py",
    "tests/hf/test_insertion_places.py",
    "-m",
    "not slow",
    "-k",
    "ompacter or PHMRule or vl-pet or vlpet-bart-lora or placed",
]

_KRONECKER = "petal_kernels/nn/kronecker.py"
_ADAPTER = "petal_kernels/nn/compacter.py"
_VLPET = "petal_kernels/hf/methods/vlpet.py"
_CONFIG = "petal_kernels/hf/block_config.py"
_METHOD = "petal_kernels/hf/methods/compacter.py"

MUTANTS = [
    (_KRONECKER, "apart.transpose(-3, -2).reshape(", "apart.reshape("),
    (_KRONECKER, "rule.to(b).flatten(-2).mT @", "rule.to(b).mT.flatten(-2).mT @"),
    (_KRONECKER, "with autocast_off(factors[0]):", "if True:"),
    (_KRONECKER, "[part.to(wide) for part in factors]", "factors"),
    (_KRONECKER, "math.sqrt(12.0 /", "math.sqrt(6.0 /"),
    (_KRONECKER, "        self.factors()[0].zero_()", "        self.rules().zero_()"),
    (_KRONECKER, "            self.rule.reset_parameters()\n", "            pass\n"),
    (_KRONECKER, "rule.count not in (None, count)", "False"),
    (_ADAPTER, "            rule=self.shared_rule,\n", ""),
    (_ADAPTER, "            factor_r=self.factor_r,\n", ""),
    (_ADAPTER, 'if init != "normal":', "if False:"),
    (_ADAPTER, "return self.phm_down.formed(), ", "return self.phm_down.formed().detach(), "),
    (_METHOD, "        adapter.rule = self.rule", "        pass"),
    (_METHOD, "    if not config.share_rule:\n", "    if True:\n"),
    (_VLPET, '"scale": config.value_scale,', '"scale": 1.0,'),
    (_ADAPTER, "            count=self.layers,\n", ""),
    (_ADAPTER, "formed: Tensor = self.phm_up.formed(layer)", "formed: Tensor = self.phm_up(0)"),
    (_KRONECKER, "rule[index] if rule.dim() > 3", "rule[0] if rule.dim() > 3"),
    (_VLPET, 'config.r if place.role.startswith("encoder") else', "config.r if True else"),
    (_VLPET, "                alpha=config.alpha,\n", ""),
    (_VLPET, "        adapter.rule = self.rule", "        pass"),
    (_VLPET, 'Linear("", row.name, row.linear)', 'Linear("", row.name, "fc1")'),
    (_CONFIG, "if name not in _OWN[self.module]:", "if False:"),
    (_METHOD, ', "factor_r": config.factor_r}', "}"),
]
