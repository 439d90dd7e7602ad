"""A save that dies or fails at any step, or meets another, leaves the old adapter or the new."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import petal_kernels as pk
from petal_kernels.hf import files, pair
from tests.hf.test_files_fuzz import METHOD, fill, values_of


class Saves:
    """Two adapters of one model, by number, and a folder that one of them is saved into."""

    def __init__(self, folder: Path) -> None:
        build, config = METHOD["routing"]
        self.attachment = pk.attach(build(), config())
        self.reader = pk.attach(build(), config())
        self.folder = folder
        self.states, self.want = [], []
        for seed in (1, 2):
            fill(self.attachment, seed)
            state = {name: t.clone() for name, t in self.attachment.state_dict().items()}
            self.states.append(state)
            self.want.append(values_of(self.attachment))

    def save(self, number: int) -> None:
        state = self.states[number]
        signature = self.attachment.signature()
        files.write(self.folder, self.attachment.config, signature, state)

    def save_as_before(self, number: int) -> None:
        """With the json under the name that it had before."""
        self.save(number)
        (self.folder / pair.CONFIG).rename(self.folder / pair.OLD_CONFIG)

    def holds(self) -> int:
        """Which of the two the folder loads as."""
        self.reader.load(self.folder)
        return self.want.index(values_of(self.reader))


def stop_at(step: int, stop: Callable[[], None], after: bool) -> None:
    """From now on the `step`-th step of a save stops, before or after it is made."""
    count = 0

    def stopping(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal count
            count += 1
            if count == step and not after:
                if function is written:  # half of it
                    args[0].write_bytes(args[1][: len(args[1]) // 2])
                stop()
            result = function(*args)
            if count == step and after:
                stop()
            return result

        return call

    written = pair._write_synced
    pair._write_synced = stopping(written)
    pair._sync_directory = stopping(pair._sync_directory)
    pair._remove = stopping(pair._remove)
    os.replace = stopping(os.replace)


def interrupt() -> None:
    raise KeyboardInterrupt


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_child(work: Callable[[], None]) -> int:
    """The signal that ended a forked process that does `work`; 0 where none did."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("over", ["nothing", "another", "one with the old name"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_save_killed_at_any_step_leaves_the_old_or_the_new(
    after: bool, over: str, tmp_path: Path
) -> None:
    """SIGKILL in a child process at each step in turn; the commit is one step."""
    found, saves = [], Saves(tmp_path)
    for step in range(1, 20):
        saves.folder = tmp_path / str(step)
        if over == "another":
            saves.save(0)
        elif over != "nothing":
            saves.save_as_before(0)

        def work(step: int = step) -> None:
            stop_at(step, die, after)
            saves.save(1)

        killed = in_a_child(work)
        try:
            found.append(saves.holds())
        except (ValueError, FileNotFoundError):
            assert over == "nothing"  # and nothing is there now
            assert killed
            found.append(0)
        saves.save(0)
        assert saves.holds() == 0
        assert not (saves.folder / pair.OLD_CONFIG).exists()
        if not killed:
            break
    assert found == sorted(found), "new, and then old again"
    assert set(found) == {0, 1}
    steps = 10 if over == "one with the old name" else 8
    assert len(found) == steps + 1  # one run without a stop


@pytest.mark.parametrize("named_before", [False, True], ids=["new name", "old name"])
def test_a_save_that_fails_leaves_the_tensors_of_one_that_died(
    named_before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kind: the same tensors under another json. The save before died after its step: its
    tensors lie where those of the next, which fails before its own step, would lie."""
    saves = Saves(tmp_path)
    for number in (0, 1):
        tmp_path.joinpath(pair.OLD_CONFIG).unlink(missing_ok=True)
        (saves.save_as_before if named_before else saves.save)(number)
        data = (tmp_path / pair.TENSORS).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        (tmp_path / pair.TENSORS).rename(pair.pending(tmp_path, digest))
        assert saves.holds() == number
        with monkeypatch.context() as patch:
            for name in ("_write_synced", "_sync_directory", "_remove"):
                patch.setattr(pair, name, getattr(pair, name))
            patch.setattr(os, "replace", os.replace)
            stop_at(4, interrupt, after=False)
            # Not through `files.write`: the header of equal tensors need not be equal.
            with pytest.raises(KeyboardInterrupt):
                pair.replace(tmp_path, data, digest, b"another json", None)
        assert saves.holds() == number


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_an_interrupted_save_leaves_no_rest(
    after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception at each step: the folder loads, and holds nothing but an adapter's files."""
    saves = Saves(tmp_path)
    for step in range(1, 9):
        saves.save(0)
        with monkeypatch.context() as patch:
            for name in ("_write_synced", "_sync_directory", "_remove"):
                patch.setattr(pair, name, getattr(pair, name))
            patch.setattr(os, "replace", os.replace)
            stop_at(step, interrupt, after)
            with pytest.raises(KeyboardInterrupt):
                saves.save(1)
        new = saves.holds()
        names = sorted(path.name for path in tmp_path.iterdir())
        names = [name for name in names if not (new and name.startswith(".adapter-"))]
        assert names == [pair.TENSORS, pair.CONFIG]


def _killed_at_random(saves: Saves, seed: int) -> int:
    generator = random.Random(seed)
    child = os.fork()
    if child == 0:
        try:
            while True:
                saves.save(1)
                saves.save(0)
        finally:
            os._exit(1)
    time.sleep(generator.uniform(0.0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return saves.holds()


def test_saves_killed_at_random(tmp_path: Path) -> None:
    saves = Saves(tmp_path)
    saves.save(0)
    for seed in range(10):
        assert _killed_at_random(saves, seed) in (0, 1)


@pytest.mark.slow
def test_many_saves_killed_at_random(tmp_path: Path) -> None:
    saves = Saves(tmp_path)
    saves.save(0)
    assert {_killed_at_random(saves, seed) for seed in range(300)} == {0, 1}


def test_what_a_killed_save_left_is_removed_by_a_later_one(tmp_path: Path) -> None:
    saves = Saves(tmp_path)
    names = (".adapter.safetensors.1.tmp", ".petal_config.json.1.tmp", ".adapter-0a.safetensors")
    old = [tmp_path / name for name in (*names, ".adapter_config.json.1.tmp")]
    new = tmp_path / ".adapter-0b.safetensors"
    for path in (*old, new):
        path.write_bytes(b"x")
    for path in old:
        os.utime(path, (0, 0))
    saves.save(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [new.name, pair.TENSORS, pair.CONFIG]
    )


@pytest.mark.parametrize("at", range(1, 6))
def test_a_reader_meets_a_save_over_the_old_name(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kind: a name that was there when it was looked for, and is gone when it is opened."""
    saves, count, read_bytes = Saves(tmp_path), 0, Path.read_bytes
    saves.save_as_before(0)

    def meanwhile(path: Path) -> bytes:
        nonlocal count
        count += 1
        if count == at:
            saves.save(1)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", meanwhile)
    # At first PEFT's json is looked for, then ours by the new name and the old; then the tensors.
    assert saves.holds() == int(at <= 4)
    assert count >= at or at == 5


def test_threads_save_into_one_folder_while_others_read(tmp_path: Path) -> None:
    """The kind: names that are unique per process only, and two renames that are not one."""
    saves, failed, done = Saves(tmp_path), [], threading.Event()
    saves.save(0)

    def save(number: int) -> None:
        try:
            for _ in range(8):
                saves.save(number)
        except Exception as error:
            failed.append(error)

    def read() -> None:
        try:
            while not done.is_set():
                files.read(tmp_path)
        except Exception as error:
            failed.append(error)

    writers = [threading.Thread(target=save, args=(n % 2,)) for n in range(4)]
    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in (*writers, *readers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    for thread in readers:
        thread.join()
    assert not failed
    assert saves.holds() in (0, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [pair.TENSORS, pair.CONFIG]


def test_no_two_saves_write_under_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads, containers and machines whose processes have one number are kept apart by the names
    alone where a folder cannot be locked."""
    saves, names, write = Saves(tmp_path), [], pair._write_synced

    def written(path: Path, data: bytes) -> None:
        names.append(path.name)
        write(path, data)

    monkeypatch.setattr(pair, "_write_synced", written)
    for number in (0, 1, 0):
        saves.save(number)
    assert len(set(names)) == len(names) == 6


def test_a_folder_that_somebody_holds_is_saved_into_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock that is never given back (of a process forked meanwhile) delays, and no more."""
    saves = Saves(tmp_path)
    monkeypatch.setattr(pair, "_PATIENCE", 0.05)
    with pair.alone(tmp_path):
        saves.save(1)
    assert saves.holds() == 1
    monkeypatch.setattr(pair, "fcntl", None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(pair.alone(tmp_path))
        saves.save(0)
    assert saves.holds() == 0


@pytest.mark.skipif(pair.fcntl is None, reason="folders cannot be locked here")  # type: ignore[attr-defined]
def test_a_save_waits_for_the_one_that_is_at_it(tmp_path: Path) -> None:
    entered = threading.Event()

    def save() -> None:
        with pair.alone(tmp_path):
            entered.set()

    second = threading.Thread(target=save)
    with pair.alone(tmp_path):
        second.start()
        assert not entered.wait(0.2)
    second.join(10)
    assert entered.is_set()
