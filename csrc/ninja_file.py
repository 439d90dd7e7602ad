"""A ninja file, and a cache of the objects that it compiles; used by setup.py, knows no kernel."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

CACHE_BYTES = 1 << 30
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


class ObjectCache:
    """Objects by what they were made of: compiler, flags, the text of every file they include.

    Clones share it: `places` are paths that mean nothing to what is compiled there. `root` None:
    nothing is kept. The objects that nobody asked for longest go when there are more than `limit`
    bytes of them.
    """

    def __init__(
        self, root: Path | None, sources: Path, places: Sequence[Path], limit: int = CACHE_BYTES
    ) -> None:
        self.root, self.sources, self.places, self.limit = root, sources, places, limit

    def path(self, source: Path, command: str, tool: str) -> Path | None:
        """Where the object of a source lies, or would; None without a cache. `tool` names compiler
        and library versions, which the command does not."""
        if self.root is None:
            return None
        for n, place in enumerate(self.places):
            command = command.replace(str(place), f"place {n}")
        key = hashlib.sha256(f"{tool}\n{command}\n".encode())
        for each in self._included(source, set()):
            key.update(f"{each.relative_to(self.sources)}\n".encode())
            key.update(each.read_bytes())
        return self.root / f"{source.parts[-3]}-{source.stem}-{key.hexdigest()[:40]}.o"

    def _included(self, source: Path, seen: set[Path]) -> Iterator[Path]:
        """The source and every project file that it includes, each once."""
        if source in seen:
            return
        seen.add(source)
        yield source
        for name in _INCLUDE.findall(source.read_text()):
            for folder in (source.parent, self.sources):
                if (folder / name).is_file():
                    yield from self._included((folder / name).resolve(), seen)
                    break

    def has(self, path: Path | None) -> bool:
        """Whether an object is there; it is then in use, and stays."""
        if path is None or not path.is_file():
            return False
        os.utime(path)
        return True

    def put(self, built: Path, path: Path) -> None:
        """Keeps an object; a reader never meets half of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        shutil.copyfile(built, temporary)
        temporary.replace(path)

    def prune(self) -> None:
        """Forgets the oldest beyond the limit."""
        if self.root is None or not self.root.is_dir():
            return
        left = self.limit
        known = [(p.stat().st_mtime, p.stat().st_size, p) for p in self.root.iterdir()]
        for _, size, path in sorted(known, reverse=True):
            left -= size
            if left < 0:
                path.unlink(missing_ok=True)


class Made(NamedTuple):
    """An object and what it is compiled from."""

    out: Path
    rule: str
    source: Path
    flags: str


class NinjaFile:
    """build.ninja, one statement at a time; headers are tracked through depfiles."""

    def __init__(self, build: Path, cache: ObjectCache) -> None:
        self.build, self.cache = build, cache
        self.lines = ["ninja_required_version = 1.5"]
        self.products: list[Path] = []
        self._commands: dict[str, tuple[str, str]] = {}  # and the versions of what it runs
        self._fresh: dict[Path, Made] = {}  # what this build makes, by where it is to be kept

    def rule(self, name: str, command: str, depfile: bool = True, tool: str = "") -> None:
        self.lines.append(f"rule {name}\n  command = {command}\n  description = {name} $what")
        self._commands[name] = command, tool
        if depfile:
            self.lines.append("  depfile = $out.d\n  deps = gcc")

    def edge(self, rule: str, out: Path, inputs: list[Path], flags: str = "") -> Path:
        names = " ".join(str(i).replace(" ", "$ ") for i in inputs)
        what = out.name.removesuffix(".o").replace(".", " ") if out.suffix == ".o" else out.name
        self.lines.append(
            f"build {str(out).replace(' ', '$ ')}: {rule} {names}\n  flags = {flags}\n"
            f"  what = {what}"
        )
        return out

    def compiled(self, rule: str, source: Path, flags: str, variant: str = "") -> Path:
        """The object of a source: the cache's, or one that is made."""
        # Operators have files of the same names.
        parts = [*source.relative_to(self.cache.sources).with_suffix("").parts, variant]
        made = Made(self.build / f"{'.'.join(filter(None, parts))}.o", rule, source, flags)
        kept = self._kept(made)
        if kept is not None and self.cache.has(kept):
            return kept
        if kept is not None:
            self._fresh[kept] = made
        return self.edge(rule, made.out, [source], flags)

    def _kept(self, made: Made) -> Path | None:
        command, tool = self._commands[made.rule]
        return self.cache.path(made.source, f"{command} {made.flags}", tool)

    def product(self, path: Path) -> None:
        self.products.append(path)

    def run(self, ninja: str) -> None:
        """Builds what is not there yet, and says how far it is."""
        self.build.mkdir(parents=True, exist_ok=True)
        (self.build / "build.ninja").write_text("\n".join(self.lines) + "\n")
        status = {"NINJA_STATUS": "[%f of %t, %W left] "}
        subprocess.run([ninja, "-C", str(self.build)], check=True, env={**status, **os.environ})
        for kept, made in self._fresh.items():
            # Not of a source that was edited meanwhile.
            if not kept.is_file() and self._kept(made) == kept:
                self.cache.put(made.out, kept)
        self.cache.prune()
