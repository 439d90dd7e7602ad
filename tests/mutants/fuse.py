"""Faults in what runs PEFT's layers: in the calls, in what decides them, in the life cycle and the
report."""

TESTS = [
    "tests/hf/test_fuse.py",
    "tests/hf/test_fuse_bases.py",
    "tests/hf/test_fuse_calls.py",
    "tests/hf/test_fuse_report.py",
    "tests/hf/test_fuse_state.py",
    "tests/hf/test_fuse_engines.py",
    "-m",
    "not slow",
    "-k",
    "not processes and not compiled and not family_is and not trainer",
]

_LAYERS = "petal_kernels/hf/peft_layers.py"
_FUSE = "petal_kernels/hf/fuse.py"
_REPORT = "petal_kernels/hf/fuse_report.py"
_PARTS = "petal_kernels/hf/methods/lora_parts.py"
_FUSED = "petal_kernels/nn/lora_fused.py"
_LORA = "petal_kernels/nn/lora.py"
_ORDER = "petal_kernels/_runtime/first_order.py"

MUTANTS = [
    # the call
    (_LAYERS, "down=down, up=up, scale=self.scale, dropout", "down=down, up=up, dropout"),
    (_LAYERS, "scale=self.scale, dropout=self.dropout)", "scale=self.scale)"),
    (_LAYERS, "return own if own is not None and own.requires_grad else None", "return None"),
    (_LAYERS, "        added = self.scale * self.bias\n", "        added = self.bias\n"),
    (_LAYERS, "added if own is None else own + added", "added"),
    (_LAYERS, "            y = y + (self.scale * self.bias).to(y.dtype)\n", "            pass\n"),
    (_LAYERS, '"scale": self.scale, "dropout"', '"scale": 1.0, "dropout"'),
    (_LAYERS, 'dropout_at="input", **settings', "**settings"),
    (_LAYERS, "return found if fits else y + found.to(y.dtype)", "return found"),
    (_LAYERS, "fits = y.dtype == dtype and", "fits ="),
    (_LORA, "for part in (weight, own if bias is None else None):", "for part in (weight, own):"),
    # what decides
    (_LAYERS, '"" if args or kwargs or not', '"" if kwargs or not'),
    (_LAYERS, '"" if args or kwargs or not', '"" if args or not'),
    (_LAYERS, "or not _is_rows(x) else", "else"),
    (_LAYERS, "        if transforms_active():\n", "        if False:\n"),
    (_LAYERS, "        if layer.disable_adapters:\n", "        if False:\n"),
    (_LAYERS, "        if layer.merged_adapters:\n", "        if False:\n"),
    (
        _LAYERS,
        "if name in layer.lora_A]\n        if len(names) != 1:",
        "if name in layer.lora_A][:1]\n        if len(names) != 1:",
    ),
    (
        _LAYERS,
        "for name in layer.active_adapters if name in layer.lora_A]",
        "for name in layer.lora_A]",
    ),
    (_LAYERS, "        if name in layer.lora_variant:\n", "        if False:\n"),
    (_LAYERS, "not isinstance(scale, (int, float)) or not math", "not math"),
    (_LAYERS, "or not math.isfinite(scale):", "or False:"),
    (_LAYERS, 'if not getattr(layer, "cast_input_dtype_enabled", True):', "if False:"),
    (_LAYERS, 'zip(("lora_A", "lora_B"), factors, strict=True)', 'zip(("lora_A",), factors)'),
    (_LAYERS, 'zip(("lora_A", "lora_B"), factors, strict=True)', 'zip(("lora_B",), factors[1:])'),
    (
        _LAYERS,
        "not in (nn.Identity, nn.Dropout) or watched(dropout):",
        "is None or watched(dropout):",
    ),
    (_LAYERS, "nn.Dropout) or watched(dropout):", "nn.Dropout):"),
    (_LAYERS, "or not dropout.training:", "or False:"),
    (_LAYERS, "if dropout.p < 1.0 else None", "if True else None"),
    (_LAYERS, "    if name not in _FORWARDS:\n", "    if False:\n"),
    (_LAYERS, '    if "forward" in module.__dict__:\n', "    if False:\n"),
    (
        _LAYERS,
        'getattr(forward, "__qualname__", "")',
        'getattr(own, "__qualname__", "") + ".forward"',
    ),
    (
        _LAYERS,
        "    missing = [each for each in _READ if not hasattr(module, each)]",
        "    missing: list[str] = []",
    ),
    (
        _ORDER,
        "return not torch.compiler.is_compiling() and forward_ad._current_level >= 0",
        "return False",
    ),
    (_PARTS, "            asked = each.member()\n", "            asked = asked\n"),
    (_PARTS, "isinstance(m, (AdaptedLinear, Joins))", "isinstance(m, AdaptedLinear)"),
    (
        _PARTS,
        "        if isinstance(asked, str):\n            return asked\n",
        "        if isinstance(asked, str):\n            continue\n",
    ),
    (_FUSED, "        return member.operands(dtype, device)\n", '        return "not today"\n'),
    # the life cycle
    (
        _LAYERS,
        "return _remade, (plain_class(self),), self.__dict__",
        "return _remade, (type(self),), self.__dict__",
    ),
    (_LAYERS, "is not value for part in joined):", "is None for part in joined):"),
    (_LAYERS, "part.members.get(name, value) is not value", "name in part.members"),
    (_LAYERS, '        del module.__dict__["_petal"]\n', ""),
    (_LAYERS, "    if type(module) is adapted_class(own, Around):\n", "    if True:\n"),
    (_LAYERS, "return parts_of(part.outer) + parts_of(part.inner)", "return parts_of(part.outer)"),
    (_FUSE, "    unfuse(model)\n    fused", "    fused"),
    (_FUSE, "        if type(module) is not cls:\n", "        if False:\n"),
    (_FUSE, "    for module in around:\n        leave(module)\n", ""),
    (_FUSE, "        module.__class__ = plain_class(module)\n", "        pass\n"),
    (
        _FUSE,
        '    if "_petal" in parent.__dict__ or is_peft_layer(parent):',
        "    if is_peft_layer(parent):",
    ),
    (_FUSE, "not any(map(_is_attached, p.members.values()))", "True"),
    (_FUSE, "fused_mlp(None, parent, recompute)", "fused_mlp(None, parent, False)"),
    (_FUSE, "    _check_some(model, layers, declined)\n", ""),
    (_FUSE, "    check_tokens(tokens)\n", ""),
    (_FUSE, "    if is_peft_layer(model):\n", "    if False:\n"),
    # the report
    (
        _REPORT,
        "_PEFT, declined[path]) if path in declined else",
        '"", "") if path in declined else',
    ),
    (_REPORT, "            self.called[path] = found\n", "            pass\n"),
    (_REPORT, "compute_dtype(torch.empty(0, dtype=dtype))", "dtype"),
    (_REPORT, "if id(p) not in maker.adapters)\n    counts", "if True)\n    counts"),
    (_REPORT, '{**layer._modules, "base_layer": base}', "layer._modules"),
    (_REPORT, "return twin_of(layer, _modules", "return layer or twin_of(layer, _modules"),
    (
        _REPORT,
        "        if any(watched(each) for each in",
        "        if False and any(watched(each) for each in",
    ),
    (_REPORT, "if key not in seen)", "if key in seen)"),
    (_REPORT, "        if joined and call.part is not None:", "        if call.part is not None:"),
]
