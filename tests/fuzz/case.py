"""How a case is drawn, and how its tensors lie in memory.

All tensors of one dtype are views of one buffer, the arena: contiguous, offset, padded, transposed,
stepped or expanded, with gaps between them. One copy of the arena shows whether any input was
written, and an fp64 copy viewed in the same way is the same case for the formulas.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "offset", "padded", "transposed", "stepped", "expanded")
_LAYOUT_WEIGHTS = (50, 12, 14, 10, 7, 7)
_EDGES = (63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 300)
LOW_PRECISION = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Slot:
    """A tensor of a case: where it lies in the arena of its dtype."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    extent: int
    factor: float


@dataclass(frozen=True)
class Ref:
    """Stands in a case's arguments for the tensor of a slot."""

    index: int


@dataclass
class Case:
    """One call: arguments with ``Ref`` for each floating tensor, and what is done with it."""

    operator: str
    seed: int
    index: int
    profile: str
    dtype: torch.dtype  # of the activations
    slots: list[Slot] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)
    trained: list[int] = field(default_factory=list)  # slots that need a gradient
    upstream: list[int | None] = field(default_factory=list)  # of each output; None: not used
    plans: dict[str, str] = field(default_factory=dict)  # by backend, where it is asked for by name
    generator_seed: int | None = None  # rng=None: what torch.manual_seed gets before each call
    spoiled: bool = False  # holds NaN or Inf
    magnitude: str = "normal"
    repeat: bool = False
    threads: bool = False
    twice: bool = False  # asks for second derivatives too
    values: int = 0  # seed of the tensors' values

    @property
    def forward_only(self) -> bool:
        """Whether nothing is pulled back."""
        return not self.trained or all(u is None for u in self.upstream)


class Draw:
    """The randomness of one case, and the tensors that it asks for."""

    def __init__(self, operator: str, seed: int, index: int, profile: str) -> None:
        self.r = random.Random(f"{operator} {seed} {index} {profile}")
        self.small = profile != "cpu"
        self.case = Case(operator, seed, index, profile, torch.float32)
        self.case.values = self.r.getrandbits(60)
        self._ends: dict[torch.dtype, int] = {}
        self.wide_parameters = False
        self.layouts: tuple[str, ...] = LAYOUTS
        self.scales = (1.0, 1.0)  # of activations and of parameters

    def chance(self, p: float) -> bool:
        """True with probability p."""
        return self.r.random() < p

    def pick(self, *values: Any) -> Any:
        """One of the values."""
        return values[int(self.r.random() * len(values))]

    def weighted(self, **weights: float) -> str:
        """One of the names, by weight."""
        return self.r.choices(list(weights), list(weights.values()))[0]

    def size(self, least: int = 1, most: int = 300) -> int:
        """A size: mostly 1 .. 40, sometimes past a block's boundary."""
        u, top = self.r.random(), min(most, 40 if not self.small else 24)
        if u < 0.08:
            return least
        if u < 0.82 or most <= 40:
            return self.r.randint(least, max(least, top))
        if u < 0.95 or self.small:
            return self.r.randint(least, max(least, min(most, 130 if not self.small else 72)))
        return max(least, min(most, self.pick(*_EDGES)))

    def start(self) -> None:
        """Draw what every operator has: dtypes, magnitude, how often things are repeated."""
        c = self.case
        kinds = {"float32": 40.0, "bfloat16": 25.0, "float16": 25.0, "float64": 10.0}
        if c.profile == "triton":
            kinds = {"float32": 60.0, "float16": 40.0}  # the interpreter's bf16 product is wrong
        if c.profile == "cuda":
            kinds.pop("float64")
        c.dtype = getattr(torch, self.weighted(**kinds))
        self.wide_parameters = c.dtype != torch.float32 and self.chance(0.4)
        c.magnitude = self.weighted(normal=82, small=3, tiny=3, large=3, huge=3, mixed=6)
        half = c.dtype == torch.float16
        self.scales = {
            "small": (1e-3, 1.0) if half else (1e-8, 1.0),
            "tiny": (1e-4, 1e-1) if half else (1e-38, 1e-2),
            "large": (16.0, 1.0) if half else (1e5, 1.0),
            "huge": (2e4, 1.0) if half else (1e37, 1.0),
            "mixed": (30.0, 3e-2) if half else (1e3, 1e-3),
        }.get(c.magnitude, (1.0, 1.0))
        c.spoiled = self.chance(0.06)
        c.repeat = self.chance(0.25)
        c.threads = not self.small and self.chance(0.015)
        c.twice = self.chance(0.02)

    def lead(self, dims: int | None = None, most: int = 300) -> tuple[int, ...]:
        """Leading dims; a zero among them now and then."""
        count = self.pick(0, 1, 1, 1, 2, 2, 2, 3) if dims is None else dims
        if self.case.threads:
            most = 700
        rows = self.r.randint(200, most) if self.case.threads else self.size(1, most)
        if count == 0:
            return ()
        sizes = [1] * count
        for i in range(count - 1):
            sizes[i] = self.r.randint(1, max(1, min(6, rows)))
        sizes[-1] = max(1, rows // math.prod(sizes[:-1]))
        if self.chance(0.03):
            sizes[self.r.randrange(count)] = 0
        return tuple(sizes)

    # --- tensors ---

    def tensor(
        self,
        name: str,
        *shape: int,
        dtype: torch.dtype | None = None,
        factor: float = 1.0,
        layouts: Sequence[str] | None = None,
    ) -> Ref:
        """A floating tensor of normal numbers times ``factor``."""
        dtype = self.case.dtype if dtype is None else dtype
        layout = self.r.choices(LAYOUTS, _LAYOUT_WEIGHTS)[0]
        layout = layout if layout in (layouts or self.layouts) else "contiguous"
        strides, extent = self._strides(shape, layout)
        offset = self._ends.get(dtype, 0)
        if layout == "contiguous":
            offset = -(-offset // 16) * 16
        else:
            offset += self.r.randint(0, 9)
        self._ends[dtype] = offset + extent
        self.case.slots.append(Slot(name, dtype, shape, strides, offset, extent, factor))
        return Ref(len(self.case.slots) - 1)

    def row(self, name: str, *shape: int, factor: float = 1.0) -> Ref:
        """Activations."""
        return self.tensor(name, *shape, factor=factor * self.scales[0])

    def parameter(self, name: str, *shape: int, factor: float = 1.0) -> Ref:
        """A parameter: of the activations' dtype, or float32."""
        wide = self.wide_parameters and self.chance(0.8)
        dtype = torch.float32 if wide else self.case.dtype
        return self.tensor(name, *shape, dtype=dtype, factor=factor * self.scales[1])

    def maybe(self, p: float, make: Callable[[], Ref]) -> Ref | None:
        """A tensor with probability p."""
        return make() if self.chance(p) else None

    def _strides(self, shape: tuple[int, ...], layout: str) -> tuple[tuple[int, ...], int]:
        if not shape:
            return (), 1
        order, steps = list(range(len(shape))), 1
        pads = [0] * len(shape)
        expanded = None
        if layout == "transposed" and len(shape) > 1:
            i, j = self.r.sample(range(len(shape)), 2)
            order[i], order[j] = order[j], order[i]
        elif layout == "stepped":
            steps = self.r.randint(2, 3)
        elif layout == "padded" and len(shape) > 1:
            pads[self.r.randrange(1, len(shape))] = self.r.randint(1, 9)
        elif layout == "expanded":
            expanded = self.r.randrange(len(shape))
        strides, run = [0] * len(shape), steps
        for dim in reversed(order):
            if dim == expanded:
                continue
            strides[dim] = run
            run *= max(shape[dim] + pads[dim], 1)
        last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        return tuple(strides), 0 if 0 in shape else last + 1

    def state(self) -> Tensor | None:
        """An rng argument; None: drawn from the default generator, whose seed is then fixed."""
        if self.chance(0.2):
            self.case.generator_seed = self.r.getrandbits(40)
            return None
        edge = (0, 1, (1 << 62) - 1, 0xFFFF_FFFF, (1 << 63) - 1, -1, -(1 << 63))
        seed = self.pick(*edge) if self.chance(0.2) else self.r.getrandbits(62)
        offset = self.pick(*edge) if self.chance(0.3) else self.r.getrandbits(62)
        values = torch.tensor([seed, 5, offset, 7])
        return values[::2] if self.chance(0.2) else values[::2].clone()

    def dropout(self, p: float = 0.4) -> float:
        """A dropout probability, 0 with probability 1 - p."""
        if not self.chance(p):
            return 0.0
        return self.pick(0.1, 0.5, 0.25, 0.9, 1e-6, 0.999, self.r.random())

    def number(self, p: float = 0.5) -> float:
        """A scale: 1, or something else with probability p."""
        if not self.chance(p):
            return 1.0
        return self.pick(0.5, -1.5, 0.3, 2, 0.0, 1, -1.0)

    # --- the end ---

    def finish(self, trainable: Sequence[Ref | None], outs: Sequence[tuple[Any, ...]]) -> Case:
        """Draw which tensors are trained and each output's upstream gradient (shape, dtype)."""
        c = self.case
        kind = self.weighted(all=45, some=40, none=15)
        for ref in trainable:
            if ref is not None and (kind == "all" or (kind == "some" and self.chance(0.5))):
                c.trained.append(ref.index)
        for shape, dtype in outs:
            if c.trained and (len(outs) == 1 or self.chance(0.9)):
                c.upstream.append(self.tensor("upstream", *shape, dtype=dtype).index)
            else:
                c.upstream.append(None)
        return c


class Arena:
    """The buffers of a case, one for each dtype, and views of them."""

    def __init__(self, case: Case, buffers: dict[torch.dtype, Tensor]) -> None:
        self.case, self.buffers = case, buffers

    @classmethod
    def of(cls, case: Case) -> Arena:
        """Values drawn from the case's own seed."""
        ends: dict[torch.dtype, int] = {}
        for s in case.slots:
            ends[s.dtype] = max(ends.get(s.dtype, 0), s.offset + s.extent)
        g = torch.Generator().manual_seed(case.values)
        flat = torch.randn(sum(ends.values()) + 16, generator=g)
        wide, begin = {}, 0
        for dtype, end in ends.items():
            wide[dtype], begin = flat[begin : begin + end], begin + end
        for s in case.slots:
            if s.factor != 1.0 and s.extent:
                wide[s.dtype][s.offset : s.offset + s.extent] *= s.factor
        if case.spoiled:
            _spoil(case, wide)
        return cls(case, {d: w.to(d) if d != torch.float32 else w.clone() for d, w in wide.items()})

    def double(self) -> Arena:
        """The same numbers in fp64."""
        return Arena(self.case, {d: b.double() for d, b in self.buffers.items()})

    def near(self, seed: int) -> Arena:
        """Every number moved by at most one rounding step of the activations' dtype (of its own, if
        that is coarser), near zero by one of the least it can hold."""
        g = torch.Generator().manual_seed(seed)
        moved = {}
        for d, b in self.buffers.items():
            step = max(torch.finfo(d).eps, torch.finfo(self.case.dtype).eps)
            info = torch.finfo(self.case.dtype)
            least = info.smallest_normal * (info.eps if info.dtype == "float16" else 1)
            sign = torch.randint(0, 3, b.shape, generator=g) - 1
            moved[d] = (b.double() * (1 + step * sign) + least * sign).to(d)
        return Arena(self.case, moved)

    def larger(self) -> Arena:
        """Every number four times as large."""
        return Arena(self.case, {d: b * 4 for d, b in self.buffers.items()})

    def with_infinities_as(self, value: float) -> Arena:
        """Another number in their place."""
        found = {d: torch.where(b.isinf(), value, b) for d, b in self.buffers.items()}
        return Arena(self.case, found)

    def snapshot(self) -> dict[torch.dtype, Tensor]:
        """A copy of the bits."""
        return {d: _bits(b).clone() for d, b in self.buffers.items()}

    def unchanged(self, before: dict[torch.dtype, Tensor]) -> bool:
        """Whether nothing has been written since."""
        return all(torch.equal(_bits(b), before[d]) for d, b in self.buffers.items())

    def tensors(self) -> list[Tensor]:
        """A view for each slot."""
        b = self.buffers
        return [b[s.dtype].as_strided(s.shape, s.strides, s.offset) for s in self.case.slots]


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(t: Tensor) -> Tensor:
    return t.view(_INTEGERS[t.element_size()])


def _spoil(case: Case, wide: dict[torch.dtype, Tensor]) -> None:
    """Put NaN or Inf into one to three places of one or two tensors, mostly activations."""
    r = random.Random(case.values)
    slots = [s for s in case.slots if s.extent]
    if not slots:
        return
    for _ in range(r.randint(1, 2)):
        s = slots[0] if r.random() < 0.5 else r.choice(slots)
        for _ in range(r.randint(1, 3)):
            value = r.choice((math.nan, math.inf, -math.inf))
            wide[s.dtype][s.offset + r.randrange(s.extent)] = value


def resolve(value: Any, tensors: Sequence[Tensor]) -> Any:
    """The arguments with every ``Ref`` replaced."""
    if isinstance(value, Ref):
        return tensors[value.index]
    if isinstance(value, dict):
        return {k: resolve(v, tensors) for k, v in value.items()}
    if isinstance(value, list):
        return [resolve(v, tensors) for v in value]
    return value
