"""The child processes that run cases: a case may crash, hang or spoil its GPU context, and the next
one still runs."""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import IO, Any

from petal_kernels.tools import environment

Case = dict[str, Any]
START_SECONDS = 180.0
_TAIL = 1500


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
        """The case's result; ``status`` says crash or timeout where it brought the process down."""
        if self._process is None:
            self._start()
            if self._read(START_SECONDS) is None:
                return self._died("the process did not start")
        process = self._process
        assert process is not None
        assert process.stdin is not None
        begin = time.monotonic()
        try:
            process.stdin.write(json.dumps(case).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return self._died("the process was gone")
        result = self._read(limit)
        if result is None:
            late = process.poll() is None
            seconds = {"seconds": round(time.monotonic() - begin, 3)}
            if late:
                process.kill()
                return self._died(f"no result after {limit:.0f} s", "timeout") | seconds
            return self._died("the process died") | seconds
        if result.pop("spoilt"):
            self.stop()
        return result

    def _start(self) -> None:
        self._log.seek(0)
        self._log.truncate()
        self._results, theirs = os.pipe()
        path = os.pathsep.join(filter(None, (str(environment.ROOT), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "petal_kernels.tools.gpu.worker",
                str(theirs), self.module, json.dumps(self.settings),
            ],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            pass_fds=(theirs,),
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

    def _died(self, why: str, status: str = "crash") -> dict[str, Any]:
        code = self._process.wait() if self._process is not None else None
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(self._log.tell() - _TAIL, 0))
        tail = self._log.read().decode(errors="replace")
        self.stop()
        return {"status": status, "error": f"{why} (exit code {code})\n{tail}".rstrip()}

    def stop(self) -> None:
        """End the child, if there is one."""
        if self._process is None:
            return
        self._process.kill()
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
                    done(case, worker.run(case, seconds))
            except BaseException as e:
                failures.append(e)

        threads = [threading.Thread(target=serve, args=(w,)) for w in self._workers[:width]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    def stop(self) -> None:
        """End every child."""
        for worker in self._workers:
            worker.stop()
