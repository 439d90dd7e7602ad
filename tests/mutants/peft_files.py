"""Faults in LoRA's files of PEFT's: names, scales, what is refused, the order of a save."""

TESTS = [
    *("tests/hf/test_peft_files.py", "tests/hf/test_peft_refused.py"),
    *("tests/hf/test_lora_peft.py", "tests/hf/test_saves.py"),
]

_PEFT = "petal_kernels/hf/peft_files.py"
_CONFIG = "petal_kernels/hf/peft_config.py"
_PAIR = "petal_kernels/hf/pair.py"
_WHOLE = "petal_kernels/hf/whole.py"
_STORED = "petal_kernels/hf/stored.py"
_ATTACH = "petal_kernels/hf/attach.py"
_ATTACHMENT = "petal_kernels/hf/attachment.py"

MUTANTS = [
    # What is written.
    (
        _PEFT,
        '"lora_A.weight": "down",\n    "lora_B.weight": "up",',
        '"lora_A.weight": "up",\n    "lora_B.weight": "down",',
    ),
    (_PEFT, '"lora_magnitude_vector": "magnitude"', '"lora_magnitude": "magnitude"'),
    (_PEFT, "        check_filed(config.init", "        print(config.init"),
    (_CONFIG, "    check_filed(values.get(", "    print(values.get("),
    (
        _CONFIG,
        '    if rows:\n        raise ValueError(f"trainable',
        '    if False:\n        raise ValueError(f"trainable',
    ),
    (_PEFT, "            last = _BIAS\n", '            last = "bias"\n'),
    (_PEFT, "fan_in_fan_out=conv1d == {True},", "fan_in_fan_out=False,"),
    (_PEFT, "is_named(path, names)} == {*adapted}:", "is_named(path, names)} >= {*adapted}:"),
    (_PEFT, 'path.replace(".", r"\\.") for path', "path for path"),
    (_PEFT, 'path.partition(".")[0] != NAME]', "True]"),
    (_CONFIG, "for name in _SAME if name not in resolved}", "for name in _SAME}"),
    (_CONFIG, '        "inference_mode": True,\n', ""),
    (
        _CONFIG,
        '        "modules_to_save": list(saved) or None,\n',
        '        "modules_to_save": None,\n',
    ),
    # What is refused before anything is written.
    (_STORED, '        check_choice("format", format, FORMATS)\n', ""),
    (
        _PEFT,
        "    if not isinstance(config, LoraConfig):\n        raise",
        "    if False:\n        raise",
    ),
    (_PEFT, "    if used:\n", "    if False:\n"),
    (_PEFT, "        if others:\n", "        if False:\n"),
    (_PEFT, "    _check_untied(attachment)\n", ""),
    (_PEFT, "        if name.startswith(whole):\n", "        if False:\n"),
    (_PEFT, "or files.is_ours(folder / OLD_CONFIG):\n        raise", ":\n        raise"),
    (_PEFT, "    if (folder / CONFIG).exists() or files", "    if files"),
    (_ATTACHMENT, 'if not any(path.startswith(f"{p}.") for p in named)', ""),
    # The order of a save.
    (_PAIR, "            _remove(path)\n            _sync", "            _sync"),
    (_PAIR, "if path.is_file() and path.read_bytes() != text:", "if path.is_file():"),
    (
        _PAIR,
        "        for temporary, final, _ in waiting:",
        "        for temporary, final, _ in waiting[::-1]:",
    ),
    (
        _PAIR,
        "        for temporary, _, _ in waiting:\n            temporary.unlink(missing_ok=True)",
        "        pass",
    ),
    # What is read.
    (_PEFT, "    if not path.is_file() or path.read_bytes() != text:", "    if False:"),
    (_PEFT, "    if (folder / CONFIG).exists():\n        return False\n", ""),
    (
        _PEFT,
        "return named or ((folder / TENSORS).exists() and not files.is_ours(folder / OLD_CONFIG))",
        "return named",
    ),
    (_PEFT, "        return (folder / TENSORS).exists()\n", "        return False\n"),
    (_PEFT, "    if missing:\n", "    if False:\n"),
    (_PEFT, "    files.refuse_pickle(tensors, data)\n", ""),
    (
        _PEFT,
        '        return f"{EXTRA}.{name.removesuffix(_BIAS)}bias"',
        '        return f"{EXTRA}.{name}"',
    ),
    (_PEFT, "        check_tensors(str(self.path.with_name(TENSORS)), found, state)\n", ""),
    (_PEFT, "if key not in _FREE and theirs[key] != want:", "if False:"),
    (
        _PEFT,
        '        if not isinstance(config, LoraConfig):\n            raise ValueError(f"{self',
        '        if False:\n            raise ValueError(f"{self',
    ),
    (
        _PEFT,
        "if again is not None and value is not None and torch.equal(again, value):",
        "if again is not None:",
    ),
    (
        _STORED,
        "            saved = saved.once(copies.other_names(self.model))\n",
        "            pass\n",
    ),
    (_WHOLE, "                others[full] = known", "                pass"),
    (_CONFIG, '    if kind != "LORA":\n', "    if False:\n"),
    (_CONFIG, "_OFF.get(name, None if value else value)", "value"),
    (
        _CONFIG,
        '_OFF = {"qalora_group_size": 16, "megatron_core": "megatron.core"}',
        "_OFF: dict[str, Any] = {}",
    ),
    (_CONFIG, '    defaults["inference_mode"] = values.get("inference_mode")', "    pass"),
    (_CONFIG, "        if not meant and name in heads:\n            continue\n", ""),
    (_CONFIG, "        if not meant and name in heads:", "        if not meant:"),
    (
        _CONFIG,
        "found += [name] if set(meant) == {p for p in meant if is_named(p, [name])} else meant",
        "found += [name]",
    ),
    (
        _ATTACH,
        "        config = formats.read(config).config_for(model)\n",
        "        config = formats.read(config).config  # type: ignore\n",
    ),
]
