"""The child processes that run cases: a case may crash, hang or spoil its GPU context, and the next
one still runs."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

Case = dict[str, Any]
START_SECONDS = 180.0
_TAIL = 1500
_ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass
class Worker:
    """One child; started when first needed, and again after it died."""

    module: str
    settings: dict[str, Any]
    variables: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._results = -1
        self._buffer = b""
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as self

    def run(self, case: Case, limit: float) -> dict[str, Any]:
        """The case's result; ``status`` says crash or timeout where it brought the process down.
        Starting the process is a part of the time."""
        begin = time.monotonic()
        if self._process is None:
            self._start()
            if self._read(min(START_SECONDS, limit)) is None:
                return self._lost("the process did not start", begin)
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(case).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return self._died("the process was gone")
        result = self._read(begin + limit - time.monotonic())
        if result is None:
            return self._lost("the process died", begin)
        if result.pop("spoilt"):
            self.stop()
        return result

    def _start(self) -> None:
        self._log.seek(0)
        self._log.truncate()
        self._results, theirs = os.pipe()
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "benchmarks.gpu.worker",
                str(theirs), self.module, json.dumps(self.settings),
            ],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            pass_fds=(theirs,),
            process_group=0,  # what a case has started ends with it
            env=os.environ | self.variables | {"PYTHONPATH": path},
        )  # fmt: skip
        os.close(theirs)
        self._buffer = b""

    def _read(self, limit: float) -> dict[str, Any] | None:
        """The next line, or None where none came in time or the process closed the pipe."""
        end = time.monotonic() + limit
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._results], [], [], max(end - time.monotonic(), 0.0))
            chunk = os.read(self._results, 1 << 16) if ready else b""
            if not chunk:
                if ready and self._process is not None:
                    self._process.wait()
                return None
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        found: dict[str, Any] = json.loads(line)
        return found

    def _lost(self, why: str, begin: float) -> dict[str, Any]:
        """No line came: the process is too late, or has died."""
        seconds = time.monotonic() - begin
        if self._process is not None and self._process.poll() is None:
            self._kill()
            found = self._died(f"no result after {seconds:.0f} s", "timeout")
        else:
            found = self._died(why)
        return found | {"seconds": round(seconds, 3)}

    def _died(self, why: str, status: str = "crash") -> dict[str, Any]:
        code = self._process.wait() if self._process is not None else None
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(self._log.tell() - _TAIL, 0))
        tail = self._log.read().decode(errors="replace")
        self.stop()
        return {"status": status, "error": f"{why} (exit code {code})\n{tail}".rstrip()}

    def _kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """End the child, if there is one, and what it has started."""
        if self._process is None:
            return
        self._kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        os.close(self._results)
        self._process = None


class Pool:
    """Workers that share a queue of cases; ``width`` of them at a time."""

    def __init__(
        self, module: str, settings: dict[str, Any], variables: dict[str, str], size: int
    ) -> None:
        self._workers = [Worker(module, settings, variables) for _ in range(size)]

    @property
    def size(self) -> int:
        """How many workers there are."""
        return len(self._workers)

    def run(
        self,
        cases: Iterable[Case],
        width: int,
        limit: Callable[[], float],
        done: Callable[[Case, dict[str, Any]], None],
    ) -> None:
        """Run the cases in order and report each; ``limit`` says how long the next may take, and
        ends the queue where that is not positive."""
        waiting: queue.SimpleQueue[Case] = queue.SimpleQueue()
        for case in cases:
            waiting.put(case)
        failures: list[BaseException] = []

        def serve(worker: Worker) -> None:
            try:
                while not failures and (seconds := limit()) > 0:
                    try:
                        case = waiting.get_nowait()
                    except queue.Empty:
                        return
                    result = worker.run(case, seconds)
                    if not failures:
                        done(case, result)
            except BaseException as e:
                failures.append(e)

        threads = [threading.Thread(target=serve, args=(w,)) for w in self._workers[:width]]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt as e:  # what it cuts off is another run's
            failures.append(e)
            self.stop()
        if failures:
            raise failures[0]

    def stop(self) -> None:
        """End every child."""
        for worker in self._workers:
            worker.stop()
