"""Faults in what a layer says of itself, in parts of fused linears, and in an image's tokens."""

TESTS = [
    "tests/hf/test_roles.py",
    "tests/hf/test_told_models.py",
    "tests/hf/test_families.py",
    "tests/nn/test_gated_adapter.py",
    "tests/hf/test_compile.py::test_a_layer_of_every_method_is_one_graph",
    "-m",
    "not slow",
]

_FLOW = "petal_kernels/hf/flow.py"
_ROLES = "petal_kernels/hf/roles.py"
_FOUND = "petal_kernels/hf/found.py"
_TOKENS = "petal_kernels/hf/tokens.py"
_BLOCKS = "petal_kernels/hf/blocks.py"
_METHOD = "petal_kernels/hf/method.py"
_LORA = "petal_kernels/nn/routed_lora.py"
_ROWS = "petal_kernels/_runtime/rows.py"

MUTANTS = [
    # The flow through a forward.
    (_FLOW, "joined[name] = joined.get(name, _NOTHING) | value", "joined[name] = value"),
    (_FLOW, "if none and isinstance(test.ops[0], ast.IsNot):", "if False:"),
    (_FLOW, "                self._put(loop.target, value)\n", ""),
    (_FLOW, "            if all(given):\n", "            if False:\n"),
    (_FLOW, 'if node.attr in ("T", "mT") else _NOTHING', "if True else _NOTHING"),
    (_FLOW, "return frozenset({Source(child, \"linear\")})", "return every"),
    (_FLOW, "            if own:\n", "            if False:\n"),
    (_FLOW, "if given and node.func.attr in _CUTS:", "if False:"),
    (_FLOW, 'if name == "scaled_dot_product_attention":', "if False:"),
    (_FLOW, "*(named[name] for name in rest if name in named)]", "]"),
    (_FLOW, "first.id == self.own:", "True:"),
    (_FLOW, "source.form == PIECES or (source.form == RAW and source.dim == 0)", "True"),
    (_FLOW, "or (source.form == RAW and source.dim == 0)):", "):"),
    (_FLOW, "if source.form != RAW or not lead or not whole or", "if not lead or not whole or"),
    (
        _FLOW,
        "0 if last.lower is None else 2 if last.upper is None else 1",
        "0 if last.lower is None else 1",
    ),
    (_FLOW, "    if name in _KEEPS_COLUMNS:\n        return source\n", ""),
    (_FLOW, "and along in (-1, 2)", ""),
    (_FLOW, "in (dim, -3)", "is not None"),
    (_FLOW, "threes[0] == len(args) - 3:", "True:"),
    (_FLOW, "and args and _constant(args[0]) == dim:", ":"),
    # Roles.
    (_ROLES, "(query.part, key.part, value.part) != (0, 1, 2):", "False:"),
    (_ROLES, "if any(len(values) != 1 for values in joined):", "if False:"),
    (_ROLES, "if _said(name) not in (None, role):", "if False:"),
    (_ROLES, "if key == value and key and not key & query:", "if False:"),
    (_ROLES, "(key | value) - query))", "(key | value) - key))"),
    (
        _ROLES,
        "    if flow is None or not set(names) <= flow.reads.keys():\n"
        "        return Attention(names)\n"
        "    return _with_reads(names, flow)",
        "    return Attention(names)",
    ),
    (_ROLES, "return (query, rest // 2, rest // 2)", "return (total // 3,) * 3"),
    (_ROLES, "if attention.crosses_with & _given(layer, path):", "if attention.crosses_with:"),
    (_ROLES, "if attention.crosses_with & _given(layer, path):", "if False:"),
    (
        _ROLES,
        "    return given.union(*(names[: len(call.args)] for call in calls))",
        "    return given",
    ),
    (_ROLES, "if path in called else []", ""),
    (_ROLES, "    if mlp in called:\n", "    if mlp:\n"),
    (_ROLES, '"decoder" if takes_cache(layer) else "encoder"', '"decoder"'),
    (_ROLES, "encoded=attention.crosses and role", "encoded=role"),
    (_ROLES, "parts = 3 if same else attention.widths", "parts = 3"),
    (_ROLES, "found = named if len(others) > 1 else others", "found = others"),
    (_ROLES, "parameter.dim() > 1 for", "parameter.dim() > 9 for"),
    (_ROLES, "    if len(attentions) > 1:\n", "    if False:\n"),
    # Which layers.
    (_FOUND, 'or parts.get(id(module)) != "language":', "or False:"),
    (_FOUND, 'if decodes and row.name != "decoder":', "if False:"),
    (_FOUND, "if told.sites and (told.decodes or not half):", "if told.sites:"),
    (_FOUND, "half = half or told.is_half", "half = told.is_half"),
    (_FOUND, "if id(held[id(module)][2]) in lists", "if False"),
    (_FOUND, 'key=lambda named: named[0].count(".")', "key=lambda named: 0"),
    (
        _FOUND,
        "count = sum(len(each.layers) for each in sites.values())",
        "count = len(site.layers) * 2",
    ),
    (_METHOD, "        if not self.found.places:\n", "        if False:\n"),
    # Parts of a fused linear.
    (
        _LORA,
        "update_at=sum(self.widths[:target]) if own",
        "update_at=target * self.widths[0] if own",
    ),
    (_LORA, "rows[target] = self.scale", "rows[-1] = self.scale"),
    (_LORA, "        if sum(widths) != total:\n", "        if False:\n"),
    (_LORA, "y.split(self.widths, dim=-1)", "y.chunk(self.parts, dim=-1)"),
    # An image's tokens.
    (_TOKENS, '("image_token_id", "video_token_id")', '("image_token_id",)'),
    (_TOKENS, '("encoder_hidden_states", "cross_attention_states")', '("encoder_hidden_states",)'),
    (_TOKENS, "        if encoded and rows != self.rows:\n", "        if False:\n"),
    (
        _BLOCKS,
        "domain = torch.where(where, image, text)",
        "domain = torch.where(where, text, image)",
    ),
    (_BLOCKS, "if any(layer.row.cross_block for layer in found.layers):", "if False:"),
    (_BLOCKS, "if any(layer.row.layer for layer in found.layers):", "if False:"),
    (
        _BLOCKS,
        "return self.domains(domain, generated=text, image=image)",
        "return self.domains(domain, generated=image, image=image)",
    ),
    (
        _BLOCKS,
        "return self.domains(domain, generated=text, image=image)",
        "return self.domains(domain, generated=text, image=text)",
    ),
    (_BLOCKS, "        self._check_experts(image=image, text=text)\n", ""),
    # A graph.
    (_ROWS, "found[n] = each.view_as(each)", "pass"),
]  # fmt: skip
