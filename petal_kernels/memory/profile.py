"""The result of a profile: records, totals, the curve of live bytes, and all of it as JSON."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from petal_kernels._runtime.checks import check_choice
from petal_kernels.memory.advice import advise
from petal_kernels.memory.arguments import check_count
from petal_kernels.memory.optimizer import Trained, with_step
from petal_kernels.memory.records import Block, Recomputed, Saved, Sizes, collapse
from petal_kernels.memory.text import report
from petal_kernels.memory.timeline import RESIDENT

SCHEMA = 2


@dataclass(frozen=True)
class Row:
    """What the same module of all layers keeps."""

    place: str
    kind: str
    role: str
    bytes: int
    count: int
    share: float
    largest: Saved
    also: int


@dataclass(frozen=True)
class Curve:
    """Live bytes after every operation, by what they are for, thinned out to few points."""

    steps: list[int]
    total: list[int]
    parts: dict[str, list[int]]


@dataclass
class Profile:
    """What one training step kept and held. Bytes everywhere."""

    saved: list[Saved]
    sizes: Sizes
    live: list[int]
    phases: dict[str, int]
    peak_step: int
    peak_phase: str
    blocks: list[Block]
    recomputed: list[Recomputed]
    checkpointed: bool
    training: bool
    fake: bool
    rule: str
    frozen: list[str]  # largest modules of which nothing is trained
    trained: frozenset[str]  # names of the parameters that are
    seconds: dict[str, float]
    device_bytes: dict[str, int] = field(default_factory=dict)  # the CUDA allocator's own figures
    parameters: list[Trained] = field(default_factory=list)  # what an optimizer moves
    backward: bool = True  # False: the forward alone was asked for
    optimizer: str = ""  # whose step is the last phase
    before_optimizer: Profile | None = field(default=None, repr=False)
    compiled: bool = False  # parts ran as compiled code, whose own allocations are not seen
    notes: list[str] = field(default_factory=list)  # what limits these figures

    @property
    def saved_bytes(self) -> int:
        """Kept for backward at the end of the forward, without parameters and buffers."""
        return sum(record.bytes for record in self.saved)

    @property
    def peak_bytes(self) -> int:
        """Most bytes alive after any operation; parameters, batch and gradients included."""
        return self.live[self.peak_step] if self.live else 0

    @property
    def shared(self) -> int:
        """Saves that cost nothing, because another one keeps the same storage."""
        return sum(len(record.also) for record in self.saved)

    @property
    def resident_bytes(self) -> int:
        """What is there before the step: parameters, buffers, batch, gradients of earlier
        micro-batches, an optimizer's states.
        """
        own = self.sizes.parameters + self.sizes.buffers + self.sizes.batch
        return own + self.sizes.earlier_gradients + self.sizes.states

    @property
    def kept_bytes(self) -> int:
        """What a forward leaves alive: saved tensors, results, what Python holds."""
        saved = sum(record.bytes for record in self.saved if not record.of_batch)
        return saved + self.sizes.outputs + self.sizes.elsewhere

    def peak_of(self, phase: str) -> int:
        """Most bytes alive in a phase above what was there before the step."""
        check_choice("phase", phase, tuple(self.phases))
        begin = self.phases[phase]
        later = [at for at in self.phases.values() if at > begin]
        return max(self.live[begin : min(later, default=None)], default=0) - self.resident_bytes

    def with_optimizer(self, optimizer: Any, **settings: Any) -> Profile:
        """This step and the optimizer's after it: states in `sizes.states` and on the timeline from
        the beginning, the update as the phase "optimizer", and the peak of it all.

        optimizer   "adamw", "adam", "sgd", "adamw8bit", "adam8bit" (bitsandbytes), or an instance
                    of these whose parameters are the profiled model's.
        settings    of an optimizer by name, as torch calls them: foreach, fused, amsgrad, maximize,
                    capturable, weight_decay, momentum, nesterov; min_8bit_size. Without foreach or
                    fused a name takes foreach, torch's choice on CUDA (foreach=False: the loop);
                    an instance that leaves it open takes torch's choice for its parameters' device.

        Parameters without a gradient are not moved and have no state. Gradients that are there
        before the step (accumulation, zero_grad(set_to_none=False)): `profile(accumulate=True)`.
        Raises TypeError or ValueError for an optimizer or setting that is not known, and for a
        profile without its backward.
        """
        return with_step(self.before_optimizer or self, optimizer, **settings)

    def with_adam(self) -> int:
        """The peak of a step with torch.optim.AdamW as it runs on CUDA (foreach) at its end."""
        return self.with_optimizer("adamw").peak_bytes

    def rows(self) -> list[Row]:
        """Largest first; the layers of one stack are one row."""
        groups: dict[tuple[str, str, str], list[Saved]] = {}
        for record in self.saved:
            groups.setdefault((record.place, record.kind, record.role), []).append(record)
        total = self.saved_bytes
        rows = []
        for (place, kind, role), records in groups.items():
            size = sum(r.bytes for r in records)
            largest = max(records, key=lambda r: r.bytes)
            also = sum(len(r.also) for r in records)
            rows.append(Row(place, kind, role, size, len(records), size / total, largest, also))
        return sorted(rows, key=lambda row: -row.bytes)

    def by(self, attribute: str) -> dict[str, int]:
        """Saved bytes by a field of the records ("role", "dtype", "operation"), largest first."""
        check_choice("attribute", attribute, tuple(f.name for f in dataclasses.fields(Saved)))
        found: Counter[str] = Counter()
        for record in self.saved:
            found[str(getattr(record, attribute)).removeprefix("torch.")] += record.bytes
        return dict(found.most_common())

    def at_peak(self, count: int = 8) -> list[tuple[str, str, int]]:
        """What was alive at the peak: (category, place and operation, bytes), largest first; the
        model's parameters are one line, an optimizer's states another.
        """
        check_count("count", count)
        found: Counter[tuple[str, str]] = Counter()
        for block in self.blocks:
            if block.lives_at(self.peak_step):
                whole = block.category in ("parameters", "optimizer states")
                where = "" if whole else collapse(block.module)
                if block.category not in RESIDENT:
                    where = f"{where} {block.operation}".strip()
                found[(block.category, where)] += block.bytes
        return [(category, where, size) for (category, where), size in found.most_common(count)]

    def curve(self, points: int = 240) -> Curve:
        """The curve thinned out to at most `points`, each the largest of its stretch."""
        check_count("points", points, 1)
        if not self.live:
            return Curve([], [], {})
        width = max(1, -(-len(self.live) // points))
        steps = [
            max(range(i, min(i + width, len(self.live))), key=self.live.__getitem__)
            for i in range(0, len(self.live), width)
        ]
        # Births and deaths as differences, summed up once: a block lives in [born, died).
        changes: dict[str, list[int]] = {}
        for block in self.blocks:
            change = changes.setdefault(block.category, [0] * (len(self.live) + 1))
            change[block.born] += block.bytes
            if block.died is not None:
                change[block.died] -= block.bytes
        parts: dict[str, list[int]] = {}
        for category, change in changes.items():
            wanted, now, values = iter([*steps, -1]), 0, []
            step = next(wanted)
            for at, difference in enumerate(change):
                now += difference
                if at == step:
                    values.append(now)
                    step = next(wanted)
            parts[category] = values
        return Curve(steps, [self.live[s] for s in steps], parts)

    def table(self, limit: int = 20) -> str:
        """The report as text, its table of at most `limit` rows."""
        check_count("limit", limit)
        return report(self, limit)

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Everything but single blocks, as plain data; `schema` changes when a key's meaning
        does.
        """
        curve = self.curve()
        return {
            "schema": SCHEMA,
            "saved_bytes": self.saved_bytes,
            "peak_bytes": self.peak_bytes,
            "peak_with_adam_bytes": self.with_adam() if self.backward else None,
            "optimizer": self.optimizer,
            "peak_phase": self.peak_phase,
            "sizes": dataclasses.asdict(self.sizes),
            "training": self.training,
            "fake": self.fake,
            "checkpointed": self.checkpointed,
            "compiled": self.compiled,
            "notes": self.notes,
            "rule": self.rule,
            "seconds": self.seconds,
            "device_bytes": self.device_bytes,
            "saved": [_plain(record) for record in self.saved],
            "recomputed": [dataclasses.asdict(r) for r in self.recomputed],
            "advice": [dataclasses.asdict(a) for a in advise(self)],
            "timeline": {
                "operations": len(self.live),
                "phases": self.phases,
                "steps": curve.steps,
                "live": curve.total,
                "parts": curve.parts,
            },
            "at_peak": [
                {"category": category, "where": where, "bytes": size}
                for category, where, size in self.at_peak()
            ],
        }


def _plain(record: Saved) -> dict[str, Any]:
    values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    values["dtype"] = str(record.dtype).removeprefix("torch.")
    values["also"] = [dataclasses.asdict(keeper) for keeper in record.also]
    return values
