"""Does a step fit a GPU: the largest batch, and what to change where it does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from petal_kernels.memory.optimizer import STATES, Settings, settings_of
from petal_kernels.memory.records import mib
from petal_kernels.tools.memory.budget import (
    CONTEXT,
    FROZEN,
    FSDP,
    GRADIENTS,
    TRAINED,
    ZERO2,
    Budget,
    sharded,
)
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
    option: str = ""  # of this command
    code: str = ""  # the line in a user's own

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
    Change(
        "SDPA attention",
        "none: faster",
        {"attention": "sdpa"},
        option="--attention sdpa",
        code='from_pretrained(..., attn_implementation="sdpa")',
    ),
    Change(
        "fused layers (method lora)",
        "none: faster",
        {"method": "lora"},
        methods=("peft-lora",),
        option="--method lora",
        code="pk.attach(model, pk.LoraConfig(...)), or pk.fuse(peft_model)",
    ),
    Change(
        "frozen norms fused",
        "none: faster",
        {"frozen_norms": "fused"},
        methods=("lora",),
        option="--frozen-norms fused",
        code='LoraConfig(frozen_norms="fused")',
    ),
    Change(
        "bfloat16 adapters",
        "none; they round",
        {"adapter_dtype": "bfloat16"},
        option="--adapter-dtype bfloat16",
        code='adapter_dtype="bfloat16" in the config',
    ),
    Change(
        "AdamW in 8 bits",
        "none to speak of; states round",
        optimizer="adamw8bit",
        option="--optimizer adamw8bit",
        code="bitsandbytes.optim.AdamW8bit(parameters)",
    ),
    Change(
        "norms folded",
        "each norm once more",
        {"frozen_norms": "folded"},
        methods=("lora",),
        option="--frozen-norms folded",
        code='LoraConfig(frozen_norms="folded")',
    ),
    Change(
        "MLPs recomputed",
        "an MLP's gate and up once more",
        {"recompute_mlp": True},
        option="--recompute-mlp",
        code="LoraConfig(recompute_mlp=True)",
    ),
    Change(
        "gradient checkpointing",
        "each layer's forward once more: + 50 % of its products",
        {"checkpointing": True},
        full_cost="each layer's forward once more: + 33 % of its products",
        option="--checkpointing",
        code="model.gradient_checkpointing_enable()",
    ),
    Change(
        "base in nf4",
        "each weight decoded twice a step; it rounds",
        {"base": "nf4"},
        option="--base nf4",
        code='BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")',
    ),
)
# What does not grow with the batch.
_FIXED = (FROZEN, TRAINED, GRADIENTS, STATES, CONTEXT)


@dataclass(frozen=True)
class Tried:
    """A change, or several, the need with them, and how each is made: the option of this command,
    and the line of code."""

    label: str
    cost: str
    budget: Budget
    fits: bool
    how: tuple[tuple[str, str], ...] = ()

    @property
    def code(self) -> str:
        """The lines of code."""
        return "; ".join(code for _, code in self.how)


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
    tell   what was found, as it is found: the verdict first, then each change
    """

    need: Need
    gpu: Gpu
    optimizer: Settings
    heeded: Collection[str]
    say: Callable[[str], None] = lambda _: None
    tell: Callable[[str], None] = lambda _: None
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
        fits = self.fits(whole)
        left = mib(abs(self.gpu.total - whole.need))
        said = f"fits {self.gpu}, {left} to spare" if fits else f"does not fit {self.gpu}"
        self.tell(said if fits else f"{said}: {left} too much")
        tried, answer = ([], None) if fits else self.changes(options)
        largest = self.largest_batch(options) if "batch" in self.heeded else None
        return Verdict(self.gpu, whole, largest, tried, answer)

    def largest_batch(self, options: Options) -> int:
        """The most samples that fit: bisection between one that fits and one that does not, each
        next guess from the line through both."""
        low, high = 0, 0  # fits, does not
        guess = options.batch
        known: dict[int, int] = {}
        while high != low + 1 and low < MOST_SAMPLES:
            found = self.budget(dataclasses.replace(options, batch=guess))
            known[guess] = found.need
            fits = known[guess] <= self.gpu.total
            self.say(f"batch {guess}: {known[guess] / 2**30:.1f} GiB, {'fits' if fits else 'no'}")
            low, high = (guess, high) if fits else (low, guess)
            guess = self._guess(known, low, high) if len(known) > 1 else self._second(found, guess)
        return low

    def _second(self, whole: Budget, batch: int) -> int:
        """The batch to ask after the first, on the right side of it: what does not grow with the
        batch is known by its name."""
        grows = whole.need - sum(whole.parts.get(name, 0) for name in _FIXED)
        left = self.gpu.total - (whole.need - grows)
        if self.fits(whole):
            guess = left * batch // grows if grows > 0 else 2 * batch
            return min(max(guess, batch + 1), MOST_SAMPLES)
        guess = left * batch // grows if grows > 0 else batch // 2
        return min(max(guess, 1), batch - 1)

    def _guess(self, known: dict[int, int], low: int, high: int) -> int:
        """The next batch to ask, strictly between `low` and `high` where both are known."""
        if len(known) > _STRAIGHT and high:
            return (low + high) // 2
        at = sorted(known)[-2:]
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
        if last.fits:
            return tried, self._fewest(asked, options, tried, last)
        engines = self._engines(last.budget, f"{last.label}, ")
        return tried, next((t for t in engines if t.fits), None)

    def _fewest(
        self, asked: list[Change], options: Options, alone: list[Tried], last: Tried
    ) -> Tried:
        """The fewest of the first changes that fit together: the first guess is where what each
        saves alone adds up, then one on this side or that of it. A change is taken to save."""
        much, wanted = self.budget(options).need - self.gpu.total, len(asked)
        for count, each in enumerate(alone[: len(asked)], 1):
            much -= self.budget(options).need - each.budget.need
            if much <= 0:
                wanted = count
                break
        low, high, found = 1, len(asked), last  # too few, enough
        while high > low + 1:
            count = min(max(wanted, low + 1), high - 1)
            several = self._try(asked[:count], options)
            low, high = (low, count) if several.fits else (count, high)
            found = several if several.fits else found
        return found

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
        how = tuple((c.option, c.code) for c in several)
        tried = Tried(label, cost, found, self.fits(found), how)
        fits = "fits" if tried.fits else "does not fit"
        self.tell(f"with {label}: {mib(found.need)}, {fits}; {tried.code}")
        return tried

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
