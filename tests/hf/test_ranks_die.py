"""kill -9 of one process of two while they save: the folder holds the old adapter or the new, and
the process that is left has what it had, and can save, with no lock of a dead one in its way."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load

import petal_kernels as pk
from petal_kernels.hf import pair, tensors
from tests.hf import ranks, tiny_text
from tests.hf.test_files_fuzz import METHOD, bits, fill, values_of
from tests.hf.test_saves import die, stop_at

STEPS = {"save": 8, "checkpoint": 11}
THE_ONE = 5  # after which the folder is the new adapter
FILES = {"save": [pair.TENSORS, pair.CONFIG]}
FILES["checkpoint"] = sorted([*FILES["save"], pair.CHECKPOINT])


class Group:
    """A model whose adapter both processes hold, and a folder with an adapter saved before it."""

    def __init__(self, kind: str) -> None:
        build, config = METHOD["routing"]
        self.kind, self.model = kind, build()
        self.attachment = pk.attach(self.model, config())
        self.reader = pk.attach(build(), config())
        self.attachment.only_adapter = kind == "checkpoint"
        self.want: list[dict[str, bytes]] = []

    def begin(self, folder: Path) -> None:
        self.folder, self.want = folder, []
        for seed in (1, 2):
            fill(self.attachment, seed)
            self.want.append(values_of(self.attachment))
            if seed == 1:
                self.save()

    def save(self) -> None:
        if self.kind == "save":
            self.attachment.save(self.folder)
        else:  # as Trainer does, with its callback
            model: Any = self.model
            model.save_pretrained(self.folder, state_dict=model.state_dict(), is_main_process=True)

    def holds(self) -> int:
        """Which of the two the folder loads as."""
        self.reader.load(self.folder)
        return self.want.index(values_of(self.reader))

    def resumes(self) -> int:
        """Which of the two Trainer would go on from; 0 where it writes no such file."""
        file = self.folder / pair.CHECKPOINT
        if not file.exists():
            return 0
        front = "petal."
        read = {k.removeprefix(front): v for k, v in load(file.read_bytes()).items()}
        self.reader.load_state_dict(read)
        return self.want.index(values_of(self.reader))


def _drill(group: Group, folder: Path, step: int, after: bool) -> tuple[int, int]:
    """What the folder is once rank 0 has died at that step of its save, for pk and for Trainer."""
    group.begin(folder / "adapter")

    def work(rank: int) -> Any:
        if rank == 0:
            stop_at(step, die, after)
            group.save()
        with pytest.raises(RuntimeError):
            dist.barrier()
        found = group.holds(), group.resumes()
        assert values_of(group.attachment) == group.want[1]
        began = time.monotonic()
        group.save()
        assert time.monotonic() - began < 10, "the lock of a dead process was waited for"
        return found

    killed, left = ranks.forked(work, folder)
    assert killed is None
    assert isinstance(left, tuple), left
    assert group.holds() == 1
    names = sorted(path.name for path in group.folder.iterdir())
    assert [name for name in names if not name.startswith(".")] == FILES[group.kind]
    return left


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["save", "checkpoint"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_the_one_that_writes_dies_at_each_step(kind: str, after: bool, tmp_path: Path) -> None:
    """DDP: one process writes, the other waits for it, and then writes in its place."""
    group, steps = Group(kind), range(1, STEPS[kind] + 1)
    found = [_drill(group, tmp_path / str(step), step, after) for step in steps]
    done = [step + after > THE_ONE for step in steps]
    assert [adapter for adapter, _ in found] == done
    # Trainer's file is the old one until the very last, and never one without its adapter.
    assert [file for _, file in found] == [kind == "checkpoint" and s + after > 10 for s in steps]


@pytest.mark.parametrize("kind", ["save", "checkpoint"])
@pytest.mark.parametrize("step", [THE_ONE, THE_ONE + 1])
def test_the_one_that_writes_dies_around_the_step(kind: str, step: int, tmp_path: Path) -> None:
    assert _drill(Group(kind), tmp_path, step, False) == (step > THE_ONE, 0)


@pytest.fixture
def sharded() -> tuple[Any, Any]:
    """A model to shard in each process, with modules trained whole."""
    model = tiny_text.build("llama", torch.float32)
    return model, pk.attach(model, pk.RoutingConfig(r=3, modules_to_save=["lm_head"]))


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("at", [1, 4])
def test_one_dies_while_a_sharded_adapter_is_gathered(
    at: int, victim: int, sharded: Any, tmp_path: Path
) -> None:
    """FSDP2: every process calls save; one dies at a tensor. The other is told, and writes none of
    it: not what it had gathered so far, and not the pieces that are its own."""
    from tests.hf.test_sharded import shard

    model, attachment = sharded
    fill(attachment, 1)
    attachment.save(tmp_path / "adapter")
    want = values_of(attachment)
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    fill(attachment, 2)

    def work(rank: int) -> Any:
        shard(model)
        local = [bits(value.to_local()) for value in attachment.state_dict().values()]
        count, full = 0, tensors._full

        def stopping(*args: Any) -> Any:
            nonlocal count
            count += 1
            if rank == victim and count == at:
                die()
            return full(*args)

        tensors._full = stopping  # type: ignore[assignment]
        with pytest.raises(RuntimeError, match=r"(?i)connection|reset|closed|peer"):
            attachment.save(tmp_path / "adapter")
        assert [bits(value.to_local()) for value in attachment.state_dict().values()] == local
        return count

    answers = ranks.forked(work, tmp_path / "ranks")
    assert answers.pop(victim) is None
    assert isinstance(answers[0], int), answers
    assert answers[0] >= at
    files = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    assert files == before
    again = tiny_text.build("llama", torch.float32)
    assert values_of(pk.attach(again, tmp_path / "adapter")) == want


def test_one_dies_while_both_write(sharded: Any, tmp_path: Path) -> None:
    """FSDP2: what was gathered is the same in both, and each writes it: the other's counts."""
    from tests.hf.test_sharded import shard

    model, attachment = sharded
    fill(attachment, 1)
    attachment.save(tmp_path / "adapter")
    fill(attachment, 2)
    want = values_of(attachment)

    def work(rank: int) -> Any:
        shard(model)
        if rank == 0:
            stop_at(THE_ONE, die, False)
        attachment.save(tmp_path / "adapter")
        return os.getpid()

    killed, left = ranks.forked(work, tmp_path / "ranks")
    assert killed is None
    assert isinstance(left, int), left
    again = tiny_text.build("llama", torch.float32)
    assert values_of(pk.attach(again, tmp_path / "adapter")) == want
