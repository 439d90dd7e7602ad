"""Faults in LoRA: the module, what a config names, the model's parts, PEFT's configs, plans."""

TESTS = [
    "tests/nn/test_lora.py",
    "tests/hf/test_lora_config.py",
    "tests/hf/test_lora_linears.py",
    "tests/hf/test_lora_peft.py",
    "tests/hf/test_plan.py",
    "tests/hf/test_methods.py",
    "tests/hf/test_methods_state.py",
    "tests/hf/test_methods_engines.py",
    "-m",
    "not slow",
    "-k",
    "(lora or peft or plan) and not processes",
]

_LORA = "petal_kernels/nn/lora.py"
_CONFIG = "petal_kernels/hf/lora_config.py"
_LINEARS = "petal_kernels/hf/linears.py"
_METHOD = "petal_kernels/hf/methods/lora.py"
_PEFT = "petal_kernels/hf/peft_config.py"
_TWINS = "petal_kernels/hf/twins.py"
_ATTACH = "petal_kernels/hf/attach.py"
_ATTACHMENT = "petal_kernels/hf/attachment.py"
_FILES = "petal_kernels/hf/files.py"
_REPORT = "petal_kernels/hf/report.py"
_OPERATOR = "petal_kernels/ops/lowrank_linear/function.py"
_INSTALLED = "petal_kernels/hf/installed.py"

MUTANTS = [
    (_LORA, "alpha / (math.sqrt(r) if rslora else r)", "alpha / r"),
    (_LORA, "isinstance(base, nn.Linear) else weight.t()", "True else weight.t()"),
    (_LORA, 'dropout_at="input"', 'dropout_at="bottleneck"'),
    (_LORA, "rows = x if x.dtype == dtype else x.to(dtype)", "rows = x.clone().to(dtype)"),
    (_LORA, "        if part.dtype != dtype:\n", "        if False:\n"),
    (_LORA, "if part.requires_grad and torch.is_grad_enabled():", "if False:"),
    (_LORA, "self.dropout if self.training else 0.0", "self.dropout"),
    (_LORA, "delta: Tensor = self.scale * (", "delta: Tensor = ("),
    (_LORA, "self.down.normal_(std=1.0 / self.r)", "self.down.normal_()"),
    (_LORA, "        if init is False:", "        if True:"),
    (_LORA, "return y + self._update(x, down, up, **more).to(y.dtype)", "return y"),
    (_CONFIG, "tuple(part for part in PARTS if part in self.parts)", "tuple(self.parts)"),
    (_CONFIG, "wanted.lower() == ALL_LINEAR", "wanted == ALL_LINEAR"),
    (_LINEARS, 'id(child) in heads and own == "projector"', "False"),
    (_LINEARS, "        if each is config:", "        if False:"),
    (_LINEARS, "            if id(seen.module) in heads or", "            if"),
    (_LINEARS, "seen.saved or _is_router(seen):", "seen.saved:"),
    (_LINEARS, 'return seen.name == "gate" and beside', 'return seen.name == "gate"'),
    (_LINEARS, 'seen.module._parameters.get("weight", seen)) in tied:', "seen.module) in tied:"),
    (_LINEARS, "(read if seen.read_by else found).append(seen)", "found.append(seen)"),
    (_LINEARS, 'path.endswith(f".{name}")', "path.endswith(name)"),
    (_LINEARS, "if wanted is None or path in (config.target_modules or ()):", "if wanted is None:"),
    (_LINEARS, 'patterns or ["[^.]*"]', 'patterns or ["layers"]'),
    (_LINEARS, 're.match(rf"(.*\\.)?({pattern})$", path)', 're.search(rf"({pattern})$", path)'),
    (_LINEARS, "chosen = {id(s): s for hit in hits", "chosen = {id(s): s for hit in hits[:1]"),
    (_LINEARS, "        self._note_tied()\n", ""),
    (_METHOD, "of_pattern(config.rank_pattern, place.path, config.r)", "config.r"),
    (_METHOD, "            if has and id(module) not in saved:", "            if has:"),
    (_METHOD, "hand.take(layer.module, LayerPart(self, layer.index, 0))", "pass"),
    (_METHOD, "return lora.forward(x, self.trained_bias())", "return lora.forward(x)"),
    (_METHOD, "        return why_not_readable(base)", '        return ""'),
    (_PEFT, "and value != default:", "and False:"),
    (_PEFT, '        same["parts"] = PARTS\n', "        pass\n"),
    (_PEFT, "own = [head for head in heads if", "own = [head for head in () if"),
    (_PEFT, '    if kind != "LORA" or', "    if"),
    (_TWINS, "if name in HOOKS or", "if"),
    (
        _TWINS,
        "value is None or not (type(value) is nn.Parameter",
        "value is None or True or (False",
    ),
    (_ATTACH, "    twin = skeleton(model)\n", "    twin = model\n"),
    (_ATTACH, "with FakeTensorMode(allow_non_fake_inputs=True):", "if True:"),
    (_INSTALLED, "                setattr(other, name, wrapper)\n", ""),
    (_INSTALLED, "in (*places, *self.again):\n            if", "in places:\n            if"),
    (
        _INSTALLED,
        "            self._read(module, copies.hold(path, module, names, buffers",
        "            (None, copies.hold(path, module, names, buffers",
    ),
    (_FILES, "        if mirrors:\n", "        if False:\n"),
    (_REPORT, "trainable=sum(r.trainable for r in own)", "trainable=own[0].trainable"),
    (_OPERATOR, "math.prod(lead), call.middle", "lead.numel(), call.middle"),
]
