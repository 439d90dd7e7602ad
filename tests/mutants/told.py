"""Faults in what a user is told of a mistake: which name was meant, and what to do instead."""

TESTS = [
    "tests/runtime/test_keywords.py",
    "tests/hf/test_config.py",
]

_KEYWORDS = "petal_kernels/_runtime/keywords.py"
_CONFIG = "petal_kernels/hf/adapter_config.py"
_TUNERS = "petal_kernels/hf/tuners.py"
_ATTACH = "petal_kernels/hf/attach.py"

MUTANTS = [
    (_KEYWORDS, "if _WORDS.get(name) in known:", "if name in _WORDS:"),
    (_KEYWORDS, "get_close_matches(name.lower(), lower, 1, _LEAST)", "get_close_matches('', '')"),
    (_KEYWORDS, "return within[0] if within else", "return"),
    (_KEYWORDS, "any(each.kind is each.VAR_KEYWORD for each in parameters.values())", "False"),
    (_CONFIG, "        check(cls.__init__, values,", "        check(cls.__init__, (),"),
    (_CONFIG, "lambda: cls.elsewhere", "dict"),
    (_TUNERS, "        check(cls.__init__, values,", "        check(cls.__init__, (),"),
    (_ATTACH, "@keywords.checked(_of_configs)\ndef attach(", "@keywords.checked()\ndef attach("),
    (_ATTACH, "@keywords.checked(_of_configs)\ndef plan(", "def plan("),
    ("petal_kernels/hf/fuse.py", "@keywords.checked()\n", ""),
    ("petal_kernels/hf/asked.py", "if isinstance(config, type):", "if False:"),
    (_ATTACH, "{note}\", stacklevel=3", "{note}\", stacklevel=2"),
]
