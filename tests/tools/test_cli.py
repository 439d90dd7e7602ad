"""The command line around the subcommands: exit codes that a program can trust."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from petal_kernels._runtime.backends import BackendUnavailable
from petal_kernels.tools import cli, doctor, exits

BUFFERED: list[str] = []
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
COMMANDS = ("bench", "demo", "doctor", "memory")


def program(*words: str, flags: list[str] = BUFFERED) -> list[str]:
    return [sys.executable, *flags, "-m", "petal_kernels.tools.cli", *words]


def raising(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
        (exits.Refusal("want a thing, got none"), 2, "p: error: want a thing, got none\n"),
        (BackendUnavailable("backend 'x' cannot"), 2, "p: error: backend 'x' cannot\n"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_every_end_has_its_code(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exits.run(raising(error), "p") == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_code_passes_through(code: int) -> None:
    assert exits.run(lambda: code, "p") == code
    with pytest.raises(SystemExit) as stopped:
        exits.run(raising(SystemExit(code)), "p")
    assert stopped.value.code == code


def test_a_bug_is_not_taken_for_a_broken_bound(capsys: pytest.CaptureFixture[str]) -> None:
    """Kind: an exit code with two meanings. Python ends with 1 after a traceback."""
    assert exits.run(raising(KeyError("x")), "p") == 2
    assert "KeyError: 'x'" in capsys.readouterr().err
    assert exits.run(raising(SystemExit("no such thing")), "p") == 2
    assert capsys.readouterr().err == "no such thing\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_run_under_the_table(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(cli.COMMANDS[name].module)
    for error, code in (
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(), 141),
        (OSError(), 2),
    ):
        monkeypatch.setattr(module, "main", lambda _, e=error: raising(e)())
        assert cli.main([name]) == code


def test_refusing_lets_a_reader_who_has_gone_through(capsys: pytest.CaptureFixture[str]) -> None:
    """Kind: a closed pipe taken for a user's mistake, since Python calls it an OSError."""
    parser = argparse.ArgumentParser("p")
    with pytest.raises(BrokenPipeError), exits.refusing(parser, OSError):
        raise BrokenPipeError
    with pytest.raises(SystemExit) as stopped, exits.refusing(parser, ValueError):
        raise ValueError("want one")
    assert stopped.value.code == 2
    assert "p: error: want one" in capsys.readouterr().err
    with pytest.raises(KeyError), exits.refusing(parser, ValueError):
        raise KeyError


class Closed(io.StringIO):
    """A stream whose reader leaves before the buffer is written."""

    def flush(self) -> None:
        raise BrokenPipeError


@pytest.mark.parametrize("end", [0, SystemExit(0)])
def test_a_pipe_that_closes_at_the_flush(end: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Closed())
    assert exits.run((lambda: 0) if end == 0 else raising(end), "p") == 141


def test_no_stdout_at_all_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert exits.run(lambda: 0, "p") == 0


def test_an_interrupt_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "main", stopped)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


@pytest.mark.parametrize("words", [["--version"], ["doctor", "--help"]])
def test_a_reader_who_leaves_is_no_traceback(words: list[str]) -> None:
    """The text is short: it is written when Python leaves, long after the reader has."""
    with subprocess.Popen(
        program(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141


@pytest.mark.parametrize("flags", [BUFFERED, ["-u"]])
def test_a_reader_who_leaves_in_the_middle(flags: list[str]) -> None:
    with subprocess.Popen(
        program("doctor", flags=flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"versions\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_is_said() -> None:
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(program("--version"), stdout=full, stderr=subprocess.PIPE, check=False)
    assert run.returncode == 2
    assert run.stderr == b"petal-kernels: error: [Errno 28] No space left on device\n"


def test_control_c() -> None:
    with subprocess.Popen(
        program("doctor"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b"\ninterrupted\n"
        assert process.wait(60) == 130


def test_an_interrupt_in_code_that_is_run_from_a_string_ends_like_any() -> None:
    """As an import is full of it: Python would end by the signal though it was caught."""
    code = (
        "import sys; from petal_kernels.tools import exits;"
        "sys.exit(exits.run(lambda: exec('raise KeyboardInterrupt'), 'program'))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert (ended.returncode, ended.stderr) == (130, b"\ninterrupted\n")


def test_where_results_go_is_looked_at_before(tmp_path: Path) -> None:
    """Kind: hours of work, and then nowhere to write it."""
    older, there = tmp_path / "older.json", tmp_path / "new" / "deep" / "x.json"
    older.write_text("kept")
    exits.writable(older, there, None, Path("-"), Path(os.devnull))
    assert older.read_text() == "kept"
    assert there.parent.is_dir()
    assert not there.exists()
    for path, why in (
        (tmp_path, "it is a folder"),
        (older / "x.json", "Not a directory"),
        (Path("/proc/no/x.json"), "No such file"),
    ):
        with pytest.raises(exits.Refusal, match=f"got {path}: .*{why}|File exists"):
            exits.writable(path)


def test_a_folder_of_results(tmp_path: Path) -> None:
    assert list(exits.folder(tmp_path / "a" / "b").iterdir()) == []
    file = tmp_path / "file"
    file.write_text("kept")
    for path, why in ((file, "it is a file"), (file / "in", "Not a directory"), ("/proc/no", "No")):
        with pytest.raises(exits.Refusal, match=f"want a folder that can be written, .*: {why}"):
            exits.folder(Path(path))
    assert file.read_text() == "kept"


def test_demo_takes_no_file_for_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    for method in ("petal", "lora"):
        assert cli.main(["demo", "--method", method, "--out", str(file)]) == 2
        assert f"got {file}: it is a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "state", "why"),
    [
        (["--seed", "-1"], None, "--seed: want a whole number from 0 to"),
        (["--seed", str(1 << 70)], None, "--seed: want a whole number from 0 to"),
        (["--resume"], "{", "is no checkpoint of this version"),
        (["--resume"], '{"settings": {"other": 1}}', "is no checkpoint of this version"),
        (["--resume"], "{}", "is no checkpoint of this version"),
    ],
)
def test_what_demo_cannot_take_is_said(
    words: list[str],
    state: str | None,
    why: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if state is not None:
        checkpoint = tmp_path / "checkpoint-000001"
        checkpoint.mkdir()
        (checkpoint / "state.json").write_text(state)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", "--out", str(tmp_path), *words])
    assert stopped.value.code == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bench", "demo"])
def test_a_default_backend_that_is_none_is_a_mistake(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PETAL_BACKEND", "nonsense")
    words = {"bench": ["op"], "demo": ["--out", str(tmp_path)]}[name]
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, *words])
    assert stopped.value.code == 2
    assert "want one of" in capsys.readouterr().err
