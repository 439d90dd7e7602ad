"""Two processes of one group over gloo: started by a test, each saying what it found by name; or
forked from it, which costs no imports, for what needs one thread alone (a fork loses OpenMP's)."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
RANKS, LIMIT = 2, 120.0  # seconds


def run(module: str, folder: Path, names: list[str]) -> list[dict[str, Any]]:
    """What each process of this module, which ends in `main`, says of each name."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", module, str(folder)]
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
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def main(check: Callable[[str, int], list[str]]) -> None:
    """One of the processes: the faults that `check` sees for each name, or where it raised."""
    folder, rank, names = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)  # type: ignore[attr-defined]
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=LIMIT / 2)
    )
    found = {}
    for name in names:
        try:
            found[name] = check(name, rank)
        except Exception:
            found[name] = [traceback.format_exc(limit=-3)]
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def forked(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What `work(rank)` returns, or the exception that it raises, in each of two forked processes;
    None of one that was killed."""
    folder.mkdir(parents=True, exist_ok=True)
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            try:
                _work(work, rank, folder)
            finally:
                os._exit(1)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    answers = [folder / f"{rank}.pkl" for rank in range(RANKS)]
    return [pickle.loads(each.read_bytes()) if each.exists() else None for each in answers]


def _work(work: Callable[[int], Any], rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)  # type: ignore[attr-defined]
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=LIMIT / 6)
    )
    try:
        answer = work(rank)
    except BaseException as error:
        answer = type(error)(str(error))
    (folder / f"{rank}.pkl").write_bytes(pickle.dumps(answer))
