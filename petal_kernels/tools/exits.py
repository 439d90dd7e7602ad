"""How a command ends: one table of exit codes, and what stands around every command's `main`.

0 fine; 1 the bound that was asked for is broken; 2 wrong usage, or it cannot run here; 130
interrupted; 141 the reader of its output has gone. A program that reads the code must be able to
trust it, so 1 is never anything else: an exception that nobody expected shows its traceback and
ends with 2. A user's mistake is a `Refusal` (or `parser.error`) and shows one line.

A command wraps what may fail by the user's doing in `with refusing(parser, ValueError, OSError):`,
calls `writable(...)` on the files it is to write before it begins its work, and is itself called
through `run`, by `cli.main` or by its own `__main__`.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from petal_kernels._runtime.backends import BackendUnavailable

FINE = 0
BROKEN_BOUND = 1
REFUSED = 2
INTERRUPTED = 130  # as a shell says it: 128 and the signal's number
READER_GONE = 141
_OUTSIDE = (errno.ENOSPC, errno.EDQUOT)  # no fault of anyone's code


class Refusal(Exception):  # noqa: N818 - it is what the command says
    """The command cannot do what was asked; the message is all that a user sees."""


@contextlib.contextmanager
def refusing(parser: argparse.ArgumentParser, *kinds: type[Exception]) -> Iterator[None]:
    """Exceptions of these kinds are mistakes of the user: `parser.error` says them.

    A reader who has gone is none, though Python calls it an OSError.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except kinds as error:
        parser.error(f"{error}" or type(error).__name__)


def writable(*paths: Path | None) -> None:
    """Look before hours of work whether their results can be written; None and "-" are no files.

    Folders above a file are made. Raises Refusal where a path is a folder or cannot be written.
    """
    for path in paths:
        if path is None or str(path) == "-":
            continue
        try:
            if path.is_dir():
                raise IsADirectoryError("it is a folder")
            if path.exists() and not path.is_file():  # opening a pipe would wait for its reader
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not path.exists()
            with path.open("ab"):  # an older file keeps what it holds
                pass
            if new:
                path.unlink()
        except OSError as error:
            why = error.strerror or str(error)
            raise Refusal(f"want a file that can be written, got {path}: {why}") from error


def folder(path: Path) -> Path:
    """Make a folder for results. Raises Refusal where that is a file, or cannot be written in."""
    probe = path / f".petal-{os.getpid()}"
    try:
        if path.exists() and not path.is_dir():
            raise NotADirectoryError("it is a file")
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        why = error.strerror or str(error)
        raise Refusal(f"want a folder that can be written, got {path}: {why}") from error
    return path


def run(command: Callable[[], int], program: str) -> int:
    """The exit code of `command`, whatever happens in it; its output is flushed.

    SystemExit, argparse's, passes through where its output could be written. `program` begins the
    line of a refusal.
    """
    try:
        try:
            return _code(command, program)
        finally:
            if sys.stdout is not None:  # Python has none where the descriptor is closed
                sys.stdout.flush()
    except KeyboardInterrupt:  # while the last of the output was written
        return _interrupted()
    except BrokenPipeError:
        _hush()
        return READER_GONE
    except OSError as error:  # a full disk
        _hush()
        return _said(f"{program}: error: {error}", REFUSED)


def _code(command: Callable[[], int], program: str) -> int:
    try:
        return command()
    except SystemExit as stop:
        if isinstance(stop.code, str):  # Python would end with 1
            return _said(stop.code, REFUSED)
        raise
    except KeyboardInterrupt:
        return _interrupted()
    except (Refusal, BackendUnavailable) as error:
        return _said(f"{program}: error: {error}", REFUSED)
    except Exception as error:
        if isinstance(error, BrokenPipeError) or getattr(error, "errno", None) in _OUTSIDE:
            raise
        traceback.print_exc()
        return REFUSED


def _interrupted() -> int:
    # Python keeps in mind that an interrupt left code which was run from a string (an import is
    # full of it), though it was caught further out, and would end by the signal; until other such
    # code is run.
    exec("")
    return _said("\ninterrupted", INTERRUPTED)


def _said(text: str, code: int) -> int:
    """The code, with the reason for it on stderr."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
    return code


def _hush() -> None:
    """What is still buffered goes nowhere: the interpreter flushes once more when it leaves, and
    would complain on stderr and change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            with contextlib.suppress(OSError):  # one of a test's own has no descriptor
                os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
