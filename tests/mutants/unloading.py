"""Faults in plain models made of adapted ones, and in what a model's own save may write."""

TESTS = ["tests/hf/test_unloading.py", "tests/hf/test_merged.py"]

_UNLOADING = "petal_kernels/hf/unloading.py"
_WHOLE = "petal_kernels/hf/whole.py"
_ATTACHMENT = "petal_kernels/hf/attachment.py"
_INSTALLED = "petal_kernels/hf/installed.py"

MUTANTS = [
    (
        _UNLOADING,
        "report.kept = dict.fromkeys(self.whole(), WHOLE) | report.kept",
        "report.kept |= dict.fromkeys(self.whole(), WHOLE)",
    ),
    (_UNLOADING, "if why != WHOLE]", "]"),
    (
        _UNLOADING,
        "        if kept:\n            if not merged:\n",
        "        if False:\n            if not merged:\n",
    ),
    (
        _UNLOADING,
        "        if kept:\n            if not merged:\n                self.unmerge()\n",
        "        if kept:\n",
    ),
    (
        _UNLOADING,
        "        finally:\n            if not merged:\n                self.unmerge()",
        "        finally:\n            pass",
    ),
    (
        _UNLOADING,
        "            if not merged:\n                self.unmerge()\n\n",
        "            self.unmerge()\n\n",
    ),
    (_UNLOADING, "        self._merged = None  # its weights stay\n", ""),
    (_UNLOADING, "requires_grad=old.requires_grad)", "requires_grad=False)"),
    (
        _UNLOADING,
        "            for values, name in slots:\n                values[name] = value\n",
        "            values[name] = value\n",
    ),
    (_UNLOADING, ".to(values[name].dtype)", ""),
    (_UNLOADING, "taken.get((id(values), name), own).detach()", "own.detach()"),
    (
        _UNLOADING,
        'in [name for name in state if name.partition(".")[0] == NAME]:',
        "in ():",
    ),
    (
        _UNLOADING,
        "                    if key in state and own is not None:\n",
        "                    if own is not None:\n",
    ),
    (
        _UNLOADING,
        "save(directory, **options, state_dict=self._plain_state())",
        "save(directory, state_dict=self._plain_state())",
    ),
    (_UNLOADING, "        if not callable(save):\n", "        if False:\n"),
    (
        _UNLOADING,
        'if not merged and "state_dict" not in options and',
        'if "state_dict" not in options and',
    ),
    (_UNLOADING, 'if not merged and "state_dict" not in options and', "if not merged and"),
    (_UNLOADING, "and len(args) <= _BEFORE_STATE:", ":"),
    (_UNLOADING, "handle is None or (handle._merged", "(handle._merged"),
    (
        _UNLOADING,
        "(handle._merged is not None and handle._merged.is_whole)",
        "handle._merged is not None",
    ),
    (_UNLOADING, "own = self.own or getattr", "own = getattr"),
    (
        _UNLOADING,
        "            if self.own is not None:\n",
        "            if False:\n",
    ),
    (_UNLOADING, "        if self.module.__dict__.get(_SAVE) is self:\n", "        if True:\n"),
    (
        _UNLOADING,
        "and (module is model or any(id(part) in known for part in module.modules()))",
        "and module is model",
    ),
    (
        _UNLOADING,
        "and (module is model or any(id(part) in known for part in module.modules()))",
        "",
    ),
    (_INSTALLED, "        for save in self.saves:\n            save.take_back()\n", ""),
    (
        _INSTALLED,
        "self.saves = guard_saves(self.model, self.adapter, self.places())",
        "self.saves = []",
    ),
    (_WHOLE, 'if name == "bias" and module.__dict__.get("bias_of") is not None:', "if False:"),
    (
        _WHOLE,
        "slots.setdefault(id(value), []).append((module._parameters, name))",
        "slots[id(value)] = [(module._parameters, name)]",
    ),
    (
        _WHOLE,
        "                if buffer is not None:\n                    yield",
        "                if False:\n                    yield",
    ),
]
