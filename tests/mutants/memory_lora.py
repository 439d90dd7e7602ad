"""Faults in what `petal-kernels memory` says of LoRA: other linears, another rank or dtype in one
of two columns, bytes that are counted in one form alone."""

TESTS = [
    "tests/tools/test_memory_lora.py",
    "tests/tools/test_memory_script.py",
    "tests/tools/test_memory_rules.py",
    "tests/tools/test_memory_command.py::test_lora_on_q_k_v_keeps_what_the_formulas_say",
    "tests/benchmarks/test_tables.py",
    "-k",
    "not llama_7b and (lora or peft or targets or layer or title or heeds or refused or option "
    "or output_lies or recomputed)",
]

_RULES = "petal_kernels/memory/cuda_rules.py"
_PRESETS = "petal_kernels/tools/memory/presets.py"
_OPTIONS = "petal_kernels/tools/memory/options.py"
_ARGUMENTS = "petal_kernels/tools/memory/arguments.py"
_WHAT_IF = "petal_kernels/tools/memory/whatif.py"
_APP = "petal_kernels/tools/memory/app.py"
_COMPARE = "petal_kernels/tools/memory/compare.py"
_LAYER = "petal_kernels/tools/memory/compare_layer.py"
_FORMS = "petal_kernels/tools/memory/lora_forms.py"
_MODELS = "petal_kernels/tools/memory/models.py"
_TABLES = "benchmarks/tables.py"

MUTANTS = [
    # Where attention's output lies
    (_RULES, "torch.empty_like(q) if same else", "q.new_empty(q.shape) if same else"),
    # What is asked for
    (_PRESETS, "lora_alpha=options.rank", "lora_alpha=8"),
    (_PRESETS, "lora_dropout=options.dropout or 0.0", "lora_dropout=0.0"),
    (_PRESETS, "        parts=options.parts,\n", ""),
    (_PRESETS, "        recompute_mlp=options.recompute_mlp,\n", ""),
    (_PRESETS, "list(wanted) if isinstance(wanted, tuple) else wanted", "wanted and str(wanted)"),
    (_PRESETS, '_ADAPTER | {"dropout", "parts", "recompute_mlp", "frozen_norms"}', '_ADAPTER'),
    (_PRESETS, "paths, config.r, config", "paths, 8, config"),
    (_PRESETS, "config.lora_dropout, DTYPES[", "0.0, DTYPES["),
    (_PRESETS, "DTYPES[options.adapter_dtype]", "torch.bfloat16"),
    (_PRESETS, "    if not installed():\n", "    if False:\n"),
    (_OPTIONS, 'self.parts != ("language",)', "True"),
    (_OPTIONS, '"targets" in heeded and', ""),
    (_ARGUMENTS, "text.lower() == ALL_LINEAR", "text == ALL_LINEAR"),
    (_ARGUMENTS, "(,[\\w.]+)*", "(,[\\w.]+)+"),
    (_WHAT_IF, "asked.method and options.method != asked.method", "False"),
    (_WHAT_IF, "asked.needs and not installed(asked.needs)", "False"),
    (_WHAT_IF, '"MLPs recomputed", True', '"MLPs recomputed", False'),
    # Two columns
    (_COMPARE, "lora_dropout=dropout, target", "lora_dropout=0.0, target"),
    (_FORMS, "nn.Dropout(dropout) if dropout", "nn.Identity() if dropout"),
    (_LAYER, "sizes.config(targets, **chosen)", "sizes.config(targets)"),
    (_LAYER, '{"frozen_norms": "folded"},', '{"frozen_norms": "fused"},'),
    (_LAYER, '"recompute_mlp": True, "frozen_norms": "folded"', '"frozen_norms": "folded"'),
    (_LAYER, "            **chosen,\n", "            recompute_mlp=bool(chosen),\n"),
    (_LAYER, "(theirs, dtype=sizes.dtype)", "(theirs, dtype=torch.float32)"),
    (_LAYER, "lora_dropout=self.dropout", "lora_dropout=0.0"),
    (_LAYER, "kept / (x.numel() * x.itemsize)", "kept / x.numel()"),
    (_LAYER, "sizes.rank, sizes.dropout, dtype", "8, sizes.dropout, dtype"),
    (_LAYER, "rounded(k.times_x, 2)", "rounded(k.times_x, 1)"),
    (_LAYER, "{frozen.times_x:.2f}", "{adapted[0].times_x:.2f}"),
    (_MODELS, "intermediate_size=11008", "intermediate_size=11000"),
    (_APP, "if args.targets is None else (args.targets,)", ""),
    (_APP, '{"targets"} if layer_alone else set()', '{"targets"}'),
    # The figures of README.md
    (
        _TABLES,
        '100 * (rows[k]["median"] / floor - 1) for k in ("peft"',
        '100 * (rows[k]["median"] / floor) for k in ("peft"',
    ),
    (_TABLES, 'f"dropout {p}," in n', '"dropout" in n'),
    (_TABLES, 'for p in ("0.05", "0.0"):', 'for p in ("0.0", "0.05"):'),
    (_TABLES, 'WITH_PEFT if name.startswith("lora") else COLUMNS', "COLUMNS"),
    (_TABLES, 'targets=f["targets"]', 'targets=f["form"]'),
]
