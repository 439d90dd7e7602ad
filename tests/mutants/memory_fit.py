"""Faults in what `petal-kernels memory` says a step needs and whether it fits: segments, parts,
quantised weights, pictures, the search, the order of changes."""

TESTS = [
    "tests/tools/test_memory_budget.py",
    "tests/tools/test_memory_planner.py",
    "tests/tools/test_memory_fit.py",
    "tests/tools/test_memory_config.py",
    "-m",
    "not slow",
]

_ALLOCATOR = "petal_kernels/memory/allocator.py"
_FAKE = "petal_kernels/memory/fake.py"
_BUDGET = "petal_kernels/tools/memory/budget.py"
_CONFIGS = "petal_kernels/tools/memory/configs.py"
_FIT = "petal_kernels/tools/memory/fit.py"
_PLANNER = "petal_kernels/tools/memory/planner.py"
_PICTURES = "petal_kernels/tools/memory/pictures.py"
_QUANTISED = "petal_kernels/tools/memory/quantised.py"
_TOWERS = "petal_kernels/tools/memory/towers.py"

MUTANTS = [
    (_ALLOCATOR, "left >= _STEP if small else left > _SMALL", "left >= _STEP"),
    (_ALLOCATOR, "        segment.used -= 1\n", ""),
    (_ALLOCATOR, "        if after is not None:\n", "        if False:\n"),
    (_FAKE, "_RealMasks() if real else mode", "mode"),
    (_BUDGET, "TRAINED if block.module in trained else FROZEN", "FROZEN"),
    (_BUDGET, "if block.shape and block.shape[-1] in words", "if False"),
    (_BUDGET, "2 * largest +", "largest +"),
    (_BUDGET, "        parts[OTHERS] += whole.unit\n", "        pass\n"),
    (_QUANTISED, "        return numbers + 4 * outs\n", "        return numbers\n"),
    (_QUANTISED, "*([x] if keeps_input else [])", ""),
    (_QUANTISED, "and id(module) not in heads", ""),
    (_CONFIGS, "    said[said == image] = 5\n", ""),
    (_CONFIGS, "torch.where(of_image, -100, ids)", "ids"),
    (_PICTURES, "if given is None else given", ""),
    (_FIT, "return low\n", "return high\n"),
    (_FIT, "for name in self.fields)", "for name in ())"),
    (_FIT, "next((t for t in tried if t.fits), None)\n        if", "tried[-1]\n        if"),
    (_FIT, "guess = left * batch // grows if grows > 0 else 2 * batch", "guess = 2 * batch"),
    (_FIT, "guess = left * batch // grows if grows > 0 else batch // 2", "guess = batch // 2"),
    (_FIT, "        self.tell(said if fits else", "        print(said if fits else"),
    (_FIT, "        fits = self.fits(whole)\n", "        fits = self.changes(options) and False\n"),
    (_FIT, "            found = several if several.fits else found\n", ""),
    (_FIT, "low, high, found = 1, len(asked), last", "low, high, found = 0, 0, last"),
    (_FIT, 'option="--frozen-norms folded"', 'option="--frozen-norms fused"'),
    (_FIT, "how = tuple((c.option, c.code) for c in several)", "how = ()"),
    (_PLANNER, "self._kept.items()][:1])", "self._kept.items()][-1:])"),
    (_TOWERS, "if inside(r.module, seen.path)", ""),
]
