"""Two processes that train every row under DistributedDataParallel; run by the engines' tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.hf.methods import ROWS, Row, around, attached, clear, differences, read, step, values

ROOT = Path(__file__).resolve().parents[2]
RANKS, LIMIT = 2, 120.0  # seconds


def run(folder: Path, names: list[str]) -> dict[str, list[str]]:
    """What went wrong with these rows, by name."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "tests.hf.methods_parallel", str(folder)]
    processes = [
        subprocess.Popen([*command, str(rank), *names], cwd=ROOT, env=environment)
        for rank in range(RANKS)
    ]
    try:
        codes = [process.wait(LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * RANKS, codes
    found: dict[str, list[str]] = {}
    for rank in range(RANKS):
        for name, faults in json.loads((folder / f"{rank}.json").read_text()).items():
            found.setdefault(name, []).extend(faults)
    return found


def _faults(row: Row, rank: int) -> list[str]:
    """Of this process's gradients against the mean of both batches', computed alone."""
    model, attachment = attached(row)
    alone = step(row, model, attachment, row.given(rank))
    want = {name: value for name, value in alone.items() if name.startswith("grad")}
    for value in want.values():
        if value is not None:
            dist.all_reduce(value)
            value /= RANKS
    unused = any(gradient is None for gradient in want.values())
    clear(attachment)
    whole = DistributedDataParallel(model.train(), find_unused_parameters=unused)
    given = row.given(rank)
    with around(attachment, given):
        out, loss = read(whole, given.batch)
    loss.backward()
    got = values(attachment, given, out, loss)
    for name in want:
        if want[name] is None and got[name] is not None and not got[name].any():  # type: ignore[union-attr]
            got[name] = None  # what nobody used is reduced as zeros
    return differences({name: got[name] for name in want}, want)


def main(folder: Path, rank: int, names: list[str]) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)  # type: ignore[attr-defined]
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=LIMIT / 2)
    )
    found = {}
    for row in (row for row in ROWS if row.name in names):
        try:
            found[row.name] = _faults(row, rank)
        except Exception:
            found[row.name] = [traceback.format_exc(limit=-3)]
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
