"""Faults in the figures of a step: peaks, optimizers, advice; in what the command refuses."""

TESTS = [
    "tests/tools/test_memory_advice.py",
    "tests/tools/test_memory_script.py",
    "tests/tools/test_memory_lora.py::test_a_title_says_only_what_decides",
    "tests/tools/test_memory_step.py",
    "tests/tools/test_memory_optimizer.py",
    "tests/tools/test_memory_command.py::test_exit_codes",
    "tests/tools/test_memory_command.py::test_a_scripts_own_loss_is_taken",
]

_OPTIMIZER = "petal_kernels/memory/optimizer.py"
_PROFILE = "petal_kernels/memory/profile.py"
_PROFILER = "petal_kernels/memory/profiler.py"
_GRADIENTS = "petal_kernels/memory/gradients.py"
_TIMELINE = "petal_kernels/memory/timeline.py"
_RECORDS = "petal_kernels/memory/records.py"
_ADVICE = "petal_kernels/memory/advice.py"
_TEXT = "petal_kernels/memory/text.py"
_SUBJECTS = "petal_kernels/tools/memory/subjects.py"
_APP = "petal_kernels/tools/memory/app.py"
_ARGUMENTS = "petal_kernels/tools/memory/arguments.py"
_PLOT = "petal_kernels/tools/memory/plot.py"
_PRESETS = "petal_kernels/tools/memory/presets.py"
_SCRIPT = "petal_kernels/tools/memory/script.py"
_WHAT_IF = "petal_kernels/tools/memory/whatif.py"

MUTANTS = [
    # States
    (_OPTIMIZER, "return self.numbers * self.dtype.itemsize", "return self.numbers * 4"),
    (_OPTIMIZER, "(3 if self.amsgrad else 2) * p.bytes", "2 * p.bytes"),
    (_OPTIMIZER, "p.bytes if self.momentum else 0", "p.bytes"),
    (_OPTIMIZER, "step = 4 if self.fused or self.capturable else 0", "step = 0"),
    (_OPTIMIZER, "2 * (p.numbers + 4 * -(-p.numbers // _BLOCK))", "2 * p.numbers"),
    (_OPTIMIZER, "-(-p.numbers // _BLOCK)", "(p.numbers // _BLOCK)"),
    (_OPTIMIZER, "_BLOCK = 256", "_BLOCK = 2048"),
    (_OPTIMIZER, "_MAPS = 2 * 256 * 4", "_MAPS = 256 * 4"),
    (_OPTIMIZER, "return 2 * 4 * p.numbers", "return 2 * p.bytes"),
    (_OPTIMIZER, "moved = [p for p in trained if p.has_gradient]", "moved = list(trained)"),
    # What a step allocates
    (_OPTIMIZER, "        tape.drop(before)\n    tape.drop(roots)", "    tape.drop(roots)"),
    (
        _OPTIMIZER,
        'before, roots = roots, tape.take(size, "_foreach_sqrt", "", dtype)\n',
        'tape.drop(roots)\n        before, roots = None, tape.take(size, "s", "", dtype)\n',
    ),
    (_OPTIMIZER, "tape.drop(root, before)", "tape.drop(before)"),
    (_OPTIMIZER, "        if how.copies_gradients:  # in place", "        if False:  # in place"),
    (
        _OPTIMIZER,
        "        if how.copies_gradients:\n            size",
        "        if 0:\n            size",
    ),
    (_OPTIMIZER, 'and self.kind != "adamw"', ""),
    (_OPTIMIZER, "        if how.nesterov:\n", "        if False:\n"),
    (_OPTIMIZER, 'self.foreach is False else "foreach"', 'self.foreach is None else "foreach"'),
    (_OPTIMIZER, 'group.get("decoupled_weight_decay", kind == "adamw")', "False"),
    (_OPTIMIZER, "live = [size + kept for size in profile.live]", "live = list(profile.live)"),
    (_OPTIMIZER, "None if block.category in _LASTING else end", "None"),
    (_OPTIMIZER, "if not profile.backward:", "if False:"),
    (_PROFILE, "with_step(self.before_optimizer or self,", "with_step(self,"),
    (_PROFILE, "own + self.sizes.earlier_gradients + self.sizes.states", "own"),
    # Gradients that are there before the step
    (_GRADIENTS, "t.grad is not None if accumulate is None else accumulate", "bool(accumulate)"),
    (_GRADIENTS, "torch.zeros_like(like.detach()) if wanted else None", "None"),
    (_PROFILER, "            if accumulate:\n", "            if False:\n"),
    (_GRADIENTS, "(storage_bytes(part), id(t) in there)", "(storage_bytes(part), True)"),
    (_TIMELINE, "self.live = [size - block.bytes for size in self.live]", "pass"),
    # Advice, units, totals
    (_ADVICE, "return sum(r.bytes for r in records)", "return 2 * sum(r.bytes for r in records)"),
    (_ADVICE, "size = sum(_total(records) for records in sets)", "size = _total(sets[0])"),
    (_ADVICE, "records = masks + noise", "records = masks"),
    (_ADVICE, '("Softmax", "NativeDropout", "Bmm", "SafeSoftmax")', '("Softmax", "SafeSoftmax")'),
    (_ADVICE, "r.dtype == torch.float32", "r.dtype.itemsize == 2"),
    (_ADVICE, '(r.source in profile.trained) == (kind == "trained")', "True"),
    (_ADVICE, "record.useful != useful or record.of_batch", "record.of_batch"),
    (_ADVICE, "share = 100 * _total(records) / profile", "share = 50 * _total(records) / profile"),
    (_ADVICE, "_LEAST = 0.01", "_LEAST = 0.0"),
    (_RECORDS, "MIB = 2**20", "MIB = 10**6"),
    (_RECORDS, 'f"{count / 1024:.1f} KiB"', 'f"{count / 1000:.1f} KiB"'),
    (_TEXT, "sum(row.bytes for row in rows[limit:])", "sum(row.bytes for row in rows)"),
    (_PLOT, "for name in RESIDENT if name in parts]", "for name in RESIDENT if name in parts][:2]"),
    # The command
    (_WHAT_IF, "2 * getattr(options, asked.option)", "4 * getattr(options, asked.option)"),
    (_WHAT_IF, 'return f"{subject} has no {asked.option}"', 'return ""'),
    (_WHAT_IF, "profile.with_optimizer(optimizer).peak_bytes", "profile.peak_bytes"),
    (_SCRIPT, "**defaults, **given", "**given"),
    (_SCRIPT, "if unheeded and not anything:", "if False:"),
    (
        _SCRIPT,
        "Step(model, batch, loss, None if model is module else module)",
        "Step(model, batch)",
    ),
    (_APP, "return exits.BROKEN_BOUND", "return exits.REFUSED"),
    (_SUBJECTS, "contextlib.redirect_stdout(sys.stderr) if quiet else", ""),
    (_APP, "        _check_files(args)\n", ""),
    (_APP, 'where.startswith("petal_kernels.memory.")', "False"),
    (_SUBJECTS, "[name for name in given if name not in found.heeded]", "[]"),
    (_APP, "return whatif.run(step, args.accumulate)", "return whatif.run(step)"),
    (_ARGUMENTS, "0.0 <= _number(text) < math.inf", "_number(text) >= 0.0"),
    (_PRESETS, '("petal", "routing"), _ADAPTER | {"dropout"}', '("petal",), _ADAPTER'),
]
