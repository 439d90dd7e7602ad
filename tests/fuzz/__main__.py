"""``python -m tests.fuzz --calls N --seed S``: check N calls in several processes, and report.

Workers die alone: a crash or a hang is reported with the case that caused it, and the run goes on
behind it. ``--out FILE`` is written every few seconds, so that what was done is never lost, and
``--resume`` goes on from it. Failures print a script that shows each again.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from petal_kernels.tools import environment
from tests.fuzz.worker import BACKENDS, Place
from tests.ops import folders

ROOT = Path(__file__).resolve().parent.parent.parent
OPERATORS = folders.names()
# What a profile's backends are called in a report.
NAMES = {"cuda": {"torch": "cuda (emulated)"}, "triton": {"triton": "triton (interpreted)"}}
CHUNK = {"cpu": 400, "triton": 8, "cuda": 20}
HANG = 300.0  # seconds without a new case after which a worker is ended
SHOWN = 40  # failures


def reproduction(profile: str, operator: str, seed: int, index: int) -> str:
    """A script that shows a failure again."""
    return (
        "from tests.fuzz import worker\n"
        f"worker.prepare({profile!r})\n"
        "from tests.fuzz.check import check\n"
        f"found = check({operator!r}, {seed}, {index}, {BACKENDS[profile]}, {profile!r})\n"
        "print(*found.faults, sep='\\n')"
    )


@dataclass
class Totals:
    """What a run has found so far."""

    calls: dict[str, Counter[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    cases: Counter[str] = field(default_factory=Counter)
    declined: Counter[str] = field(default_factory=Counter)
    second_looks: int = 0
    no_headroom: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    next: dict[str, int] = field(default_factory=dict)  # first index not handed out, by stream

    def add(self, r: dict[str, Any]) -> None:
        """Take a chunk's results."""
        name = f"{r['operator']} {r['profile']}"
        backend = {
            "cuda": {"torch": "cuda (emulated)"},
            "triton": {"triton": "triton (interpreted)"},
        }
        names = backend.get(r["profile"], {})
        counts = {names.get(k, k): v for k, v in r["calls"].items()}
        self.calls.setdefault(r["operator"], Counter()).update(counts)
        self.seconds[name] = self.seconds.get(name, 0.0) + r["seconds"]
        self.cases[name] += r["count"]
        self.declined.update(
            {f"{r['operator']} {names.get(k, k)}": v for k, v in r["declined"].items()}
        )
        self.second_looks += r["second_looks"]
        self.no_headroom += r["no_headroom"]
        for f in r["failures"]:
            self.failure(r["profile"], r["operator"], r["seed"], f["index"], f["faults"])

    def failure(
        self, profile: str, operator: str, seed: int, index: int, faults: list[str]
    ) -> None:
        """Record a failure, and print the first ones."""
        script = reproduction(profile, operator, seed, index)
        self.failures.append(
            {"operator": operator, "profile": profile, "seed": seed, "index": index,
             "faults": faults, "script": script}
        )  # fmt: skip
        if len(self.failures) <= SHOWN:
            print(f"FAILED {operator} ({profile}), seed {seed}, index {index}")
            print("  " + "\n  ".join(faults))
            print(f"python - <<'E'\n{script}\nE", flush=True)

    @property
    def total(self) -> int:
        """Calls checked."""
        return sum(sum(c.values()) for c in self.calls.values())


class Worker:
    """A process and the chunk it works on."""

    def __init__(self, profile: str, folder: Path, number: int) -> None:
        self.profile, self.path = profile, folder / f"{profile}-{number}"
        self.chunk: dict[str, Any] | None = None
        self.start()

    def start(self) -> None:
        """Start the process anew."""
        self.path.write_bytes((-1).to_bytes(8, "little", signed=True))
        self.log = self.path.with_suffix(".log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker", self.profile, str(self.path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, cwd=ROOT,
            # Threads that wait do not spin on the core that another worker needs.
            env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
        )  # fmt: skip
        self.ready, self.seen, self.since = False, -1, time.monotonic()

    def give(self, chunk: dict[str, Any]) -> None:
        """Hand over a chunk."""
        assert self.process.stdin is not None
        self.chunk, self.since = chunk, time.monotonic()
        self.process.stdin.write(json.dumps(chunk) + "\n")
        self.process.stdin.flush()

    def hangs(self) -> bool:
        """Whether it has been in one case for too long."""
        now, place = time.monotonic(), Place.read(self.path)
        if place != self.seen:
            self.seen, self.since = place, now
        return self.chunk is not None and self.ready and now - self.since > HANG

    def end(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


class Run:
    """Hands chunks to workers until enough calls were checked or the time is over."""

    def __init__(self, profile: str, options: argparse.Namespace, totals: Totals) -> None:
        self.profile, self.o, self.totals = profile, options, totals
        self.left: deque[dict[str, Any]] = deque()  # what a dead worker left behind
        self.turn, self.started = 0, False
        self.begin = self.saved = time.monotonic()
        self.done = 0

    def next_chunk(self) -> dict[str, Any] | None:
        """The operators by turns; None when there is enough."""
        if self.left:
            return self.left.popleft()
        budget = self.o.seconds if self.profile != "cpu" else self.o.most_seconds
        if time.monotonic() - self.begin > budget or self.done >= self.wanted():
            return None
        operator = self.o.operators[self.turn % len(self.o.operators)]
        self.turn += 1
        key = f"{operator} {self.profile}"
        first = self.totals.next.get(key, 0)
        size = min(CHUNK[self.profile], max(1, self.wanted() // (2 * len(self.o.operators)) + 1))
        self.totals.next[key] = first + size
        self.done += size * (2 if self.profile == "cpu" else 1)  # an estimate, put right below
        return {
            "operator": operator, "seed": self.o.seed, "first": first, "count": size,
            "profile": self.profile,
        }  # fmt: skip

    def wanted(self) -> int:
        """Calls still to be checked when this run began."""
        return self.o.calls if self.profile == "cpu" else 1 << 60

    def run(self) -> None:
        """Until done."""
        with tempfile.TemporaryDirectory() as folder:
            workers = [Worker(self.profile, Path(folder), n) for n in range(self.o.jobs)]
            selector = selectors.DefaultSelector()
            for w in workers:
                selector.register(w.process.stdout, selectors.EVENT_READ, w)  # type: ignore[arg-type]
            try:
                self._serve(selector, len(workers))
            finally:
                for w in workers:
                    w.end()

    def _serve(self, selector: selectors.BaseSelector, live: int) -> None:
        while live:
            for key, _ in selector.select(timeout=5.0):
                worker: Worker = key.data
                line = key.fileobj.readline()  # type: ignore[union-attr]
                if not line:
                    selector.unregister(key.fileobj)
                    live -= not self._revive(worker, selector)
                    continue
                self._take(worker, json.loads(line))
                chunk = self.next_chunk()
                if chunk is None:
                    selector.unregister(key.fileobj)
                    worker.process.stdin.close()  # type: ignore[union-attr]
                    live -= 1
                else:
                    worker.give(chunk)
            for key in list(selector.get_map().values()):
                if key.data.hangs():
                    key.data.process.send_signal(signal.SIGKILL)

    def _take(self, worker: Worker, message: dict[str, Any]) -> None:
        if message.get("ready"):
            worker.ready = True
            if not self.started:  # compiling kernels for the emulation is not counted
                self.started, self.begin = True, time.monotonic()
            return
        self.totals.add(message)
        worker.chunk = None
        if self.profile == "cpu":
            self.done += sum(message["calls"].values()) - 2 * message["count"]
        if time.monotonic() - self.saved > 10:
            self.saved = time.monotonic()
            save(self.o, self.totals, complete=False)

    def _revive(self, worker: Worker, selector: selectors.BaseSelector) -> bool:
        """After a worker died: report the case, go on behind it. False: there is nothing to do."""
        code = worker.process.wait()
        chunk, index = worker.chunk, Place.read(worker.path)
        worker.log.seek(0)
        log = worker.log.read()[-2000:]
        if chunk is None or index < chunk["first"]:
            raise RuntimeError(f"a worker did not start (exit status {code}):\n{log}")
        last = chunk["first"] + chunk["count"]
        what = f"the process ended with status {code} ({'hang' if worker.hangs() else 'crash'})"
        self.totals.failure(self.profile, chunk["operator"], chunk["seed"], index, [what, log])
        # The cases before it are checked again: what they found was lost with the process.
        for first, end in ((chunk["first"], index), (index + 1, last)):
            if end > first:
                self.left.append(chunk | {"first": first, "count": end - first})
        worker.chunk = None
        worker.start()
        selector.register(worker.process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
        return True


def report(options: argparse.Namespace, totals: Totals, complete: bool) -> dict[str, Any]:
    """Of a run, for a result file."""
    per = {
        name: round(1e3 * s / max(totals.cases[name], 1), 3) for name, s in totals.seconds.items()
    }
    return {
        "what": "python -m tests.fuzz: operator calls, each checked (tests/fuzz/__init__.py)",
        "complete": complete,
        "seed": options.seed,
        "calls": totals.total,
        "calls_by_operator": {k: dict(sorted(v.items())) for k, v in sorted(totals.calls.items())},
        "cases": dict(sorted(totals.cases.items())),
        "milliseconds_per_case": dict(sorted(per.items())),
        "declined": dict(sorted(totals.declined.items())),
        "second_looks": totals.second_looks,
        "no_headroom": totals.no_headroom,
        "failures": totals.failures[:1000],
        "failure_count": len(totals.failures),
        "wall_seconds": round(options.spent + time.monotonic() - options.begin, 1),
        "jobs": options.jobs,
        "next": totals.next,
        "environment": environment.describe(1),
    }


def save(options: argparse.Namespace, totals: Totals, complete: bool) -> None:
    """Write the report, whole or not at all."""
    if options.out is None:
        return
    part = options.out.with_suffix(".part")
    part.write_text(json.dumps(report(options, totals, complete), indent=1) + "\n")
    part.replace(options.out)


def resume(options: argparse.Namespace) -> Totals:
    """What an earlier run of the same seed has done; indices in flight then are left out."""
    old = json.loads(options.out.read_text())
    if old["seed"] != options.seed or old["complete"]:
        raise SystemExit(f"--resume: {options.out} is complete, or of seed {old['seed']}")
    totals = Totals(
        {k: Counter(v) for k, v in old["calls_by_operator"].items()},
        {k: v * old["cases"][k] / 1e3 for k, v in old["milliseconds_per_case"].items()},
        Counter(old["cases"]), Counter(old["declined"]),
        old["second_looks"], old["no_headroom"], old["failures"], old["next"],
    )  # fmt: skip
    options.spent = old["wall_seconds"]
    return totals


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    p.add_argument("--calls", type=int, default=10_000, help="on the torch and native backends")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--jobs", type=int, default=2)
    p.add_argument("--seconds", type=float, default=0.0,
                   help="for each of Triton's interpreter and the CUDA emulation")  # fmt: skip
    p.add_argument("--most-seconds", type=float, default=float("inf"), help="for the CPU backends")
    p.add_argument("--operators", nargs="+", default=list(OPERATORS), choices=OPERATORS)
    p.add_argument("--profiles", nargs="+", default=["triton", "cuda", "cpu"],
                   choices=["triton", "cuda", "cpu"])  # fmt: skip
    p.add_argument("--out", type=Path, help="a JSON report")
    p.add_argument("--resume", action="store_true", help="go on from --out")
    return p.parse_args(arguments)


def main() -> int:
    """Exit 1 if any call failed."""
    options = parse()
    options.begin, options.spent = time.monotonic(), 0.0
    totals = resume(options) if options.resume else Totals()
    options.calls = max(options.calls - totals.total, 0)
    for profile in options.profiles:
        if profile == "cpu" or options.seconds > 0:
            Run(profile, options, totals).run()
    save(options, totals, complete=True)
    for operator, counts in sorted(totals.calls.items()):
        print(operator, ", ".join(f"{k} {v}" for k, v in sorted(counts.items())))
    spent = time.monotonic() - options.begin
    print(f"{totals.total} calls, seed {options.seed}, {spent:.0f} s, "
          f"{totals.second_looks} second looks, {len(totals.failures)} failures")  # fmt: skip
    return 1 if totals.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
