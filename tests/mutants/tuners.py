"""Faults in the face that PEFT sees, and in a Trainer's checkpoints."""

TESTS = ["tests/hf/test_tuners.py", "tests/hf/test_trainers.py", "-m", "not slow"]

_TUNERS = "petal_kernels/hf/tuners.py"
_TRAINER = "petal_kernels/hf/trainer.py"
_MERGING = "petal_kernels/hf/merging.py"
_INSTALLED = "petal_kernels/hf/installed.py"
_PAIR = "petal_kernels/hf/pair.py"
_STORED = "petal_kernels/hf/stored.py"
_UNLOADING = "petal_kernels/hf/unloading.py"

MUTANTS = [
    (_TUNERS, "        if self.task_type not in _TASKS:\n", "        if False:\n"),
    (_TUNERS, "if meta and not all(p.is_meta for p in self.model.parameters()):", "if False:"),
    (_TUNERS, "            self.set_requires_grad(name, False)\n", "            pass\n"),
    (_TUNERS, "        self.set_requires_grad(names, not inference_mode)\n", ""),
    (_TUNERS, "            self.set_adapter(others[0])\n", ""),
    (
        _TUNERS,
        "        self._need_active(adapter_names)\n        self.attachment.merge()",
        "        self.attachment.merge()",
    ),
    (_TUNERS, "                    if given is not None:\n", "                    if False:\n"),
    (_TUNERS, "            off.__exit__(None, None, None)\n", "            pass\n"),
    (_TUNERS, "return key  # it is in none", 'return key.replace(f".{adapter_name}.", ".")'),
    (_MERGING, "    if got and got != want:\n", "    if False:\n"),
    (_MERGING, "if handle is None or not handle.only_adapter:", "if True:"),
    (_INSTALLED, "(need_no_merged, need_all)", "(need_no_merged,)"),
    (_PAIR, "folder / f\".{name}.{uuid.uuid4().hex}.tmp\"", "folder / name"),
    (_TRAINER, "        if handle.model is not model:\n", "        if False:\n"),
    (_STORED, "if name.startswith(front)}", "}"),
    (_UNLOADING, "not merged and handle._writes_alone(self.module):", "False:"),
]
