"""The command line around the subcommands."""

from __future__ import annotations

import subprocess
import sys

import pytest

from petal_kernels.tools import cli, doctor


def test_an_interrupt_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "main", stopped)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_a_reader_who_leaves_is_no_traceback() -> None:
    run = [sys.executable, "-m", "petal_kernels.tools.cli", "memory", "--help"]
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        process.wait(60)
