"""Faults in what writes the pages: a refusal that is not found, a caller's words that are lost, a
table that no page has, an arrow beside its box."""

TESTS = [
    "tests/docs/test_refusals.py",
    "tests/docs/test_pages.py",
    "tests/benchmarks/test_tables.py",
    "-k",
    "not python_runs and not readme_shows",
]

_MESSAGES = "docs/tools/messages.py"
_REFUSALS = "docs/tools/refusals.py"
_PICTURES = "docs/tools/pictures.py"
_HOOKS = "docs/tools/hooks.py"
_TABLES = "benchmarks/tables.py"
_CHART = "petal_kernels/tools/demo/chart.py"

MUTANTS = [
    (_MESSAGES, 'isinstance(node, (ast.Raise, ast.Return))', "isinstance(node, ast.Raise)"),
    (_MESSAGES, "    for _ in range(3):\n", "    for _ in range(1):\n"),
    (_MESSAGES, "given = helper.defaults | dict(", "given = dict("),
    (_MESSAGES, "for k in call.keywords if k.arg is not None}", "for k in []}"),
    (_MESSAGES, "[*self.read(node.body), *self.read(node.orelse)]", "[*self.read(node.body)]"),
    (_MESSAGES, "{a.asname or a.name: f", "{a.name: f"),
    (_MESSAGES, "            owners.append((node, node))\n", ""),
    (_MESSAGES, '"unsupported" in name', "False"),
    (_MESSAGES, "if len(strings) == len(values) else [*found, (GAP,)]", ""),
    (_REFUSALS, "return max(found, key=lambda each: each[0])[1] if found else None", "return None"),
    (_REFUSALS, 'if part in message.text)', "if part == message.text)"),
    (_REFUSALS, "        if area_of(message.module) is area:\n", "        if area is AREAS[0]:\n"),
    (_HOOKS, "page(messages())", 'page([])'),
    (_PICTURES, "right = a.x + a.width / 2, b.x - b.width / 2", "right = a.x, b.x"),
    (_TABLES, "    if missing:\n", "    if False:\n"),
    (_TABLES, '*sorted((root / "docs").rglob("*.md"))', ""),
    (_TABLES, "    if unknown:\n", "    if False:\n"),
    (_TABLES, "drawn if _texts(drawn) == _texts(made) else made", "drawn"),
    (_CHART, 'comparison"]["milliseconds"]', 'comparison"]["saved_bytes"]'),
]  # fmt: skip
