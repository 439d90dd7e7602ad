"""Faults in how modules whose code was replaced, as Liger replaces it, are read."""

TESTS = ["tests/hf/test_liger.py"]

_LINEARS = "petal_kernels/hf/linears.py"
_LORA = "petal_kernels/hf/methods/lora.py"
_STRUCTURE = "petal_kernels/hf/structure.py"

MUTANTS = [
    (_LINEARS, 'if self.name == "lm_head" and _code_of', "if False and _code_of"),
    (_LINEARS, '_code_of(self.parent).startswith("liger_kernel."):', "True:"),
    (_LINEARS, 'module.__dict__.get("forward", getattr(', "(getattr("),
    (_LORA, "for s in chosen.every if s.read_by}", "for s in ()}"),
    (_LORA, "        if wanted and not self._sites:\n", "        if False:\n"),
    ("petal_kernels/hf/walk.py", "Norm(For\\w+)?$", "Norm$"),
    (
        _STRUCTURE,
        '    if "forward" in module.__dict__:\n        return ()\n',
        "",
    ),
]
