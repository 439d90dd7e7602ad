"""Faults in the one mechanism of the model layer: what a call depends on, parts and frames, copies,
merging, reports, and what attach checks and detach gives back."""

TESTS = [
    "tests/hf/test_lifecycle.py",
    "tests/hf/test_attach.py",
    "tests/hf/test_whole.py",
    "tests/hf/test_whole_follow.py",
    "tests/hf/test_merged.py",
    "tests/hf/test_holders.py",
    "tests/hf/test_report.py",
    "tests/hf/test_checkpointing.py",
    "tests/hf/test_compile.py",
    "tests/hf/test_layer_hooks.py",
    "tests/hf/test_dropped_mask.py",
    "tests/hf/test_expert_routing.py",
    "tests/hf/test_methods.py",
    "tests/hf/test_methods_hooks.py",
    "tests/hf/test_methods_state.py",
    "tests/hf/test_methods_engines.py",
    "-m",
    "not slow",
    "-k",
    "not processes",
]

_CONTEXT = "petal_kernels/hf/context.py"
_PARTS = "petal_kernels/hf/parts.py"
_METHOD = "petal_kernels/hf/method.py"
_FOUND = "petal_kernels/hf/found.py"
_ATTACHMENT = "petal_kernels/hf/attachment.py"
_ATTACH = "petal_kernels/hf/attach.py"
_WHOLE = "petal_kernels/hf/whole.py"
_WRAPPERS = "petal_kernels/hf/wrappers.py"
_MERGING = "petal_kernels/hf/merging.py"
_REPORT = "petal_kernels/hf/report.py"
_FIELDS = "petal_kernels/hf/fields.py"
_HOLDERS = "petal_kernels/hf/holders.py"
_ASKED = "petal_kernels/hf/asked.py"
_INSTALLED = "petal_kernels/hf/installed.py"

MUTANTS = [
    (
        _CONTEXT,
        "            _BLOCKS.set(tuple(b for b in _BLOCKS.get() if b is not block))",
        "            _BLOCKS.set(_BLOCKS.get()[:-1])",
    ),
    (
        _CONTEXT,
        "            _BLOCKS.set(tuple(b for b in _BLOCKS.get() if b is not block))",
        "            pass",
    ),
    (
        _CONTEXT,
        "        block.open = False  # for whoever copied the context meanwhile",
        "        pass",
    ),
    (_CONTEXT, "        blocks = _BLOCKS.get()\n", "        blocks = THREAD.blocks\n"),
    (_CONTEXT, "        blocks = THREAD.blocks\n", "        blocks = _BLOCKS.get()\n"),
    (_CONTEXT, "class _Thread(threading.local):", "class _Thread:"),
    (_CONTEXT, "if b.owner is owner and b.open]", "if b.open]"),
    (_CONTEXT, "on=all(b.kind != OFF for b in own)", "on=own[-1].kind != OFF"),
    (_CONTEXT, "{b.kind: b.value for b in own if", "{b.kind: b.value for b in reversed(own) if"),
    (_CONTEXT, "            return frame.call.given\n", "            return given(owner)\n"),
    (_CONTEXT, "        self.grad = torch.is_grad_enabled()", "        self.grad = False"),
    (
        _PARTS,
        "kwargs))\n        finally:\n            THREAD.frame = frame.outer",
        "kwargs))\n        finally:\n            pass",
    ),
    (_PARTS, "            THREAD.running = before", "            pass"),
    (
        _PARTS,
        '        call: Call = kwargs.pop("petal_call", None) or self.method.call_of(self)',
        '        kwargs.pop("petal_call", None)\n        call = self.method.call_of(self)',
    ),
    (
        _PARTS,
        "if plain and (torch.compiler.is_compiling() or not _is_checkpointed(module)):",
        "if plain:",
    ),
    (_PARTS, "            call.reentrant.add(self.index)", "            pass"),
    (
        _PARTS,
        "            # does not detach what a keyword holds.\n            shared = None",
        "            # does not detach what a keyword holds.\n            pass",
    ),
    (_PARTS, "            if why:\n", "            if False:\n"),
    (_PARTS, "args = (args[0].detach().requires_grad_(), *args[1:])", "pass"),
    (
        _PARTS,
        "next((key for key, value in named if value is source), None)",
        "None",
    ),
    (_PARTS, '        if getattr(module, "_is_replica", False):', "        if False:"),
    (
        _PARTS,
        "type(cls.__name__, (mixin, cls), names)",
        'type("Adapted" + cls.__name__, (mixin, cls), names)',
    ),
    (
        _PARTS,
        "return _rebuild, (own_class(self), type(self).__mro__[1]), self.__dict__",
        "return _rebuild, (own_class(self), Adapted), self.__dict__",
    ),
    (
        _PARTS,
        "return super().__getattr__(name) if value is None else value",
        "return super().__getattr__(name)",
    ),
    (
        _PARTS,
        "        if torch.compiler.is_compiling():\n            hooks",
        "        if True:\n            hooks",
    ),
    (_PARTS, "            if hooks and all(name ==", "            if hooks or all(name =="),
    (
        _METHOD,
        "        says = given(self)\n        if not says.on:",
        "        says = given(self)\n        if False:",
    ),
    (_METHOD, "            self.dropped.look(kwargs)", "            pass"),
    (_METHOD, "if crosses and blip else None", "if blip else None"),
    (_METHOD, "        first = stack.number == 0", "        first = True"),
    (
        _METHOD,
        "return running_call(self, layer.stack) or Call(given(self))",
        "return Call(given(self))",
    ),
    (
        _METHOD,
        "        return dtype, device_of(like)",
        "        return torch.float32, device_of(like)",
    ),
    (_FOUND, "    found.notes += _left(model, config, found, candidates, families)\n", ""),
    (
        _INSTALLED,
        "            mixin, module.__class__ = type(module).__mro__[1], own\n",
        "            mixin = type(module).__mro__[1]\n",
    ),
    (_INSTALLED, 'if k.startswith("_petal")}', 'if k == "_petal"}'),
    (_INSTALLED, "                del module.__dict__[name]", "                pass"),
    (_INSTALLED, '                module.__dict__["forward"] = forward', "                pass"),
    (
        _INSTALLED,
        '            module.__dict__["forward"] = PatchedForward(module, forward)',
        "            pass",
    ),
    (
        _ATTACHMENT,
        "parameter.requires_grad_(self._required[name])",
        "parameter.requires_grad_(True)",
    ),
    (_ATTACHMENT, "        model.requires_grad_(False)\n", ""),
    (_INSTALLED, "        self.adapter.train(self.model.training)\n", ""),
    (_INSTALLED, "            if parent._modules.get(child) is wrapper:", "            if True:"),
    (_ATTACHMENT, "        if gone:\n", "        if False:\n"),
    (
        _ATTACHMENT,
        "            if id(module) not in there and id(module) not in self.installed.guards",
        "            if id(module) not in there",
    ),
    (
        _MERGING,
        "    if _is_merged(adapter) and not prefix",
        "    if not _is_merged(adapter) and not prefix",
    ),
    (
        _MERGING,
        "    return merged is not None and merged.is_whole",
        "    return merged is not None",
    ),
    (_ATTACHMENT, "        if self._merged is not None:\n            self.unmerge()\n", ""),
    (_INSTALLED, "        self._bind_copies()\n", ""),
    (
        _INSTALLED,
        "any(id(p) in trained for p in module._parameters.values() if p is not None)",
        "False",
    ),
    (_ASKED, "    return dataclasses.replace(config)\n", "    return config\n"),
    (_ATTACH, "    check_holders(model)\n", ""),
    (_HOLDERS, "(*model.modules(), *holders)", "model.modules()"),
    (_HOLDERS, "    if loose:\n", "    if False:\n"),
    (_ATTACH, '        if made.__dict__.get("_attached"):\n            made.detach()\n', ""),
    (_ATTACH, "(*made.method.found.notes, frozen)", "(frozen,)"),
    (_WHOLE, "            if id(parameter) in self._known:", "            if False:"),
    (
        _WHOLE,
        "        return value if value is not None and now(self.method).on else None",
        "        return value",
    ),
    (_WHOLE, "dtype, copy=True))", "dtype))"),
    (
        _WHOLE,
        "dtype = torch.float32 if value.dtype == torch.float16 else value.dtype",
        "dtype = value.dtype",
    ),
    (
        _WHOLE,
        "        return self.shared.get(name, (self.holder, name))",
        "        return self.holder, name",
    ),
    (_WHOLE, "        return current is value", "        return False"),
    (
        _WHOLE,
        "        if current is not value and name in self.holder._buffers:",
        "        if False:",
    ),
    (
        _WHOLE,
        "own is not None and copied is not None and own.dtype != copied.dtype",
        "False",
    ),
    (_WHOLE, "            return output.to(narrow)", "            return output"),
    (_WRAPPERS, "        if not now(self.method).on:", "        if False:"),
    (
        _WRAPPERS,
        "        if self.merged is None:\n            return super().forward(x)",
        "        if True:\n            return super().forward(x)",
    ),
    (_WRAPPERS, "isinstance(self.base, nn.Linear) else weight.t()", "True else weight.t()"),
    (_WRAPPERS, "        if self.training:\n", "        if False:\n"),
    (
        _MERGING,
        "exact = weight.to(update.dtype) + update",
        "exact = weight.to(update.dtype) - update",
    ),
    (_MERGING, "        for parameter in self.frozen:", "        for parameter in []:"),
    (_MERGING, "            each.check()\n", "            pass\n"),
    (_MERGING, "    for module in folded_from - kept_from:", "    for module in folded_from:"),
    (_MERGING, "        merged.freeze(module.parameters())", "        pass"),
    (_MERGING, "            original.data = original.data.to(now)", "            pass"),
    (_REPORT, "        lines += self.notes\n", ""),
    (_REPORT, "            count = 0 if id(module) in seen else count\n", ""),
    (_FIELDS, "    found = [str(item) for item in value]", "    found = value"),
]
