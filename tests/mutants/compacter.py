"""Faults in Compacter: how its matrices are formed, drawn and shared."""

TESTS = [
    "tests/nn/test_compacter.py",
    "tests/nn/test_arguments.py",
    "tests/hf/test_methods.py",
    "tests/hf/test_counts.py",
    "-m",
    "not slow",
    "-k",
    "ompacter or PHMRule",
]

_KRONECKER = "petal_kernels/nn/kronecker.py"
_ADAPTER = "petal_kernels/nn/compacter.py"
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
    (_ADAPTER, "return self.phm_down(), ", "return self.phm_down().detach(), "),
    (_METHOD, "        adapter.rule = self.rule", "        pass"),
    (_METHOD, "if config.share_rule:", "if False:"),
    (_METHOD, "            factor_r=config.factor_r,\n", ""),
]
