"""``python -m tests.mutants [FAMILY ...] [--jobs N] [--record FILE]``: plant each fault in a copy
of the tree, run the family's tests there, demand red.

A family is a module of this folder with ``MUTANTS = [(file, old text, new text), ...]``, the pytest
arguments ``TESTS`` that must fail on each, and ``REBUILD = True`` where the fault lies in compiled
code that the tests load. ``caught_by.json`` names the test that caught each fault last: it runs
first, and all of the family's tests where it is green. Exit 1 if any fault survived.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
CAUGHT_BY = Path(__file__).resolve().parent / "caught_by.json"
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", re.MULTILINE)

Fault = tuple[str, str, str]


def families() -> list[str]:
    """Every module of this folder that lists mutants."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith("__"))


def key(family: str, fault: Fault) -> str:
    """A family's fault in ``caught_by.json``."""
    return hashlib.sha256("\0".join((family, *fault)).encode()).hexdigest()[:12]


def git(*words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
    ).stdout


class Tree:
    """A copy of the working tree: what git tracks or would, and the compiled libraries."""

    def __init__(self, root: Path, emulation: Path) -> None:
        self.root = root
        self.built_clean = True
        self.environment = os.environ | {
            "PYTHONPATH": str(root),
            "PETAL_BUILD_CUDA": "0",
            "PETAL_CPU_ISAS": "generic",  # the others are the same source
            "PETAL_EMULATION_CACHE": str(emulation),
            "OMP_WAIT_POLICY": "PASSIVE",
            # Triton may be imported before tests/conftest.py sees that no device is there.
            "CUDA_VISIBLE_DEVICES": "",
            "TRITON_INTERPRET": "1",
        }
        for name in filter(None, git("ls-files", "-z", "-co", "--exclude-standard").split("\0")):
            self.copy(name)
        self.copy_libraries()
        # Some tests ask git what is tracked.
        subprocess.run(["git", "init", "-q"], cwd=root, check=True)
        subprocess.run(["git", "add", "-A"], cwd=root, check=True)
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.mutants.__fork__"],
            cwd=root,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """No more tests in this tree."""
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait()

    def copy(self, name: str) -> None:
        if (ROOT / name).is_file():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, self.root / name)

    def copy_libraries(self) -> None:
        """What was compiled from the sources without a fault."""
        package = ROOT / "petal_kernels"
        for path in (*package.glob("*.so"), *package.glob("lib/*")):
            self.copy(str(path.relative_to(ROOT)))

    def build(self) -> bool:
        """Compile the CPU library in place; a fault that does not compile counts as caught."""
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(
            command, cwd=self.root, env=self.environment, capture_output=True, check=False
        )
        return done.returncode == 0

    def red(self, tests: list[str]) -> str | None:
        """The test that failed, "a crash", or None where all are green."""
        options = ["-q", "-x", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        print(json.dumps([*options, *tests]), file=self.server.stdin, flush=True)
        code, output = json.loads(self.server.stdout.readline())
        if code < 0:
            return "a crash"
        found = _FAILED.findall(output)
        return found[0] if code in (1, 2) and found else None  # 2: in collecting the tests

    def catch(self, family: ModuleType, fault: Fault, first: str | None) -> str | None:
        """Plant a fault and take it back; what caught it."""
        file, old, new = fault
        path = self.root / file
        text = path.read_text()
        if old not in text:
            return None
        rebuild = getattr(family, "REBUILD", False)
        try:
            path.write_text(text.replace(old, new, 1))
            if rebuild:
                self.built_clean = False
                if not self.build():
                    return "the compiler"
            elif not self.built_clean:
                self.copy_libraries()
                self.built_clean = True
            if first is not None and "::" in first and self.red([first]) is not None:
                return first  # named also where it crashes
            return self.red(nearest_first(family.TESTS, file))
        finally:
            path.write_text(text)


def nearest_first(tests: list[str], file: str) -> list[str]:
    """The same tests, those files first whose paths have words of the faulty file's path."""

    def near(test: str) -> int:
        return -sum(word in test for word in words)

    words = {w for part in Path(file).parts for w in re.split(r"[_.]", part) if len(w) > 3}
    words -= {"petal", "kernels", "torch"}
    files = [
        str(found.relative_to(ROOT))
        for test in tests
        if (ROOT / test).exists()
        for found in (sorted((ROOT / test).rglob("test_*.py")) or [ROOT / test])
    ]
    return [*sorted(files, key=near), *(t for t in tests if not (ROOT / t).exists())]


class Run:
    """All faults of some families, shared among trees."""

    def __init__(self, names: list[str]) -> None:
        self.modules = {name: importlib.import_module(f"tests.mutants.{name}") for name in names}
        self.known: dict[str, str] = json.loads(CAUGHT_BY.read_text()) if CAUGHT_BY.exists() else {}
        self.left: queue.SimpleQueue[tuple[str, Fault]] = queue.SimpleQueue()
        self.caught: dict[str, int] = dict.fromkeys(names, 0)
        self.survived: list[str] = []
        self.lock = threading.Lock()
        for name, module in self.modules.items():
            for fault in module.MUTANTS:
                self.left.put((name, fault))

    def work(self, tree: Tree) -> None:
        """Until no fault is left."""
        while True:
            try:
                name, fault = self.left.get_nowait()
            except queue.Empty:
                return
            by = tree.catch(self.modules[name], fault, self.known.get(key(name, fault)))
            label = f"{name}: {fault[0]}: {fault[1]!r} -> {fault[2]!r}"
            with self.lock:
                if by is None:
                    self.survived.append(label)
                    print(f"  SURVIVED  {label}", flush=True)
                else:
                    self.known[key(name, fault)] = by
                    self.caught[name] += 1
                    self.store()  # an interrupted run has not looked in vain
                    print(f"  caught    {label} by {by}", flush=True)

    def store(self) -> None:
        """Write who caught what, faults that are no longer listed left out."""
        listed = {
            key(name, fault)
            for name in families()
            for fault in importlib.import_module(f"tests.mutants.{name}").MUTANTS
        }
        kept = {k: by for k, by in sorted(self.known.items()) if k in listed}
        CAUGHT_BY.write_text(json.dumps(kept, indent=1) + "\n")


def green(trees: list[Tree], modules: dict[str, ModuleType]) -> bool:
    """Whether every family's tests pass where nothing is planted."""
    left: queue.SimpleQueue[str] = queue.SimpleQueue()
    red: list[str] = []

    def work(tree: Tree) -> None:
        while not red:
            try:
                name = left.get_nowait()
            except queue.Empty:
                return
            failed = tree.red(modules[name].TESTS)
            if failed is not None:
                red.append(name)
                print(f"{name}: red before any fault is planted: {failed}", flush=True)
            else:
                print(f"{name}: green, {len(modules[name].MUTANTS)} faults", flush=True)

    for name in modules:
        left.put(name)
    for_each(trees, work)
    return not red


def for_each(trees: list[Tree], work: Callable[[Tree], None]) -> None:
    """Work in all trees at once."""
    with ThreadPoolExecutor(len(trees)) as pool:
        for done in [pool.submit(work, tree) for tree in trees]:
            done.result()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(families()))
    parser.add_argument("--jobs", type=int, default=2, help="copies of the tree at work at once")
    parser.add_argument("--record", type=Path, help="a JSON file for counts and survivors")
    given = parser.parse_args()
    unknown = set(given.families) - set(families())
    if unknown:
        parser.error(f"no family {', '.join(sorted(unknown))}; there are {', '.join(families())}")
    start = time.monotonic()
    run = Run(given.families or families())
    with tempfile.TemporaryDirectory(prefix="petal-mutants-") as folder:
        trees = [Tree(Path(folder) / f"{i}", Path(folder) / "emulation") for i in range(given.jobs)]
        try:
            if not green(trees, run.modules):
                return 2
            for_each(trees, run.work)
        finally:
            for tree in trees:
                tree.close()
    if given.record is not None:
        given.record.write_text(json.dumps(record(run, time.monotonic() - start), indent=1) + "\n")
    total = sum(len(m.MUTANTS) for m in run.modules.values())
    print(f"{total - len(run.survived)} of {total} faults were caught")
    return 1 if run.survived else 0


def record(run: Run, seconds: float) -> dict[str, Any]:
    """What a run found, on which tree."""
    return {
        "commit": git("describe", "--always", "--dirty").strip(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds),
        "faults": {name: len(module.MUTANTS) for name, module in run.modules.items()},
        "caught": run.caught,
        "survived": run.survived,
    }


if __name__ == "__main__":
    raise SystemExit(main())
