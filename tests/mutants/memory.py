"""Faults in what the memory profiler counts: each factor of its sums, each way of keeping, and what
it must leave alone."""

TESTS = [
    "tests/tools/test_memory_inputs.py",
    "tests/tools/test_memory_allocator.py",
    "tests/tools/test_memory_rules.py",
    "tests/tools/test_memory_untouched.py",
    "tests/tools/test_memory.py",
    "tests/tools/test_memory_advice.py",
]

_PROFILER = "petal_kernels/memory/profiler.py"
_RECORDING = "petal_kernels/memory/recording.py"
_PROFILE = "petal_kernels/memory/profile.py"
_SAVED = "petal_kernels/memory/saved.py"
_GRAPH = "petal_kernels/memory/graph.py"
_REST = "petal_kernels/memory/rest.py"
_RECORDS = "petal_kernels/memory/records.py"
_LEAVES = "petal_kernels/memory/leaves.py"
_RULES = "petal_kernels/memory/cuda_rules.py"
_FAKE = "petal_kernels/memory/fake.py"
_MODULES = "petal_kernels/memory/modules.py"
_BEHIND = "petal_kernels/memory/behind.py"
_COMPILED = "petal_kernels/memory/compiled.py"
_TIMELINE = "petal_kernels/memory/timeline.py"

MUTANTS = [
    # Sums: tied and shared tensors, views, parameters, buffers, gradients, batch.
    (_RECORDING, "    seen.update(parts)\n", ""),
    (
        _RECORDING,
        "new = [part for key, part in parts.items() if key not in seen]",
        "new = list(parts.values())",
    ),
    ("petal_kernels/memory/gradients.py", "found[storage_key(part)] = ", "found[len(found)] = "),
    (_RECORDING, "part.numel() for t in trained", "1 for t in trained"),
    (_RECORDING, "if t.requires_grad}.values())\n    sizes.tr", "}.values())\n    sizes.tr"),
    (_RECORDING, "fresh(trained, set(seen))", "fresh(trained, seen)"),
    (_RECORDING, "sizes.buffers = fresh(buffers.values(), seen)", "sizes.buffers = 0"),
    (_RECORDING, "sizes.batch = fresh(tensors_in(batch), seen)", "sizes.batch = 0"),
    (_PROFILER, "storages(r.own | r.buffers | met", "storages(r.own | met"),
    (_PROFILER, "        keys(batch),\n", "        set(),\n"),
    (_RECORDS, "return int(t.untyped_storage().nbytes())", "return t.nbytes"),
    (_RECORDS, "return int(t.untyped_storage()._cdata)", "return t.data_ptr()"),
    (_RECORDS, "if isinstance(part, Tensor):", "if True:"),
    (_PROFILE, "return sum(record.bytes for record in self.saved)", "return len(self.saved)"),
    (_PROFILE, "if not record.of_batch)\n        return saved", ")\n        return saved"),
    (_PROFILE, "return saved + self.sizes.outputs", "return saved"),
    # Ways of keeping.
    (_SAVED, "list(graph.attributes(node))", "[]"),
    (_SAVED, "held += [(argument, t) for t in graph.tensors_under(value)]", "pass"),
    (_SAVED, "elif not _is_number(value):", "else:"),
    (_SAVED, "elif size:", "else:"),
    (_SAVED, "        frame.tickets_of_profile = tickets", "        del tickets"),
    (_GRAPH, "if type(node).__name__ == REENTRANT and name in _GENERATORS", "if False"),
    (_GRAPH, "return list(value.values())", "return []"),
    (_REST, "        self._open += [b for b in self._returned if b.died is None]\n", ""),
    (
        _REST,
        'if block.died is not None:\n                block.category = "saved',
        'if False:\n                block.category = "saved',
    ),
    (_REST, '                block.category = "outputs"\n', "                pass\n"),
    (_REST, "if key in own else", "if False else"),
    (_REST, "sizes.elsewhere = sum(", "sizes.elsewhere = 0 * sum("),
    (
        _PROFILER,
        "saved += rest.graph_dropped(r.sizes)",
        "rest.graph_dropped(r.sizes)",
    ),
    (_PROFILER, "        rest.outputs_dropped()\n", ""),
    (_PROFILER, "        recorder.nodes = {}\n", ""),
    (_PROFILER, "        return step(hooks=False)", "        raise"),
    (_SAVED, "if node._sequence_nr() < self._first:", "if False:"),
    (_PROFILER, "return value.detach().requires_grad_()", "return value"),
    (_PROFILER, "if backward and recorder.before:", "if False:"),
    (_RECORDING, "return sorted({t.get_device()", "return sorted({0 * t.get_device()"),
    # CUDA's rule.
    (_RULES, "    F.scaled_dot_product_attention: _attention,\n", ""),
    (_RULES, "    _ATTENTION: _attention,\n", ""),
    (_RULES, "    _ATTENTION.default: _attention,\n", ""),
    (_RULES, "    torch.dropout: _dropout,\n", ""),
    (_RULES, "    _DROPOUT: _dropout,\n", ""),
    (_RULES, "    _DROPOUT.default: _dropout,\n", ""),
    (_RULES, "p in (0.0, 1.0)", "p == 0.0"),
    (_RULES, "if query.dtype == torch.float64:", "if False:"),
    (_RULES, "mask is not None and mask.dtype == torch.bool", "False"),
    (_RULES, 'return t.to(torch.get_autocast_dtype("cpu")) if lowers else t', "return t"),
    (
        _RULES,
        '_COMPOSED = ("torch.nn.functional", "torch.autograd")',
        '_COMPOSED = ("torch.autograd",)',
    ),
    (
        _RULES,
        '_COMPOSED = ("torch.nn.functional", "torch.autograd")',
        '_COMPOSED = ("torch.nn.functional",)',
    ),
    (_RULES, " or func is Tensor.backward", ""),
    (_RULES, "kinds = (torch.jit.ScriptModule, nn.RNNBase)", "kinds = (torch.jit.ScriptModule,)"),
    # What is left alone.
    (_PROFILER, "        r.contexts.enter_context(without_gradients(others, trained))\n", ""),
    (_LEAVES, "        for t, grad in own:\n            t.grad = grad\n", "        pass\n"),
    (_LEAVES, "                    value.copy_(copy)\n", "                    pass\n"),
    (_LEAVES, "            module._buffers[name] = value\n", ""),
    (_LEAVES, "if t.requires_grad and t.is_leaf]", "if t.requires_grad]"),
    (_LEAVES, "elif copy is None and value._version != version:", "elif False:"),
    (_RECORDING, "        changed += [name for name", "        _ = [name for name"),
    (_RECORDING, "        contexts.enter_context(_ONE)\n", ""),
    (_TIMELINE, "        return True\n\n    def begin", "        return False\n\n    def begin"),
    (_LEAVES, "        return True\n\n    def __torch", "        return False\n\n    def __torch"),
    (_SAVED, "if isinstance(owner, SavedTensors):", "if True:"),
    (_COMPILED, "        return None  # run", "        return found  # run"),
    (_COMPILED, "    if met:\n        raise", "    if False:\n        raise"),
    (_RECORDING, "            contexts.enter_context(refused())\n", ""),
    (_MODULES, "frame = frame.f_back\n        return None", "break\n        return None"),
    # Sentences, and what is found out.
    (_FAKE, "if mode is None or not _raised_by_torch(error):", "if True:"),
    (_FAKE, "if mode is None or not _raised_by_torch(error):", "if mode is None:"),
    (_MODULES, "found = self._name(traceback.tb_frame) or found", "found = found"),
    (_FAKE, "        if key not in self._bases:", "        if True:"),
    (_PROFILER, "if loss is None else _checked(loss(output))", "if loss is None else loss(output)"),
    (_BEHIND, "_globals_of(function.__code__) & function.__globals__.keys()", "set[str]()"),
    (_BEHIND, "if isinstance(value, functools.partial):", "if False:"),
    (_BEHIND, "    inner = {id(m)", "    inner = {0 * id(m)"),
    (_LEAVES, "        if isinstance(t, nn.Parameter):\n            self._add(t)\n", ""),
    (_LEAVES, "any(parameter is each for each in own)", "False"),
]
