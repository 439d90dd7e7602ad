"""What to do about it: lines derived from the records of a profile, largest saving first.

Each rule looks for one cause and says how many bytes it costs, where, and the remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from petal_kernels.memory.modules import inside
from petal_kernels.memory.reasons import short_name
from petal_kernels.memory.records import MODEL, Saved, collapse, mib

if TYPE_CHECKING:
    from petal_kernels.memory.profile import Profile

_LEAST = 0.01  # share of the saved bytes below which a line is not worth reading
_PLACES = 3


@dataclass(frozen=True)
class Advice:
    """One line: what it costs, what it is, what to do."""

    cause: str
    bytes: int
    text: str
    remedy: str

    def __str__(self) -> str:
        return f"{mib(self.bytes)}: {self.text}: {self.remedy}"


def advise(profile: Profile) -> list[Advice]:
    """The lines worth reading."""
    least = _LEAST * profile.saved_bytes
    found = [each for rule in RULES for each in rule(profile) if each.bytes >= max(1, least)]
    return sorted(found, key=lambda a: -a.bytes)


def _places(records: list[Saved]) -> str:
    """The modules of the records, the layers of a stack as one, the first few by name."""
    names = list(dict.fromkeys(r.place or MODEL for r in records))
    shown = ", ".join(names[:_PLACES])
    return shown + (f" and {len(names) - _PLACES} more places" if len(names) > _PLACES else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _total(records: list[Saved]) -> int:
    return sum(r.bytes for r in records)


def _copies(profile: Profile) -> Iterator[Advice]:
    """Several converted or dropped-out copies of one tensor."""
    groups: dict[int, list[Saved]] = {}
    for record in profile.saved:
        if record.copy_of is not None and not record.source and record.role == "trainable":
            groups.setdefault(record.copy_of, []).append(record)
    kinds: dict[tuple[int, str, str], list[list[Saved]]] = {}
    for records in groups.values():
        whole = [r for r in records if r.dtype.is_floating_point]
        if len(whole) > 1:
            places = ", ".join(dict.fromkeys(collapse(r.module) for r in whole))
            dtype = str(whole[0].dtype).removeprefix("torch.")
            kinds.setdefault((len(whole), dtype, places), []).append(whole)
    for (count, dtype, places), sets in kinds.items():
        size = sum(_total(records) for records in sets)
        times = "" if len(sets) == 1 else f" ({len(sets)} times)"
        yield Advice(
            "copies",
            size,
            f"{count} {dtype} copies of one tensor{times}, at {places}",
            "one fused layer for the projections that read it keeps it once, in its own dtype "
            "(pk.attach, pk.lowrank_linear); adapters in the base's dtype also avoid the copies",
        )


def _wasted(profile: Profile) -> Iterator[Advice]:
    """Frozen modules that keep tensors although nothing trainable lies behind them."""
    for path, records in _by_frozen(profile, useful=False):
        yield Advice(
            "wasted",
            _total(records),
            f"the frozen {path or MODEL} keeps what no gradient of a trained parameter needs",
            "compute its output under torch.no_grad() or detach() it, or once for all epochs "
            "(often the cause is enable_input_require_grads(), or an input that requires grad)",
        )


def _passed_through(profile: Profile) -> Iterator[Advice]:
    """Frozen modules that keep tensors because something trained lies below them."""
    if profile.checkpointed:
        return
    for path, records in _by_frozen(profile, useful=True):
        if _total(records) < 0.1 * profile.saved_bytes:
            continue
        share = 100 * _total(records) / profile.saved_bytes
        yield Advice(
            "frozen",
            _total(records),
            f"the frozen {path or MODEL} keeps {share:.0f} % of all, for the gradient of what is "
            "trained before it",
            "gradient checkpointing (model.gradient_checkpointing_enable()) keeps one tensor per "
            "layer instead and computes the rest again",
        )


def _by_frozen(profile: Profile, useful: bool) -> list[tuple[str, list[Saved]]]:
    """Records by the largest frozen module they are in, the layers of a stack as one."""
    groups: dict[str, list[Saved]] = {}
    for record in profile.saved:
        if record.role != "frozen" or record.useful != useful or record.of_batch:
            continue
        owner = next((path for path in profile.frozen if inside(record.module, path)), None)
        if owner is not None:
            groups.setdefault(collapse(owner), []).append(record)
    return sorted(groups.items(), key=lambda entry: -_total(entry[1]))


def _dropout(profile: Profile) -> Iterator[Advice]:
    """Masks, and the noise that a CPU keeps instead."""
    masks = [
        r
        for r in profile.saved
        if short_name(r.operation) == "NativeDropout" and r.argument == "result1"
    ]
    noise = [
        r
        for r in profile.saved
        if "Dropout" in r.kind and short_name(r.operation) == "Mul" and r.argument == "other"
    ]
    records = masks + noise
    if records:
        yield Advice(
            "dropout",
            _total(records),
            f"{_count(len(records), 'dropout mask')}, at {_places(records)}",
            "layers of this package draw theirs again from a seed of 16 bytes; a frozen base needs "
            "no dropout",
        )


def _attention(profile: Profile) -> Iterator[Advice]:
    """Probabilities of eager attention, and what is made of them."""
    records = [
        r
        for r in profile.saved
        if short_name(r.operation) in ("Softmax", "NativeDropout", "Bmm", "SafeSoftmax")
        and len(r.shape) >= 3
        and "ttention" in r.kind + r.module
        and _is_square_of_softmax(r, profile)
    ]
    if records:
        rows, columns = records[0].shape[-2:]
        yield Advice(
            "attention",
            _total(records),
            f"attention probabilities, e.g. {rows} x {columns} per head, at {_places(records)}",
            "load the model with attn_implementation='sdpa': fused attention keeps one number per "
            "row instead",
        )


def _is_square_of_softmax(record: Saved, profile: Profile) -> bool:
    """Whether a kept tensor has the [queries, keys] shape of some softmax of its module."""
    if short_name(record.operation) in ("Softmax", "SafeSoftmax"):
        return True
    return any(
        other.module == record.module
        and short_name(other.operation) in ("Softmax", "SafeSoftmax")
        and other.shape[-2:] == record.shape[-2:]
        for other in profile.saved
    )


def _parameters(profile: Profile) -> Iterator[Advice]:
    """Converted copies of weights, as autocast and adapters of another dtype make them."""
    for kind, remedy in (
        (
            "frozen",
            "load the frozen model in the dtype it computes in: no product converts it then",
        ),
        ("trained", "adapters in the dtype of the base need none (adapter_dtype of the config)"),
    ):
        records = [
            r
            for r in profile.saved
            if r.source and (r.source in profile.trained) == (kind == "trained")
        ]
        if records:
            dtype = str(records[0].dtype).removeprefix("torch.")
            count = _count(len(records), f"{kind} parameter")
            text = f"{dtype} copies of {count}, at {_places(records)}"
            yield Advice("parameters", _total(records), text, remedy)


def _loss(profile: Profile) -> Iterator[Advice]:
    """Logits of a large vocabulary."""
    records = [r for r in profile.saved if short_name(r.operation) == "LogSoftmax"]
    if records:
        yield Advice(
            "loss",
            _total(records),
            f"log-probabilities of the loss, {' x '.join(map(str, records[0].shape))} "
            f"{str(records[0].dtype).removeprefix('torch.')}",
            "compute logits only where there are labels, or the loss in pieces",
        )


def _norms(profile: Profile) -> Iterator[Advice]:
    """float32 tensors that norms written in Python keep of a 16-bit model."""
    records = [
        r
        for r in profile.saved
        if "Norm" in r.kind and r.dtype == torch.float32 and len(r.shape) > 1 and r.shape[-1] > 1
    ]
    half = any(r.dtype.itemsize == 2 and r.dtype.is_floating_point for r in profile.saved)
    if records and half:
        yield Advice(
            "norms",
            _total(records),
            f"{_count(len(records), 'float32 tensor')} in norms of a 16-bit model, at "
            f"{_places(records)}",
            "a fused norm keeps its 16-bit input and one number per row (torch.compile makes one "
            "of it); checkpointing drops them",
        )


def _evaluating(profile: Profile) -> Iterator[Advice]:
    """A model that is not in the mode it trains in."""
    if not profile.training and profile.saved:
        yield Advice(
            "mode",
            profile.saved_bytes,
            "the model is in evaluation mode: dropout and checkpointing do not run",
            "profile it after model.train()",
        )


RULES: tuple[Callable[[Profile], Iterator[Advice]], ...] = (
    _copies,
    _wasted,
    _passed_through,
    _dropout,
    _attention,
    _parameters,
    _loss,
    _norms,
    _evaluating,
)
