"""Where the results of a run go: looked at before it measures, written whatever ended it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from petal_kernels.tools import charts, exits


@dataclass(frozen=True)
class Outputs:
    """Files by suffix: "json", "csv", "html"."""

    paths: Mapping[str, Path]

    @classmethod
    def of(cls, given: Mapping[str, Path | None], stem: str) -> Outputs:
        """What was asked for; `Path()` is the default name. Raises Refusal where a file cannot be
        written or drawn, or is asked to hold two things."""
        named = {k: p for k, p in given.items() if p is not None}
        paths = {k: Path(f"{stem}.{k}") if p == Path() else p for k, p in named.items()}
        places: dict[Path, str] = {}
        for suffix, path in paths.items():
            if other := places.get(path.resolve()):
                raise exits.Refusal(f"--{other} and --{suffix}: want two files, got {path} twice")
            places[path.resolve()] = suffix
        if "html" in paths:
            charts.need("--html")
        exits.writable(*paths.values())
        return cls(paths)

    def write(self, contents: Mapping[str, Callable[[], str]]) -> bool:
        """Write each; whether all could be. One that fails is said, and keeps no other from being
        written."""
        failed = {}
        for suffix, path in self.paths.items():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(contents[suffix](), encoding="utf-8")
            except OSError as error:
                failed[suffix] = error
        for suffix, path in self.paths.items():  # only now: stdout may be closed
            if suffix in failed:
                said = f"--{suffix}: {path} is not written: {failed[suffix]}"
                print(said, file=sys.stderr)
            else:
                print(f"written {path}")
        return not failed
