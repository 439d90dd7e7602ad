"""Measured rows of the Triton launch tables: ``triton_tuned.json`` beside an operator's
``triton_configs.py``, as the GPU suite writes it, overrides the rows it names."""

from __future__ import annotations

import json
from pathlib import Path

from petal_kernels._runtime.triton_lib import Tile, tile

FILE = "triton_tuned.json"
Table = dict[tuple[str, int], dict[str, Tile]]


def overlay(table: Table, configs: str) -> Table:
    """The table with the measured rows of the folder that ``configs`` (a module's ``__file__``) is
    in; the table itself where nothing was measured.

    Raises ValueError for a row that the table does not have, or with other blocks than its own.
    """
    path = Path(configs).with_name(FILE)
    if not path.exists():
        return table
    found = {key: dict(sizes) for key, sizes in table.items()}
    for row in json.loads(path.read_text())["rows"]:
        measured = tile(row["warps"], row["stages"], **row["blocks"])
        sizes = found.get((row["kernel"], row["arch"]), {})
        shipped = sizes.get(row["size"])
        if shipped is None or dict(shipped.blocks).keys() != dict(measured.blocks).keys():
            raise ValueError(f"{path}: no such row: {row}")
        sizes[row["size"]] = measured
    return found
