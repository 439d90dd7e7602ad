"""The results file: one JSON line per finished case, on disk before the next case begins."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Journal:
    """Records by case id, the last of an id counting; appended with fsync, safe from threads.

    A line torn by a kill is cut off when the file is opened again: that case runs anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._records: dict[str, Record] = {}
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        for line in whole.splitlines():
            record = json.loads(line)
            self._records[record["id"]] = record
        if whole != text:
            os.truncate(path, len(whole))

    def __contains__(self, case_id: str) -> bool:
        return case_id in self._records

    def __iter__(self) -> Iterator[Record]:
        return iter(list(self._records.values()))

    def get(self, case_id: str) -> Record | None:
        """The record of one case."""
        return self._records.get(case_id)

    def of(self, stage: str) -> list[Record]:
        """The records of one stage, in the order they came."""
        return [r for r in self if r["stage"] == stage]

    def add(self, record: Record) -> None:
        """Append; returns once it is on disk."""
        line = json.dumps(record).encode() + b"\n"
        with self._lock:
            with self.path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            self._records[record["id"]] = record
