"""Objects are kept by what they were made of: another clone gets the one that it would have
compiled, and no other."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
NINJA = Path(sys.executable).parent / "ninja"

MAIN = '#include "op/answer.h"\n#include "op/cpu/sign.h"\nint main() { return kSign * kAnswer; }\n'


def _module() -> Any:
    spec = importlib.util.spec_from_file_location("ninja_file", ROOT / "csrc" / "ninja_file.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


MODULE = _module()


def _clone(where: Path) -> Path:
    """A project of one program; its source."""
    cpu = where / "csrc" / "op" / "cpu"
    cpu.mkdir(parents=True)
    (cpu.parent / "answer.h").write_text("#pragma once\nconstexpr int kAnswer = 42;\n")
    (cpu / "sign.h").write_text('#include "op/answer.h"\nconstexpr int kSign = 1;\n')
    (cpu / "kernel.cpp").write_text(MAIN)
    return cpu / "kernel.cpp"


def _cache(clone: Path, kept: Path | None, **rest: Any) -> Any:
    sources = clone / "csrc"
    return MODULE.ObjectCache(kept, sources, [sources], **rest)


def _key(clone: Path, command: str = "g++ -O2", tool: str = "g++ 12") -> str:
    kept = _cache(clone, clone / "kept")
    path: Path = kept.path(clone / "csrc" / "op" / "cpu" / "kernel.cpp", command, tool)
    return path.name


def _build(clone: Path, kept: Path | None, flags: str = "") -> tuple[int, list[str]]:
    """What the program returns, and what was compiled for it."""
    sources = clone / "csrc"
    n = MODULE.NinjaFile(clone / "build", _cache(clone, kept))
    n.rule("cxx", f"g++ -I{sources} $flags -MMD -MF $out.d -c $in -o $out", tool="g++")
    n.rule("link", "g++ -o $out $in", depfile=False)
    made = n.compiled("cxx", sources / "op" / "cpu" / "kernel.cpp", flags)
    program = n.edge("link", clone / "build" / "program", [made])
    n.run(str(NINJA))
    rules = [line.split(": ")[1].split()[0] for line in n.lines if line.startswith("build ")]
    return subprocess.run([program], check=False).returncode, rules


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or not NINJA.exists(), reason="needs g++ and ninja"
)


@needs_compiler
def test_another_clone_gets_the_object_and_compiles_nothing(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    for name in ("one", "two"):
        _clone(tmp_path / name)
    assert _build(tmp_path / "one", kept) == (42, ["cxx", "link"])
    assert _build(tmp_path / "two", kept) == (42, ["link"])


@needs_compiler
@pytest.mark.parametrize("edited", ["cpu/kernel.cpp", "cpu/sign.h", "answer.h"])
def test_an_edited_file_is_compiled_anew(tmp_path: Path, edited: str) -> None:
    """A header that a header includes as well."""
    kept = tmp_path / "kept"
    _clone(tmp_path / "one")
    _build(tmp_path / "one", kept)
    path = tmp_path / "one" / "csrc" / "op" / edited
    path.write_text(
        path.read_text().replace("42", "43").replace("= 1", "= 2").replace("* k", "+ k")
    )
    wanted = 84 if edited.endswith("sign.h") else 43
    assert _build(tmp_path / "one", kept) == (wanted, ["cxx", "link"])
    # And back: the first object is still there.
    path.write_text(
        path.read_text().replace("43", "42").replace("= 2", "= 1").replace("+ k", "* k")
    )
    assert _build(tmp_path / "one", kept) == (42, ["link"])


@needs_compiler
def test_other_flags_are_another_object(tmp_path: Path) -> None:
    """As one kernel is compiled for several instruction sets."""
    source = _clone(tmp_path / "one")
    source.write_text(MAIN.replace("kSign *", "FACTOR *"))
    for factor in (2, 3):
        wanted = (42 * factor, ["cxx", "link"])
        assert _build(tmp_path / "one", tmp_path / "kept", f"-DFACTOR={factor}") == wanted


@needs_compiler
def test_an_object_of_a_source_edited_meanwhile_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _clone(tmp_path / "one")
    run = subprocess.run

    def edits(command: Any, **rest: Any) -> Any:
        done = run(command, **rest)
        source.write_text(MAIN + "// edited\n")
        return done

    monkeypatch.setattr(MODULE.subprocess, "run", edits)
    _build(tmp_path / "one", tmp_path / "kept")
    assert not list(tmp_path.glob("kept/*"))


def test_what_the_object_depends_on_is_in_its_name(tmp_path: Path) -> None:
    _clone(tmp_path / "one")
    _clone(tmp_path / "two")
    key = _key(tmp_path / "one")
    assert key == _key(tmp_path / "two")
    assert key != _key(tmp_path / "one", command="g++ -O3")
    assert key != _key(tmp_path / "one", tool="g++ 13")
    place = f"g++ -O2 -I{tmp_path / 'one' / 'csrc'}"
    assert _key(tmp_path / "one", place) == _key(
        tmp_path / "two", place.replace(str(tmp_path / "one"), str(tmp_path / "two"))
    )


def test_without_a_cache_nothing_is_written(tmp_path: Path) -> None:
    source = _clone(tmp_path / "one")
    cache = _cache(tmp_path / "one", None)
    assert cache.path(source, "", "") is None
    assert not cache.has(None)
    cache.prune()


def test_the_oldest_go_first_and_what_is_asked_for_is_not_old(tmp_path: Path) -> None:
    _clone(tmp_path / "one")
    cache = _cache(tmp_path / "one", tmp_path / "kept", limit=20)
    built = tmp_path / "built.o"
    built.write_bytes(b"0123456789")
    for age, name in enumerate("abc"):
        cache.put(built, tmp_path / "kept" / name)
        os.utime(tmp_path / "kept" / name, (1000 + age, 1000 + age))
    assert cache.has(tmp_path / "kept" / "a")
    cache.prune()
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["a", "c"]


@needs_compiler
@pytest.mark.parametrize("source", sorted((ROOT / "csrc").glob("*/cpu/*.cpp")), ids=str)
def test_the_files_that_a_source_includes_are_the_compilers(source: Path) -> None:
    """Were one missed, an edit of it would give a clone the object of before."""
    cache = MODULE.ObjectCache(None, ROOT / "csrc", [])
    found = {each.resolve() for each in cache._included(source, set())}
    command = ["g++", "-std=c++17", "-MM", "-MG", f"-I{ROOT / 'csrc'}", "-DPETAL_ISA=generic"]
    done = subprocess.run([*command, source], capture_output=True, text=True, check=True)
    listed = done.stdout.split(":", 1)[1].replace("\\\n", " ").split()
    ours = {Path(name).resolve() for name in listed if str(ROOT / "csrc") in name}
    assert ours <= found
    assert source.resolve() in ours
