"""The optimizer's step on the timeline of a profile: its states, and what a step allocates.

States are counted from the beginning of the step, as every step but the first finds them. What
torch's optimizers allocate beside them follows from how they are written (torch/optim/adam.py and
sgd.py of torch 2.13), is independent of values, and is checked against the allocator by tests:

==================  ===========================  ==================================================
optimizer           states, per parameter        at most at once, beside states and gradients
==================  ===========================  ==================================================
Adam, AdamW         2 in its dtype, 3: amsgrad
  foreach                                        a root of every parameter of one dtype (and of the
                                                 dtype before: its roots are let go afterwards)
  loop                                           a root and a quotient of one parameter, and the
                                                 quotient of the one before
  fused               and 4 bytes, its step      nothing
SGD                 1 with momentum
  foreach                                        a copy of the gradients with weight_decay
  loop                                           a copy of one gradient with weight_decay, one more
                                                 with nesterov
  fused                                          nothing
Adam, AdamW, 8 bit  2 bytes per number, and 8    nothing
                    per block of 256 of them
==================  ===========================  ==================================================

L2 weight decay (Adam's, not AdamW's) and `maximize` copy gradients in the first two forms. The
8-bit states are those of bitsandbytes since 0.45 (Optimizer2State.init_state in
bitsandbytes/optim/optimizer.py): uint8 numbers, a float32 maximum for each block of each state, two
maps of 256 float32 that all parameters share, and float32 states where a parameter has fewer than
`min_8bit_size` numbers.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from petal_kernels.memory.records import Block

if TYPE_CHECKING:
    from petal_kernels.memory.profile import Profile

PHASE = "optimizer"
STATES = "optimizer states"
_BLOCK = 256  # numbers that share a maximum in an 8-bit state
_MAPS = 2 * 256 * 4  # bytes: what each of 256 codes stands for, signed and unsigned
_LASTING = ("parameters", "buffers", "batch", "gradients", "outputs", "elsewhere")
_ADAM = ("foreach", "fused", "amsgrad", "maximize", "capturable", "weight_decay")
_SGD = ("foreach", "fused", "maximize", "momentum", "nesterov", "weight_decay")
TAKES: dict[str, tuple[str, ...]] = {
    "adamw": _ADAM,
    "adam": _ADAM,
    "sgd": _SGD,
    "adamw8bit": ("min_8bit_size",),
    "adam8bit": ("min_8bit_size",),
}
_TITLES = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD"}


@dataclass(frozen=True)
class Trained:
    """A trained parameter as an optimizer sees it; `numbers` are those of a dense copy."""

    name: str
    numbers: int
    dtype: torch.dtype
    device: str
    has_gradient: bool
    # Weak: a parameter that is gone leaves its identity to another.
    itself: weakref.ref[torch.Tensor] | None = field(default=None, repr=False, compare=False)

    @property
    def bytes(self) -> int:
        return self.numbers * self.dtype.itemsize


@dataclass(frozen=True)
class Settings:
    """What of an optimizer's settings decides about memory."""

    kind: str
    foreach: bool | None = None
    fused: bool | None = None
    amsgrad: bool = False
    maximize: bool = False
    capturable: bool = False
    nesterov: bool = False
    momentum: float = 0.0
    weight_decay: float = 0.0
    min_8bit_size: int = 4096

    def __post_init__(self) -> None:
        for name in ("foreach", "fused", "amsgrad", "maximize", "capturable", "nesterov"):
            value: Any = getattr(self, name)
            open_too = name in ("foreach", "fused")
            if not (isinstance(value, bool) or (open_too and value is None)):
                wanted = "True, False or None" if open_too else "True or False"
                raise TypeError(f"{name}: want {wanted}, got {value!r}")
        for name in ("momentum", "weight_decay", "min_8bit_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}: want a number >= 0, got {value!r}")
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: want a number >= 0, got {value!r}")
        if self.foreach and self.fused:
            raise ValueError("foreach and fused: want one of them, got both")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: want momentum with it, got momentum=0")

    @property
    def form(self) -> str:
        """Which of torch's ways to write the step: without a choice, the one it takes on CUDA."""
        if self.fused:
            return "fused"
        return "loop" if self.foreach is False else "foreach"

    @property
    def copies_gradients(self) -> bool:
        """Whether the gradient is changed before it is used, in a copy."""
        return self.maximize or (self.weight_decay > 0 and self.kind != "adamw")

    def __str__(self) -> str:
        if self.kind.endswith("8bit"):
            return f"{_TITLES[self.kind.removesuffix('8bit')]} in 8 bits (bitsandbytes)"
        momentum = " with momentum" if self.momentum else ""
        amsgrad = ", amsgrad" if self.amsgrad else ""
        return f"{_TITLES[self.kind]}{momentum} ({self.form}{amsgrad})"

    def quantised(self, p: Trained) -> bool:
        """Whether the states of a parameter are 8-bit numbers."""
        return self.kind.endswith("8bit") and p.numbers >= max(4096, self.min_8bit_size)

    def state_bytes(self, p: Trained) -> int:
        """What is kept from step to step for one parameter, maps that all share left out."""
        if self.kind == "sgd":
            return p.bytes if self.momentum else 0
        if self.quantised(p):
            return 2 * (p.numbers + 4 * -(-p.numbers // _BLOCK))
        if self.kind.endswith("8bit"):
            return 2 * 4 * p.numbers
        # The number of steps is a tensor of the CPU's otherwise.
        step = 4 if self.fused or self.capturable else 0
        return (3 if self.amsgrad else 2) * p.bytes + step


Groups = list[tuple[Settings, list[Trained]]]


def settings_of(name: str, **settings: Any) -> Settings:
    """The settings of an optimizer by its name (a key of `TAKES`), torch's defaults elsewhere.

    Raises ValueError for a name that is not known, TypeError for a setting that it does not take.
    """
    if name not in TAKES:
        raise ValueError(f"optimizer: want one of {', '.join(TAKES)}, got {name!r}")
    for setting in settings:
        if setting not in TAKES[name]:
            takes = ", ".join(TAKES[name])
            raise TypeError(f"{setting}: want settings of {name} ({takes}), got '{setting}'")
    return Settings(name, **settings)


def read(optimizer: Any, trained: Sequence[Trained], fake: bool, **settings: Any) -> Groups:
    """Settings and parameters, by parameter group, of a name or of an instance."""
    moved = [p for p in trained if p.has_gradient]
    if isinstance(optimizer, Settings):
        return [(dataclasses.replace(optimizer, **settings), moved)]
    if isinstance(optimizer, str):
        return [(settings_of(optimizer, **settings), moved)]
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer: want a name ({', '.join(TAKES)}) or an instance of torch.optim.AdamW, "
            f"Adam, SGD or bitsandbytes' AdamW8bit or Adam8bit, got {optimizer!r}"
        )
    if settings:
        raise TypeError(f"{next(iter(settings))}: an instance has its own settings, got it again")
    kind = _kind(optimizer)
    alive = [(None if p.itself is None else p.itself(), p) for p in trained]
    known = {id(t): p for t, p in alive if t is not None}
    groups: Groups = []
    for group in optimizer.param_groups:
        missing = [t for t in group["params"] if id(t) not in known and t.requires_grad]
        if missing:
            raise ValueError(
                "optimizer: want one of parameters of the profiled model, got one with "
                f"{len(missing)} others, the first of shape {list(missing[0].shape)}"
            )
        own = [known[id(t)] for t in group["params"] if id(t) in known]
        groups.append(
            (_of_group(optimizer, kind, group, own, fake), [p for p in own if p.has_gradient])
        )
    return groups


def _kind(optimizer: torch.optim.Optimizer) -> str:
    """The key of `TAKES` that an instance belongs to; a class of somebody's own may keep more."""
    cls = type(optimizer)
    if cls.__module__.startswith("torch.optim.") and cls.__name__ in ("Adam", "AdamW", "SGD"):
        return cls.__name__.lower()
    name = cls.__name__.lower()
    if cls.__module__.startswith("bitsandbytes.") and name in TAKES and name.endswith("8bit"):
        if getattr(optimizer, "is_paged", False):
            raise ValueError("optimizer: want states on the device, got a paged optimizer")
        return name
    raise ValueError(
        "optimizer: want torch.optim.AdamW, Adam or SGD, or bitsandbytes' AdamW8bit or Adam8bit, "
        f"got a {cls.__module__}.{cls.__qualname__}"
    )


def _of_group(
    optimizer: Any, kind: str, group: dict[str, Any], own: Sequence[Trained], fake: bool
) -> Settings:
    if kind.endswith("8bit"):
        least = getattr(getattr(optimizer, "args", None), "min_8bit_size", 4096)
        return Settings(kind, min_8bit_size=least)
    if group.get("differentiable"):
        raise ValueError("optimizer: want differentiable=False, got True: it keeps every step")
    if kind != "sgd":  # Adam takes AdamW's way to decay weights as a setting
        kind = "adamw" if group.get("decoupled_weight_decay", kind == "adamw") else "adam"
    given = {name: group[name] for name in TAKES[kind] if name in group}
    given["weight_decay"] = float(given["weight_decay"])
    if given["foreach"] is None and not given["fused"] and not fake:
        # torch's own choice, by device. Fake tensors stand for a GPU's.
        given["foreach"] = all(p.device == "cuda" for p in own)
    return Settings(kind, **given)


class _Tape:
    """Operations of a step: what each brings to life, and the live bytes after it."""

    def __init__(self, now: int, begin: int) -> None:
        self.live = [now]
        self.blocks: list[Block] = []
        self._now, self._begin = now, begin

    def take(self, size: int, operation: str, place: str, dtype: torch.dtype) -> Block:
        """A block of an operation's result."""
        born = self._begin + len(self.live)
        block = Block(size, born, f"aten.{operation}", place, dtype=dtype)
        self.blocks.append(block)
        self._now += size
        self.live.append(self._now)
        return block

    def drop(self, *blocks: Block | None) -> None:
        """Blocks that the next operation no longer finds."""
        for block in blocks:
            if block is not None:
                block.died = self._begin + len(self.live)
                self._now -= block.bytes

    def end(self) -> None:
        """After the last operation."""
        self.live.append(self._now)


def _by_dtype(parameters: Iterable[Trained]) -> list[list[Trained]]:
    groups: dict[tuple[str, torch.dtype], list[Trained]] = {}
    for p in parameters:
        groups.setdefault((p.device, p.dtype), []).append(p)
    return list(groups.values())


def _adam_foreach(how: Settings, parameters: Sequence[Trained], tape: _Tape) -> None:
    roots: Block | None = None
    for group in _by_dtype(parameters):
        size, dtype = sum(p.bytes for p in group), group[0].dtype
        if how.copies_gradients:  # in place, where both reasons hold
            tape.drop(tape.take(size, "_foreach_add", "", dtype))
        before, roots = roots, tape.take(size, "_foreach_sqrt", "", dtype)
        tape.drop(before)
    tape.drop(roots)


def _changed_gradient(how: Settings, p: Trained, old: Block | None, tape: _Tape) -> Block | None:
    """The loop's copy of one gradient; `old` is the name's former value, let go when it is bound
    anew.
    """
    copy = None
    if how.maximize:
        copy = tape.take(p.bytes, "neg", p.name, p.dtype)
    tape.drop(old)
    if how.weight_decay > 0 and how.kind != "adamw":
        negated, copy = copy, tape.take(p.bytes, "add", p.name, p.dtype)
        tape.drop(negated)
    return copy


def _adam_loop(how: Settings, parameters: Sequence[Trained], tape: _Tape) -> None:
    gradient: Block | None = None
    quotient: Block | None = None
    for p in parameters:
        gradient = _changed_gradient(how, p, gradient, tape)
        root = tape.take(p.bytes, "sqrt", p.name, p.dtype)
        before, quotient = quotient, tape.take(p.bytes, "div", p.name, p.dtype)
        tape.drop(root, before)
    tape.drop(gradient, quotient)


def _sgd_foreach(how: Settings, parameters: Sequence[Trained], tape: _Tape) -> None:
    for group in _by_dtype(parameters):
        if how.copies_gradients:
            size = sum(p.bytes for p in group)
            tape.drop(tape.take(size, "_foreach_add", "", group[0].dtype))


def _sgd_loop(how: Settings, parameters: Sequence[Trained], tape: _Tape) -> None:
    gradient: Block | None = None
    for p in parameters:
        gradient = _changed_gradient(how, p, gradient, tape)
        if how.nesterov:
            before, gradient = gradient, tape.take(p.bytes, "add", p.name, p.dtype)
            tape.drop(before)
        elif how.momentum:  # the gradient's name is the momentum's from here
            tape.drop(gradient)
            gradient = None
    tape.drop(gradient)


_STEPS = {
    ("adam", "foreach"): _adam_foreach,
    ("adam", "loop"): _adam_loop,
    ("sgd", "foreach"): _sgd_foreach,
    ("sgd", "loop"): _sgd_loop,
}


def with_step(profile: Profile, optimizer: Any, **settings: Any) -> Profile:
    """A profile that goes on with the step of an optimizer, whose states are there throughout."""
    groups = read(optimizer, profile.parameters, profile.fake, **settings)
    if not profile.backward:
        raise ValueError("with_optimizer: want a profile with its backward, got backward=False")
    first = len(profile.live)
    states = [
        Block(size, 0, "", p.name, dtype=p.dtype, category=STATES)
        for how, parameters in groups
        for p in parameters
        if (size := how.state_bytes(p))
    ]
    if any(how.quantised(p) for how, parameters in groups for p in parameters):
        states.append(Block(_MAPS, 0, "", "", category=STATES))
    kept = sum(block.bytes for block in states)
    blocks = [_until_the_end(block, first) for block in profile.blocks]
    base = kept + sum(block.bytes for block in blocks if block.died is None)
    tape = _Tape(base, first)
    for how, parameters in groups:
        run = _STEPS.get(("sgd" if how.kind == "sgd" else "adam", how.form))
        if run is not None and not how.kind.endswith("8bit"):
            run(how, parameters, tape)
    tape.end()
    live = [size + kept for size in profile.live] + tape.live
    phases = {**profile.phases, PHASE: first}
    peak = max(range(len(live)), key=live.__getitem__)
    return dataclasses.replace(
        profile,
        sizes=dataclasses.replace(profile.sizes, states=kept),
        live=live,
        phases=phases,
        peak_step=peak,
        peak_phase=max((begin, name) for name, begin in phases.items() if begin <= peak)[1],
        blocks=[*blocks, *states, *tape.blocks],
        optimizer=" and ".join(dict.fromkeys(str(how) for how, _ in groups)),
        before_optimizer=profile,
    )


def _until_the_end(block: Block, end: int) -> Block:
    """A block as the optimizer finds it: what outlives the backward lives on, and the rest of what
    the last operation left does not.
    """
    if not block.lives_at(end - 1):
        return block
    return dataclasses.replace(block, died=None if block.category in _LASTING else end)
