"""One case on some backends, with every check.

Each backend: shapes and dtypes; the error rule; NaN and Inf (``judge.py``); every gradient with
storage of its own, none of it an input's, an output's or the upstream gradient's; no input written.
On a share of the cases: the same call twice gives the same bits; with two threads in place of one
the same bits on the native backend, within the rule where the library multiplies; a second
derivative and forward mode are refused by name.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import petal_kernels as pk
from tests import fuzz
from tests.fuzz import formulas
from tests.fuzz.case import Arena, Case, Draw, resolve
from tests.fuzz.judge import NEIGHBOURS, Judge, Results, flatten
from tests.ops import folders

# In a draw_*.py, the function that has an operator's name.
_DRAWERS = [
    importlib.import_module(f"tests.fuzz.{m.name}")
    for m in pkgutil.iter_modules(fuzz.__path__)
    if m.name.startswith("draw_")
]
GENERATORS: dict[str, Callable[[Draw], Case]] = {
    name: getattr(drawer, name)
    for name in folders.names()
    for drawer in _DRAWERS
    if hasattr(drawer, name)
}
OPERATORS = tuple(GENERATORS)

Got = tuple[list[Tensor], list[Tensor]]


def draw(operator: str, seed: int, index: int, profile: str = "cpu") -> Case:
    """The case of an operator under a seed and an index."""
    return GENERATORS[operator](Draw(operator, seed, index, profile))


@dataclass
class Outcome:
    """What came of one case: the backends that ran, those that declined, what is wrong."""

    ran: list[str] = field(default_factory=list)
    declined: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    second_look: bool = False
    no_headroom: bool = False


_aten = torch.ops.aten
_EXPONENTIALS = (_aten.sigmoid.default, _aten._softmax.default)


class _Headroom(TorchDispatchMode):
    """Whether any operation gave a number that is not finite, or fp16 numbers of which half are
    within a factor of 16 of the subnormal ones; or took an exponent that one rounding step of its
    own turns into another gate, or the norm of a row whose sum may overflow."""

    missing = False
    dtype = torch.float32  # of the activations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (*_EXPONENTIALS, _aten.native_layer_norm.default) and args[0].numel():
            x, top = args[0], float(args[0].detach().abs().max())
            if func in _EXPONENTIALS:
                self.missing |= top * torch.finfo(self.dtype).eps > 0.25
            else:
                self.missing |= top * x.shape[-1] > torch.finfo(x.dtype).max
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and t.is_floating_point() and not self.missing:
                self.missing = not bool(torch.isfinite(t.detach()).all())
                if t.dtype == torch.float16 and (some := t.detach()[t.detach() != 0].abs()).numel():
                    self.missing |= float(some.float().median()) < 2.0**-10
        return out


def _is_regrouped(case: Case) -> bool:
    """Whether products are formed in another order than written: routes through several vision
    tokens by one matrix, gates that see the output by U^T w. Of infinite numbers of both signs the
    one order makes NaN where the other makes an infinity, and a sigmoid of that is finite."""
    a = case.arguments
    sees = a.get("variant") == "release" and a.get("gate") in ("middleX", "middleY", "small")
    return case.operator == "gated_bottleneck" and (sees or "gram" in a.get("route", ""))


class Checker:
    """A case, its tensors, and what is right."""

    def __init__(self, case: Case, padded: bool = False) -> None:
        """``padded``: an infinite number may make its row NaN where plain torch saturates, since
        tiles are padded to a power of two."""
        self.case, self.padded = case, padded
        self.arena = Arena.of(case)
        self.tensors = self.arena.tensors()
        self.leaves = [self.tensors[i].requires_grad_() for i in case.trained]
        self.arguments = resolve(case.arguments, self.tensors)
        self.upstream = [None if i is None else self.tensors[i] for i in case.upstream]
        self.before = self.arena.snapshot()
        self.outcome = Outcome()
        self._widened = False
        rng = self.arguments.get("rng")
        if case.generator_seed is not None:
            torch.manual_seed(case.generator_seed)
            rng = torch.randint(0, 1 << 62, (2,))
        self.rng = None if rng is None else tuple(rng.tolist())
        exact = self._formula(self.arena.double(), exact=True)
        plain = self._formula(self.arena, loose=True)
        names = [case.slots[i].name for i in case.trained]
        outs, grads = exact
        labels = [f"output {i}" for i in range(len(outs))] + [f"gradient of {n}" for n in names]
        dtypes = [t.dtype for t in (*plain[0], *plain[1])]
        self.layout = Results(labels, [t.shape for t in (*outs, *grads)], dtypes, len(outs))
        flat = flatten([*outs, *grads])
        other = None
        if case.spoiled or not np.isfinite(flat).all():
            readings = (
                self._formula(self.arena.double(), exact=True, loose=True),
                self._formula(self.arena),
            )
            first, second = (flatten([*r[0], *r[1]]) for r in readings)
            other = first, second
        own = flatten([*plain[0], *plain[1]])
        constant = any(0 in slot.strides for slot in case.slots)
        self.judge = Judge(self.layout, flat, own, other, case.spoiled, constant)

    def _formula(
        self,
        arena: Arena,
        exact: bool = False,
        loose: bool = False,
        written: bool = False,
        unscaled: bool = False,
    ) -> Got:
        c = self.case
        tensors = self.tensors if arena is self.arena else arena.tensors()
        leaves = self.leaves
        if arena is not self.arena:
            leaves = [tensors[i].requires_grad_() for i in c.trained]
        arguments = resolve(c.arguments, tensors) | {"rng": self.rng}
        if exact:
            arguments.pop("dtype", None)  # of the result: it stays fp64
        if written:
            arguments["written_norm"] = True
        for name in ("scale", "keep", "mix") if unscaled else ():
            if isinstance(given := arguments.get(name), list):
                arguments[name] = [max(1.0, abs(each)) for each in given]
            elif given is not None:
                arguments[name] = max(1.0, abs(given))
        upstream = [None if i is None else tensors[i] for i in c.upstream]
        return formulas.evaluate(c.operator, arguments, leaves, upstream, loose)

    # --- one call ---

    def _public(self, backend: str, create_graph: bool = False) -> Got:
        c = self.case
        given = dict(self.arguments)
        if backend != "auto":
            given["backend"] = backend
        if backend in c.plans:
            given["plan"] = c.plans[backend]
        if c.generator_seed is not None:
            torch.manual_seed(c.generator_seed)
        if "update_at" in given:
            given["base"] = given["base"].clone()
        found = getattr(pk, c.operator)(**given)
        if given.get("return_routing"):
            out, routing = found
            outs = [out] if routing.logits is None else [out, routing.logits]
            if routing.chosen is not None:
                wide = torch.float64 if c.dtype == torch.float64 else torch.float32
                outs.append(routing.chosen.to(wide))
        else:
            outs = [found] if isinstance(found, Tensor) else list(found)
        pairs = [
            (o, u)
            for o, u in zip(outs, self.upstream, strict=False)
            if u is not None and o.requires_grad
        ]
        if not pairs or not self.leaves:
            return outs, [torch.zeros_like(t) for t in self.leaves]
        grads = torch.autograd.grad(
            [o for o, _ in pairs],
            self.leaves,
            [u for _, u in pairs],
            allow_unused=True,
            create_graph=create_graph,
        )
        return outs, [
            torch.zeros_like(t) if g is None else g for t, g in zip(self.leaves, grads, strict=True)
        ]

    def run(self, backends: Sequence[str], threads: Callable[[int], None]) -> Outcome:
        """Check the case on each backend; ``threads(n)`` sets how many a call may use."""
        for backend in backends:
            try:
                got = self._public(backend)
            except RuntimeError as e:
                if "cannot run here" in str(e):
                    self.outcome.declined[backend] = str(e)
                    continue
                self._fault(backend, f"raised {type(e).__name__}: {str(e)[:300]}")
                continue
            except Exception as e:
                self._fault(backend, f"raised {type(e).__name__}: {str(e)[:300]}")
                continue
            self.outcome.ran.append(backend)
            self._shapes(backend, got)
            self._rule(backend, got)
            self._storages(backend, got)
            if self.case.repeat:
                again = self._public(backend)
                self._same_bits(backend, got, again, "the same call twice")
            if self.case.threads:
                self._threads(backend, got, threads)
            if self.case.twice and self.leaves:
                self._higher(backend)
            if not self.arena.unchanged(self.before):
                self._fault(backend, "an input, or memory between inputs, was written")
                self.arena = Arena.of(self.case)
                break
        return self.outcome

    # --- checks ---

    def _fault(self, backend: str, text: str) -> None:
        self.outcome.faults.append(f"{backend}: {text}")

    def _shapes(self, backend: str, got: Got) -> None:
        results, r = [*got[0], *got[1]], self.layout
        if len(results) != len(r.labels):
            self._fault(backend, f"{len(results)} results, want {len(r.labels)}")
            return
        for label, t, shape, dtype in zip(r.labels, results, r.shapes, r.dtypes, strict=True):
            if t.shape != shape or t.dtype != dtype:
                found = f"{list(t.shape)} {t.dtype}"
                self._fault(backend, f"{label}: {found}, want {list(shape)} {dtype}")

    def _rule(self, backend: str, got: Got, what: str = "") -> None:
        flat = flatten([*got[0], *got[1]])
        if flat.shape != self.judge.exact.shape:
            return
        faults = self.judge.faults(flat)
        if faults and not self._widened:
            self._widened = self.outcome.second_look = True
            self.outcome.no_headroom = not self.case.spoiled and self._is_cramped()
            if self.case.spoiled and (self.padded or _is_regrouped(self.case)):
                double = self.arena.double()
                one = self._formula(double.with_infinities_as(1.0), exact=True)
                nan = self._formula(double.with_infinities_as(math.nan), exact=True, loose=True)
                self.judge.only_what_stays(*(flatten([*r[0], *r[1]]) for r in (one, nan)))
            large = self._formula(self.arena.larger(), loose=True)
            self.judge.look_again(flatten([*large[0], *large[1]]))
            if self.case.arguments.get("norm_weight") is not None:
                own = self._formula(self.arena, loose=True, written=True)
                self.judge.widen(flatten([*own[0], *own[1]]))
            for n in range(NEIGHBOURS):
                near = self._formula(self.arena.near(self.case.values + n), loose=True)
                self.judge.widen(flatten([*near[0], *near[1]]))
            faults = self.judge.faults(flat)
        for fault in [] if self.outcome.no_headroom else faults:
            self._fault(backend, what + fault)

    def _is_cramped(self) -> bool:
        """Whether plain torch, its scales being one at least, overflows on the way, or comes close
        to fp16's subnormal numbers."""
        watch = _Headroom()
        watch.dtype = self.case.dtype
        with watch:
            self._formula(self.arena, loose=True, unscaled=True)
        return watch.missing

    def _storages(self, backend: str, got: Got) -> None:
        """Every gradient can be added into without changing anything else."""
        owners = {b.untyped_storage().data_ptr(): "an input" for b in self.arena.buffers.values()}
        for i, out in enumerate(got[0]):
            owners[out.untyped_storage().data_ptr()] = f"output {i}"
        places = {u.data_ptr(): "the upstream gradient" for u in self.upstream if u is not None}
        for label, g in zip(self.layout.labels[len(got[0]) :], got[1], strict=False):
            if g.numel() == 0:
                continue
            where = g.untyped_storage().data_ptr()
            if where in owners:
                whose = places.get(g.data_ptr(), owners[where])
                self._fault(backend, f"{label} shares storage with {whose}")
            owners[where] = label

    def _same_bits(self, backend: str, one: Got, two: Got, what: str) -> bool:
        same = True
        pairs = zip(self.layout.labels, (*one[0], *one[1]), (*two[0], *two[1]), strict=False)
        for label, a, b in pairs:
            same = torch.equal(a, b) or (
                torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
            )
            if not same:
                self._fault(backend, f"{label}: {what} gave other bits")
                break
        return same

    def _threads(self, backend: str, got: Got, threads: Callable[[int], None]) -> None:
        threads(2)
        try:
            wide = self._public(backend)
        finally:
            threads(1)
        given = self.case.arguments
        pooled = given.get("router_input") == "pooled"  # the mean over a sample's tokens
        library = backend != "native" or given.get("weights") is not None or pooled
        if library:
            self._rule(backend, wide, "with two threads: ")
        else:
            self._same_bits(backend, got, wide, "two threads in place of one")

    def _higher(self, backend: str) -> None:
        """Second derivatives and forward mode are not offered: each must be refused by name."""
        if any(u is not None for u in self.upstream):
            found: list[Tensor] = []
            with self._refused(backend, "a second derivative", lambda: not any(map(_some, found))):
                found = self._public(backend, create_graph=True)[1]
                grads = [g for g in found if g.requires_grad]
                torch.autograd.grad(grads, self.leaves, grads, allow_unused=True)
        with self._refused(backend, "forward mode"), forward_ad.dual_level():
            place = self.case.trained[0]
            tensors = [t.detach() for t in self.tensors]
            one = tensors[place].clone(memory_format=torch.contiguous_format)
            tensors[place] = forward_ad.make_dual(one, torch.ones_like(one))
            given = resolve(self.case.arguments, tensors) | {"backend": backend}
            given.pop("update_at", None)
            getattr(pk, self.case.operator)(**given)

    @contextlib.contextmanager
    def _refused(
        self, backend: str, what: str, right: Callable[[], bool] = lambda: False
    ) -> Iterator[None]:
        """``right``: whether the block, where it ends without an error, gave the right thing."""
        try:
            yield
        except RuntimeError as e:
            if "once_differentiable" not in str(e):
                self._fault(backend, f"{what} raised {type(e).__name__}: {str(e)[:200]}")
        else:
            if not right():
                self._fault(backend, f"{what} was neither right nor refused")


def _some(gradient: Tensor) -> bool:
    """Whether there is anything but zeros, whose derivatives are zero."""
    return bool(gradient.detach().any())


def check(
    operator: str,
    seed: int,
    index: int,
    backends: Sequence[str] = ("torch", "native"),
    profile: str = "cpu",
    threads: Callable[[int], None] = torch.set_num_threads,
) -> Outcome:
    """Draw one case and check it on these backends."""
    case = draw(operator, seed, index, profile)
    return Checker(case, padded=profile != "cpu").run(backends, threads)
