"""Damaged adapter files: what loads is the adapter that was saved, bit for bit; everything else is
refused by name and leaves the model as it was. A save that dies leaves the old adapter or the new.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels.hf import files
from petal_kernels.hf.config import METHODS, AdapterConfig
from tests.hf import file_mutations, tiny, tiny_blip, tiny_text

F32 = torch.float32
METHOD: dict[str, tuple[Callable[[], nn.Module], Callable[[], AdapterConfig]]] = {
    "petal": (
        tiny.instructblip,
        lambda: pk.PetalConfig(
            r=3, experts=2, expert_r=2, modules_to_save=["language_projection"], scale=0.5
        ),
    ),
    "aurora": (lambda: tiny_blip.build("retrieval", F32), lambda: pk.AuroraConfig(r=3)),
    "vlpet": (lambda: tiny_text.build("bart", F32), lambda: pk.VLPetConfig(r=3, value_r=2)),
    "vladapter": (lambda: tiny_text.build("bart", F32), lambda: pk.VLAdapterConfig(r=3)),
    "routing": (
        lambda: tiny_text.build("llama", F32),
        lambda: pk.RoutingConfig(r=3, alpha=6.0, target_modules=["q_proj", "v_proj"]),
    ),
    "experts": (lambda: tiny_text.build("llama", F32), lambda: pk.ExpertConfig(r=2, experts=3)),
}
LEAST = 400  # mutations of each method's files


def bits(t: Tensor) -> bytes:
    return t.detach().contiguous().view(torch.uint8).numpy().tobytes()


def values_of(attachment: Any) -> dict[str, bytes]:
    return {name: bits(t) for name, t in attachment.state_dict().items()}


def fill(attachment: Any, seed: int) -> None:
    """Any values, among them those that a comparison or a conversion would lose."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.normal_(generator=generator)
        odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-42])
        first = next(attachment.parameters())
        first.view(-1)[: len(odd)] = odd[: first.numel()]


def look(model: nn.Module) -> list[Any]:
    """Everything of a model that a failed attach could have changed."""
    found: list[Any] = [bits(t) for t in model.state_dict().values()]
    for path, module in model.named_modules():
        hooks = [len(h) for h in (module._forward_hooks, module._forward_pre_hooks)]
        found.append((path, id(module), type(module), module.training, hooks, sorted(vars(module))))
        found += [
            (name, id(p), p.requires_grad)
            for name, p in module._parameters.items()
            if p is not None
        ]
    return found


class Damaged:
    """A saved adapter, a model to load it into, and copies of its folder to damage."""

    def __init__(self, method: str, folder: Path) -> None:
        build, config = METHOD[method]
        attachment = pk.attach(build(), config())
        fill(attachment, 1)
        self.saved, self.work = folder / "saved", folder / "work"
        attachment.save(self.saved)
        self.want, self.config = values_of(attachment), attachment.config
        self.model = build()
        self.model.get_submodule("").train()
        next(self.model.parameters()).requires_grad_(False)
        self.before = look(self.model)

    def outcome(self, mutation: file_mutations.Mutation) -> str:
        """ "exact", "refused", or what is wrong."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.saved, self.work)
        if mutation.seal == "none":
            file_mutations.unseal(self.work)
        mutation.apply(self.work)
        if mutation.seal == "fresh":
            file_mutations.reseal(self.work)
        try:
            attachment = pk.attach(self.model, self.work)
        except (ValueError, FileNotFoundError) as error:
            if str(self.work) not in str(error):
                return f"a refusal that names no file: {str(error)[:120]}"
            return "refused" if look(self.model) == self.before else "refused, the model is another"
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:120]}"
        got, config = values_of(attachment), attachment.config
        attachment.detach()
        if look(self.model) != self.before:
            return "loaded, and detach gave another model"
        if got != self.want:
            return "another adapter"
        # Without a digest of its own a config can be edited into another that is as good.
        if mutation.seal == "kept" and config != self.config:
            return f"another config: {config}"
        return "exact"


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[[str], Damaged]:
    return lambda method: Damaged(method, tmp_path)


def _run(damaged: Damaged, flips: int, seed: int, edits: int | None = None) -> dict[str, list[str]]:
    """What came of every mutation; of the edits of the json so many, chosen by the seed."""
    outcomes: dict[str, list[str]] = {}
    mutations = file_mutations.all_of(damaged.saved, flips, seed)
    jsons = [mutation for mutation in mutations if mutation.name.startswith("json (")]
    left_out = set(random.Random(seed).sample(jsons, max(0, len(jsons) - (edits or len(jsons)))))
    for mutation in (each for each in mutations if each not in left_out):
        outcomes.setdefault(damaged.outcome(mutation), []).append(mutation.name)
    return outcomes


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_damaged_file_is_refused_or_loads_exactly(
    method: str, damaged: Callable[[str], Damaged]
) -> None:
    outcomes = _run(damaged(method), 12, 0, 200)
    bad = {what: names for what, names in outcomes.items() if what not in ("exact", "refused")}
    assert not bad, "\n".join(f"{what}: {len(names)}, {names[:5]}" for what, names in bad.items())
    assert sum(map(len, outcomes.values())) >= LEAST


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS))
def test_many_damaged_files(method: str, damaged: Callable[[str], Damaged]) -> None:
    outcomes = _run(damaged(method), 1500, 1)
    assert set(outcomes) <= {"exact", "refused"}, {w: n[:5] for w, n in outcomes.items()}


def test_what_today_is_not_in_a_file_is_still_loaded(tmp_path: Path) -> None:
    """A json without a digest of its own, as files were written before."""
    attachment = pk.attach(METHOD["routing"][0](), METHOD["routing"][1]())
    fill(attachment, 2)
    attachment.save(tmp_path / "adapter, ünïcode λ")
    file_mutations.unseal(tmp_path / "adapter, ünïcode λ")
    again = pk.attach(METHOD["routing"][0](), tmp_path / "adapter, ünïcode λ")
    assert values_of(again) == values_of(attachment)


def test_a_layout_of_the_json_is_no_damage(tmp_path: Path) -> None:
    attachment = pk.attach(METHOD["routing"][0](), METHOD["routing"][1]())
    attachment.save(tmp_path)
    path = tmp_path / files.CONFIG
    path.write_text(" ".join(path.read_text().split()))
    attachment.load(tmp_path)


@pytest.mark.parametrize("method", ["petal", "routing"])
@pytest.mark.parametrize("other", ["another width", "another family"])
def test_the_file_of_another_model_leaves_this_one(method: str, other: str, tmp_path: Path) -> None:
    attachment = pk.attach(METHOD[method][0](), METHOD[method][1]())
    attachment.save(tmp_path)
    if other == "another family":
        model = tiny_text.build("bart", F32)
    elif method == "petal":
        model = tiny.instructblip(layers=2)
    else:
        import transformers

        sizes = {**tiny_text._llama_like(), "hidden_size": 16}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    before = look(model)
    with pytest.raises(ValueError, match=files.CONFIG):
        pk.attach(model, tmp_path)
    assert look(model) == before


def test_an_attach_that_fails_half_way_leaves_the_model() -> None:
    """The kind: a config that only the modules can refuse, after the model was frozen."""
    model = tiny_text.build("bart", F32)
    before = look(model)
    for scale in (0.5, 0.0):
        config = pk.VLPetConfig(r=3, init="identity", gate="large", scale=scale)
        with pytest.raises(ValueError, match="init: 'identity' cannot be reached"):
            pk.attach(model, config)
        assert look(model) == before


def test_a_config_changed_after_it_was_made_is_checked_again_and_copied(tmp_path: Path) -> None:
    config = pk.RoutingConfig(r=3, alpha=6.0)
    attachment = pk.attach(tiny_text.build("llama", F32), config)
    config.alpha = 64.0
    attachment.save(tmp_path)
    assert pk.attach(tiny_text.build("llama", F32), tmp_path).config.alpha == 6.0
    config.r = 0
    model = tiny_text.build("llama", F32)
    before = look(model)
    with pytest.raises(ValueError, match="r: want an integer >= 1, got 0"):
        pk.attach(model, config)
    assert look(model) == before


# -- saves that die -------------------------------------------------------------------------------


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

    written = files._write_synced
    files._write_synced = stopping(written)
    files._sync_directory = stopping(files._sync_directory)
    files.os.replace = stopping(os.replace)


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


@pytest.mark.parametrize("first", [False, True], ids=["over another", "the first"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_save_killed_at_any_step_leaves_the_old_or_the_new(
    after: bool, first: bool, tmp_path: Path
) -> None:
    """SIGKILL in a child process at each step in turn; the commit is one step."""
    found, saves = [], Saves(tmp_path)
    for step in range(1, 20):
        saves.folder = tmp_path / str(step)
        if not first:
            saves.save(0)

        def work(step: int = step) -> None:
            stop_at(step, die, after)
            saves.save(1)

        killed = in_a_child(work)
        try:
            found.append(saves.holds())
        except (ValueError, FileNotFoundError):
            assert first  # nothing was there, and nothing is
            assert killed
            found.append(0)
        saves.save(0)
        assert saves.holds() == 0
        if not killed:
            break
    assert found == sorted(found), "new, and then old again"
    assert set(found) == {0, 1}
    assert len(found) == 9  # eight steps, and one run without a stop


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_an_interrupted_save_leaves_no_rest(
    after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception at each step: the folder loads, and holds nothing but an adapter's files."""
    saves = Saves(tmp_path)
    for step in range(1, 9):
        saves.save(0)
        with monkeypatch.context() as patch:
            for name in ("_write_synced", "_sync_directory"):
                patch.setattr(files, name, getattr(files, name))
            patch.setattr(files.os, "replace", os.replace)
            stop_at(step, interrupt, after)
            with pytest.raises(KeyboardInterrupt):
                saves.save(1)
        new = saves.holds()
        names = sorted(path.name for path in tmp_path.iterdir())
        names = [name for name in names if not (new and name.startswith(".adapter-"))]
        assert names == [files.TENSORS, files.CONFIG]


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
    old = [tmp_path / name for name in (".adapter.safetensors.1.tmp", ".adapter-0a.safetensors")]
    new = tmp_path / ".adapter-0b.safetensors"
    for path in (*old, new):
        path.write_bytes(b"x")
    for path in old:
        os.utime(path, (0, 0))
    saves.save(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [new.name, files.TENSORS, files.CONFIG]
    )


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
    assert sorted(path.name for path in tmp_path.iterdir()) == [files.TENSORS, files.CONFIG]


def test_no_two_saves_write_under_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads, containers and machines whose processes have one number are kept apart by the names
    alone where a folder cannot be locked."""
    saves, names, write = Saves(tmp_path), [], files._write_synced

    def written(path: Path, data: bytes) -> None:
        names.append(path.name)
        write(path, data)

    monkeypatch.setattr(files, "_write_synced", written)
    for number in (0, 1, 0):
        saves.save(number)
    assert len(set(names)) == len(names) == 6


def test_a_folder_that_somebody_holds_is_saved_into_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock that is never given back (of a process forked meanwhile) delays, and no more."""
    saves = Saves(tmp_path)
    monkeypatch.setattr(files, "_PATIENCE", 0.05)
    with files._alone(tmp_path):
        saves.save(1)
    assert saves.holds() == 1
    monkeypatch.setattr(files, "fcntl", None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(files._alone(tmp_path))
        saves.save(0)
    assert saves.holds() == 0
