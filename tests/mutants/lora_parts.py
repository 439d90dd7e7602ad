"""Faults in what runs LoRA linears in one call, and in what decides that they may."""

TESTS = ["tests/hf/test_lora_parts.py", "tests/hf/test_structure.py"]

_PARTS = "petal_kernels/hf/methods/lora_parts.py"
_STRUCTURE = "petal_kernels/hf/structure.py"
_FUSED = "petal_kernels/nn/lora_fused.py"
_LORA = "petal_kernels/nn/lora.py"

MUTANTS = [
    (_PARTS, "version = None if x.is_inference() else x._version", "version = None"),
    (_PARTS, "            if self.outputs:  # of", "            if False:  # of"),
    (_PARTS, "key = (id(x), version, ", "key = (version, "),
    (_PARTS, "or not now(self.method).on:", "or False:"),
    (_PARTS, "is not self.act or watched(self.act):", "is not self.act:"),
    (_PARTS, "if own.get(self.form.act) is not self.act or", "if"),
    (_PARTS, "is not member or watched(member):", "is not member:"),
    (_PARTS, "isinstance(member, AdaptedLinear) and member.merged is not None", "False"),
    (_PARTS, "        for name in self.form.after:", "        for name in ():"),
    (_PARTS, "recompute=self.recompute)", "recompute=False)"),
    (_FUSED, '        or "forward" in module.__dict__\n', ""),
    (_FUSED, "        or module._forward_pre_hooks\n", ""),
    (_FUSED, "        module._forward_hooks\n        or ", "        "),
    (_FUSED, "scale=[each.scale for each in given],\n            dropout=first", "dropout=first"),
    (_FUSED, "            dropout=first.dropout,\n", ""),
    (_FUSED, "dropout=drops.pop() if drops else 0.0", "dropout=0.0"),
    (_FUSED, "    if watched(lora):\n", "    if False:\n"),
    (_LORA, "bias.to(device=device, dtype=dtype))", "own)"),
    (_STRUCTURE, "node.op not in unread]", 'node.op == "output"]'),
    (_STRUCTURE, "for training in (False, True)}", "for training in (True,)}"),
    (_STRUCTURE, "[7, 12, 40, 1e3, 1e6]", "[]"),
    (_STRUCTURE, "    if seen != len(nodes):", "    if False:"),
    (_STRUCTURE, "if call.name and times.count(call.child) == 1:", "if call.name:"),
    (_STRUCTURE, "if name == call.name and order < call.order)", "if False)"),
    (_STRUCTURE, "(call.name, written, call.body)", "(call.name, written, 0)"),
    (_STRUCTURE, "given = [*call.args, *call.keywords]", "given = call.args"),
    (_STRUCTURE, "function.args.args[0].arg  #", '"self"  #'),
    (_STRUCTURE, "(mlp.gate, mlp.up, mlp.down) if n) != sorted(linears):", "()) != []:"),
    (_STRUCTURE, "activation is not None and dropouts else None", "activation else None"),
    (_STRUCTURE, "rtol=1e-12, atol=1e-12", "rtol=1e-2, atol=1e-2"),
]
