"""Faults in what is built, and in when a compiled object may serve another clone."""

TESTS = ["tests/house/test_object_cache.py", "tests/house/test_build.py", "-m", "not slow"]

_NINJA = "csrc/ninja_file.py"
_SETUP = "setup.py"

MUTANTS = [
    (_NINJA, "            key.update(each.read_bytes())", "            pass"),
    (_NINJA, "                    yield from self._included(", "                    list("),
    (_NINJA, 'f"{tool}\\n{command}\\n"', 'f"{command}\\n"'),
    (_NINJA, 'f"{tool}\\n{command}\\n"', 'f"{tool}\\n"'),
    (_NINJA, 'f"{command} {made.flags}"', "command"),
    (_NINJA, 'command.replace(str(place), f"place {n}")', "command"),
    (_NINJA, "self._kept(made) == kept", "True"),
    (_NINJA, "sorted(known, reverse=True)", "sorted(known)"),
    (_NINJA, "        os.utime(path)\n", ""),
    (_NINJA, "for folder in (source.parent, self.sources)", "for folder in (source.parent,)"),
    (_SETUP, "not self.gpus:", "True:"),
    (_SETUP, "wish is None and cuda is None and not self.gpus", "False"),
    (_SETUP, "_needs(i) <= has", "_needs(i) & has"),
    (_SETUP, 'default = ";".join(gpus) or "80;90;100"', 'default = "80;90;100"'),
    (_SETUP, "wanted = own if wish is None else", "wanted = list(ISAS) if wish is None else"),
]
