"""The rule of ``petal_kernels/tools/parity.py`` over all results of a call at once.

* Finite results: RMS and largest error against the fp64 formula at most 2x (outputs) or 3x
  (gradients) plain torch's in the same dtype, plus parity's floors. fp64 is held to 2^-36 of the
  largest value. A subnormal number of fp32 or bf16 may count as 0, as libraries take it; one of
  fp16 is held to its step. What is below 2^-100 of the call's largest result counts as 0 too.
* Second look, where a call fails that. Plain torch's error is then the largest, once and a half,
  over neighbours of the case, whose every number is moved by at most one rounding step of the
  activations' dtype, against the same fp64 results, and over the norm written out step by step. A
  case in which plain torch rounds well by luck, in which terms cancel, or in which relu's sign or
  the choice of an expert hangs on the last bit, shows there how far rounding alone moves it.
  Another order of a long fp32 sum (library products add to what they start from, one term after the
  other) may cost 8 rounding steps RMS, 16 at most, four times that where a tensor is expanded
  (equal terms are all rounded the same way), and numbers of fp16 four of its smallest steps. What
  has no headroom, where plain torch overflows once every number of the case is four times as large,
  need not be finite; and where plain torch, its scales being one at least, overflows on the way,
  comes near fp16's subnormal numbers or takes the exponential of a number so large that its last
  bit decides, the case shows nothing and is counted as one without headroom. A wrong index, sign,
  scale or mask does not hide so.
* NaN and Inf: where the fp64 formula is not finite however masked products are read (by selection,
  or times zero: ``formulas.py``) and plain torch is not finite by selection, neither is the result;
  of a case with such inputs, for an overflow is the dtype's own. Where the formula is finite in
  both readings and at most half the dtype's largest number, and plain torch is finite in the dtype,
  so is the result. The error rule holds for what is finite in all. Where an operator groups
  products otherwise than written (``check.py``), the second look leaves out what an infinite input
  reaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from petal_kernels.tools.parity import GRADIENT_FACTOR, OUTPUT_FACTOR

NEIGHBOURS = 24

_Flat = npt.NDArray[np.float64]


def flatten(results: Sequence[Tensor]) -> _Flat:
    """Every number of every result, in fp64."""
    if not results:
        return np.zeros(0)
    parts = [t.detach().reshape(-1) for t in results]
    return torch.cat([p if p.dtype == torch.float64 else p.double() for p in parts]).numpy()


@dataclass
class Results:
    """The layout of a call's results in one flat array: outputs, then gradients."""

    labels: list[str]
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]
    outputs: int

    def __post_init__(self) -> None:
        sizes = np.array([s.numel() for s in self.shapes], dtype=np.int64)
        ends = np.cumsum(sizes)
        used = sizes > 0
        self.used = np.nonzero(used)[0]
        self.starts = (ends - sizes)[used]
        self.sizes = sizes[used].astype(np.float64)
        info = [torch.finfo(self.dtypes[i]) for i in self.used]
        eps = np.array([i.eps for i in info])
        self.double = double = np.array(
            [self.dtypes[i] == torch.float64 for i in self.used], dtype=bool
        )
        self.single = np.array([self.dtypes[i] == torch.float32 for i in self.used], dtype=bool)
        self.factor = np.where(self.used < self.outputs, OUTPUT_FACTOR, GRADIENT_FACTOR)
        few = self.sizes < 16
        self.rms_floor = np.where(double, 2.0**-36, np.where(few, 2 * eps, eps / 4))
        self.max_floor = np.where(double, 2.0**-36, 2 * eps)
        self.half = half = np.array(
            [self.dtypes[i] == torch.float16 for i in self.used], dtype=bool
        )
        normal = np.array([i.smallest_normal for i in info])
        self.step = np.where(half, normal * eps, normal)
        self.largest = np.array([i.max for i in info]) / 2
        self.spread = np.repeat(np.arange(len(self.used)), sizes[used])

    def measure(self, d: _Flat) -> tuple[_Flat, _Flat]:
        """RMS and largest of each result."""
        if not len(self.starts):
            return np.zeros(0), np.zeros(0)
        top = np.maximum.reduceat(d, self.starts)
        # Scaled, so that the square of a huge or a tiny number is one too.
        unit = np.where(top > 0, top, 1.0)
        square = np.add.reduceat((d / unit[self.spread]) ** 2, self.starts)
        return np.sqrt(square / self.sizes) * unit, top


class Judge:
    """What is known of a case before a backend runs it."""

    def __init__(
        self,
        layout: Results,
        exact: _Flat,
        plain: _Flat,
        other: tuple[_Flat, _Flat] | None = None,
        spoiled: bool = True,
        constant: bool = False,
    ) -> None:
        """``other``: where anything is not finite, the fp64 formula with masked products times
        zero, and plain torch with masked products selected. ``constant``: sums have equal terms."""
        self.constant = constant
        self.layout, self.exact, self.plain = layout, exact, plain
        fine = np.isfinite(exact)
        self.clean = other is None and bool(fine.all()) and bool(np.isfinite(plain).all())
        r = layout
        if self.clean and len(r.starts):
            self.clean = bool((np.abs(exact) <= r.largest[r.spread]).all())
        if self.clean:
            self.counted = None
            self.reference = exact
        else:
            both, self.hidden = fine, ~fine
            if other is not None:
                both, self.hidden = fine & np.isfinite(other[0]), ~fine
                for reading in other:
                    self.hidden = self.hidden & ~np.isfinite(reading)
            self.hidden &= spoiled
            with np.errstate(invalid="ignore"):
                fits = np.abs(exact) <= r.largest[r.spread] if len(r.starts) else both
            self.counted = both & fits & np.isfinite(plain)
            self.reference = np.where(self.counted, exact, 0.0)
        self.rms, self.top = r.measure(np.abs(self.reference))
        self.nothing: float | _Flat = 2.0**-100 * float(self.top.max(initial=0.0))
        self.plain_rms, self.plain_top = self._errors(plain)

    def _errors(self, got: _Flat) -> tuple[_Flat, _Flat]:
        if self.counted is None:
            return self.layout.measure(np.abs(got - self.exact))
        with np.errstate(invalid="ignore"):
            d = np.where(self.counted, np.abs(got - self.reference), 0.0)
        return self.layout.measure(d)

    def look_again(self, plain: _Flat) -> None:
        """Begin the second look, with plain torch's results of the case with larger numbers: what
        overflows there is not counted."""
        if self.counted is None:
            self.counted = np.ones(self.exact.shape, dtype=bool)
            self.hidden = np.zeros(self.exact.shape, dtype=bool)
        self.counted &= np.isfinite(plain)
        self.reference = np.where(self.counted, self.exact, 0.0)
        self.rms, self.top = self.layout.measure(np.abs(self.reference))
        self.plain_rms, self.plain_top = self._errors(self.plain)
        r = self.layout
        chain = 4.0 if self.constant else 1.0
        r.rms_floor = np.where(r.single, chain * 2.0**-20, r.rms_floor)
        r.max_floor = np.where(r.single, chain * 2.0**-19, r.max_floor)
        r.factor = 1.5 * r.factor
        r.step = np.where(r.half, 4 * r.step, r.step)
        self.nothing = 2.0**-80 * float(self.top.max(initial=0.0))
        if r.dtypes[0] == torch.float64:  # float32 parameters' gradients too
            self.nothing = 2.0**-40 * float(self.top.max(initial=0.0))

    def only_what_stays(self, one: _Flat, nan: _Flat) -> None:
        """Count only what no infinite input reaches, and demand NaN where a NaN does: fp64 results
        with ones and with NaN in place of the infinities, masked products times zero in these."""
        if self.counted is None:
            self.counted = np.ones(self.exact.shape, dtype=bool)
            self.hidden = np.zeros(self.exact.shape, dtype=bool)
        self.counted &= nan == self.exact
        self.hidden = self.hidden & np.isnan(one)

    def widen(self, plain: _Flat) -> None:
        """Take a neighbour's plain result into account; one that is not finite moves nothing."""
        finite = np.where(np.isfinite(plain), plain, self.reference)
        rms, top = self._errors(finite)
        self.plain_rms = np.maximum(self.plain_rms, rms)
        self.plain_top = np.maximum(self.plain_top, top)

    def faults(self, got: _Flat) -> list[str]:
        """What is wrong with a result, in words; empty: nothing."""
        r, found = self.layout, []
        finite = np.isfinite(got)
        if self.counted is None:
            if not finite.all():
                found += self._where(~finite, "is NaN or Inf, which the formula is not")
                return found
        else:
            if (bad := self.counted & ~finite).any():
                found += self._where(bad, "is NaN or Inf, which neither formula nor plain torch is")
                return found
            if (bad := self.hidden & finite).any():
                found += self._where(bad, "is finite where the formula is NaN or Inf")
                return found
        rms, top = self._errors(got)
        rules = (
            ("rms", rms, self.plain_rms, self.rms, r.rms_floor),
            ("max", top, self.plain_top, self.top, r.max_floor),
        )
        for name, mine, theirs, scale, floor in rules:
            allowed = r.factor * theirs + floor * scale + r.step + self.nothing
            for i in np.nonzero(mine > allowed)[0]:
                unit = scale[i] or 1.0
                found.append(
                    f"{r.labels[r.used[i]]}: {name} error {mine[i] / unit:.3e} of "
                    f"{scale[i]:.3e}, plain torch {theirs[i] / unit:.3e}"
                )
        return found

    def _where(self, bad: npt.NDArray[np.bool_], what: str) -> list[str]:
        r, found = self.layout, []
        counts = np.add.reduceat(bad.astype(np.int64), r.starts)
        for i in np.nonzero(counts)[0]:
            first = int(np.nonzero(bad[r.starts[i] :])[0][0])
            place = np.unravel_index(first, r.shapes[r.used[i]])
            at = [int(p) for p in place]
            found.append(f"{r.labels[r.used[i]]}: {counts[i]} elements, first {at}, {what}")
        return found
