"""Faults in what a user is told of a mistake: which name was meant, and what to do instead."""

TESTS = [
    "tests/runtime/test_columns.py",
    "tests/runtime/test_keywords.py",
    "tests/hf/test_config.py",
    "tests/hf/test_told.py",
]

_KEYWORDS = "petal_kernels/_runtime/keywords.py"
_CONFIG = "petal_kernels/hf/adapter_config.py"
_TUNERS = "petal_kernels/hf/tuners.py"
_LINEARS = "petal_kernels/hf/linears.py"
_FROZEN = "petal_kernels/hf/frozen.py"
_FUSE = "petal_kernels/hf/fuse.py"
_ATTACHMENT = "petal_kernels/hf/attachment.py"
_ATTACH = "petal_kernels/hf/attach.py"

MUTANTS = [
    ("petal_kernels/_runtime/columns.py", "value == 0 or float(text) != 0", "True"),
    ("petal_kernels/_runtime/columns.py", "if value > 0 else", "if True else"),
    (_KEYWORDS, "if _WORDS.get(name) in known:", "if name in _WORDS:"),
    (_KEYWORDS, "get_close_matches(name.lower(), lower, 1, _LEAST)", "get_close_matches('', '')"),
    (_KEYWORDS, "return within[0] if within else", "return"),
    (_KEYWORDS, "any(each.kind is each.VAR_KEYWORD for each in parameters.values())", "False"),
    (_CONFIG, "        check(cls.__init__, values,", "        check(cls.__init__, (),"),
    (_CONFIG, "lambda: cls.elsewhere", "dict"),
    (_TUNERS, "        check(cls.__init__, values,", "        check(cls.__init__, (),"),
    (_ATTACH, "@keywords.checked(_of_configs)\ndef attach(", "@keywords.checked()\ndef attach("),
    (_ATTACH, "@keywords.checked(_of_configs)\ndef plan(", "def plan("),
    (_FUSE, "@keywords.checked()\n", ""),
    ("petal_kernels/hf/asked.py", "if isinstance(config, type):", "if False:"),
    (_LINEARS, "closest(name, ends_like(name, inside))", "closest(name, ends_like(name, every))"),
    (_LINEARS, "for seen in inside or every][:2]", "for seen in every][:2]"),
    (_LINEARS, "if each in (*self.config.parts, part))", "if each == part)"),
    (_LINEARS, 'count = name.count(".") + 1', "count = 1"),
    (_LINEARS, "        self._note_outside(found)\n", ""),
    (_LINEARS, "for seen in self._parts(found) for path in", "for seen in () for path in"),
    (_LINEARS, "        self._note_patterns(found)\n", ""),
    (_LINEARS, "if all(any(is_named(seen.path, [name])", "if any(any(is_named(seen.path, [name])"),
    ("petal_kernels/hf/found.py", "if structural else _NO_TABLE", "if structural else str()"),
    ("petal_kernels/__init__.py", "near = closest(name, __all__)", "near = str()"),
    ("petal_kernels/__init__.py", 'if not name.startswith("_"):  #', "if True:  #"),
    (_ATTACHMENT, "elif model is not None and hasattr(model, name):", "elif False:"),
    ("petal_kernels/hf/walk.py", "for name in filter(None, near))", "for name in ())"),
    ("petal_kernels/hf/whole.py", "near = closest(name, sorted(ends))", 'near = ""'),
    (_FROZEN, "not module.training or", "False or"),
    (_FROZEN, "or not torch.is_grad_enabled():", "or False:"),
    (_FROZEN, "            self.told = True\n", ""),
    (_FROZEN, "if count and now(self.method).on:", "if count:"),
    (_FROZEN, "            if parameter.requires_grad:\n", "            if False:\n"),
    (_FROZEN, "and any(p.requires_grad for p in module.parameters())", ""),
    ("petal_kernels/hf/installed.py", "        self._watch()\n", ""),
    (_FUSE, "_is_attached(module) or isinstance(module, Adapted)", "isinstance(module, FusedLora)"),
    (_ATTACHMENT, 'if not self.__dict__.get("_attached"):', "if False:"),
    (_ATTACHMENT, "if p.requires_grad)\n        names", ")\n        names"),
    (_ATTACH, "{note}\", stacklevel=3", "{note}\", stacklevel=2"),
]
