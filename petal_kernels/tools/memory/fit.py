"""Does a step fit a GPU: the largest batch, and what to change where it does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from petal_kernels.memory.optimizer import Settings, settings_of
from petal_kernels.tools.memory.budget import FSDP, ZERO2, Budget, sharded
from petal_kernels.tools.memory.gpus import Gpu
from petal_kernels.tools.memory.options import Options

Need = Callable[[Options, Settings], Budget]
MOST_SAMPLES = 4096
_STRAIGHT = 8  # guesses from a line; a need that is none is halved from there
GPUS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Change:
    """One choice made otherwise: fields of the options, or another optimizer, and what it costs in
    time. A change is asked where it changes something that the step heeds.
    """

    label: str
    cost: str
    fields: dict[str, Any] = field(default_factory=dict)
    optimizer: str = ""
    methods: tuple[str, ...] = ()
    full_cost: str = ""  # of a model that is trained whole

    def applies(self, options: Options, optimizer: Settings, heeded: Collection[str]) -> bool:
        """Whether it would change anything."""
        if self.methods and options.method not in self.methods:
            return False
        if self.optimizer:
            return optimizer.kind in ("adam", "adamw") and optimizer.kind != self.optimizer
        known = all(name == "method" or name in heeded for name in self.fields)
        return known and any(getattr(options, k) != v for k, v in self.fields.items())

    def cost_of(self, options: Options) -> str:
        """In words."""
        return self.full_cost if options.method == "full" and self.full_cost else self.cost


# In the order of their cost in time. With a frozen base a product has a forward and the gradient of
# its input: a forward that runs again is half as much once more; of a whole model a third.
CHANGES = (
    Change("SDPA attention", "none: faster", {"attention": "sdpa"}),
    Change(
        "fused layers (method lora)", "none: faster", {"method": "lora"}, methods=("peft-lora",)
    ),
    Change("frozen norms fused", "none: faster", {"frozen_norms": "fused"}, methods=("lora",)),
    Change("bfloat16 adapters", "none; they round", {"adapter_dtype": "bfloat16"}),
    Change("AdamW in 8 bits", "none to speak of; states round", optimizer="adamw8bit"),
    Change("norms folded", "each norm once more", {"frozen_norms": "folded"}, methods=("lora",)),
    Change("MLPs recomputed", "an MLP's gate and up once more", {"recompute_mlp": True}),
    Change(
        "gradient checkpointing",
        "each layer's forward once more: + 50 % of its products",
        {"checkpointing": True},
        full_cost="each layer's forward once more: + 33 % of its products",
    ),
    Change("base in nf4", "each weight decoded twice a step; it rounds", {"base": "nf4"}),
)


@dataclass(frozen=True)
class Tried:
    """A change, or several, and the need with them; `options` and `optimizer` make it again."""

    label: str
    cost: str
    budget: Budget
    fits: bool


@dataclass(frozen=True)
class Verdict:
    """Whether it fits, by how much, the largest batch (0: not one sample; None: the step has no
    batch to choose), and the changes tried.

    answer  the first in the order of cost that makes it fit, alone or with those before it
    """

    gpu: Gpu
    budget: Budget
    largest_batch: int | None
    changes: list[Tried]
    answer: Tried | None

    @property
    def fits(self) -> bool:
        """Whether the step fits as it is."""
        return self.budget.need <= self.gpu.total

    @property
    def spare(self) -> int:
        """Bytes that are left; less than none where it does not fit."""
        return self.gpu.total - self.budget.need


@dataclass
class Planner:
    """Asks for needs, each once, and says what it is at.

    need   the need of a step with these options and this optimizer
    say    shown while a run takes its seconds
    """

    need: Need
    gpu: Gpu
    optimizer: Settings
    heeded: Collection[str]
    say: Callable[[str], None] = lambda _: None
    _known: dict[tuple[Options, Settings], Budget] = field(default_factory=dict)

    def budget(self, options: Options, optimizer: Settings | None = None) -> Budget:
        """The need of a step, known or found."""
        key = (options, optimizer or self.optimizer)
        if key not in self._known:
            self._known[key] = self.need(*key)
        return self._known[key]

    def known(self, options: Options, budget: Budget) -> None:
        """A need that was found already."""
        self._known[options, self.optimizer] = budget

    def fits(self, budget: Budget) -> bool:
        """Whether the device has that much."""
        return budget.need <= self.gpu.total

    def verdict(self, options: Options) -> Verdict:
        """All of it. Where the step fits no change is tried."""
        whole = self.budget(options)
        largest = self.largest_batch(options) if "batch" in self.heeded else None
        if self.fits(whole):
            return Verdict(self.gpu, whole, largest, [], None)
        tried, answer = self.changes(options)
        return Verdict(self.gpu, whole, largest, tried, answer)

    def largest_batch(self, options: Options) -> int:
        """The most samples that fit: bisection between one that fits and one that does not, each
        next guess from the line through both."""
        low, high = 0, 0  # fits, does not
        guess = options.batch
        known: dict[int, int] = {}
        while high != low + 1 and low < MOST_SAMPLES:
            known[guess] = self.budget(dataclasses.replace(options, batch=guess)).need
            fits = known[guess] <= self.gpu.total
            self.say(f"batch {guess}: {known[guess] / 2**30:.1f} GiB, {'fits' if fits else 'no'}")
            low, high = (guess, high) if fits else (low, guess)
            guess = self._guess(known, low, high)
        return low

    def _guess(self, known: dict[int, int], low: int, high: int) -> int:
        """The next batch to ask, strictly between `low` and `high` where both are known."""
        if len(known) > _STRAIGHT and high:
            return (low + high) // 2
        at = sorted(known)[-2:]
        if len(at) == 1:
            return max(1, at[0] // 2) if not low else 2 * at[0]
        slope = max(1.0, (known[at[1]] - known[at[0]]) / (at[1] - at[0]))
        guess = at[0] + int((self.gpu.total - known[at[0]]) / slope)
        if low and not high:
            guess = max(guess, low + 1)
        elif guess <= low:
            guess = low + 1
        top = high - 1 if high else MOST_SAMPLES
        return min(max(guess, low + 1), top)

    def changes(self, options: Options) -> tuple[list[Tried], Tried | None]:
        """Every change alone, in the order of cost; and the first answer, several together where no
        single one is enough."""
        asked = [c for c in CHANGES if c.applies(options, self.optimizer, self.heeded)]
        tried = [self._try([c], options) for c in asked]
        tried += self._engines(self.budget(options), "")
        answer = next((t for t in tried if t.fits), None)
        if answer is not None:
            return tried, answer
        if not asked:
            return tried, None
        last = self._try(asked, options)  # where all together are too few, no part is enough
        for end in range(2, len(asked) + 1 if last.fits else 0):
            several = self._try(asked[:end], options)
            if several.fits:
                return tried, several
        engines = self._engines(last.budget, f"{last.label}, ")
        return tried, next((t for t in engines if t.fits), None)

    def _try(self, several: list[Change], options: Options) -> Tried:
        changed, optimizer = options, self.optimizer
        for each in several:
            if each.applies(changed, optimizer, self.heeded):
                changed = dataclasses.replace(changed, **each.fields)
                optimizer = settings_of(each.optimizer) if each.optimizer else optimizer
        label = ", ".join(c.label for c in several)
        self.say(f"with {label} ...")
        found = self.budget(changed, optimizer)
        cost = "; ".join(dict.fromkeys(c.cost_of(options) for c in several))
        return Tried(label, cost, found, self.fits(found))

    def _engines(self, whole: Budget, before: str) -> list[Tried]:
        """The fewest GPUs on which each engine makes it fit, or the most that are asked."""
        found = []
        for how, cost in (
            (ZERO2, "gradients summed in parts"),
            (FSDP, "weights sent twice a step"),
        ):
            needs = {n: sharded(whole, how, n) for n in GPUS}
            count = next((n for n in GPUS if self.fits(needs[n])), GPUS[-1])
            label = f"{before}{how.name} on {count} GPUs"
            found.append(Tried(label, cost, needs[count], self.fits(needs[count])))
        return found
