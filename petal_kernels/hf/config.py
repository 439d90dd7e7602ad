"""PetalConfig: what to attach. Plain data, checked at construction, stored as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch

VARIANTS = ("paper", "release")
_VARIANT_DEFAULTS: dict[str, dict[str, Any]] = {
    "paper": {"core": "cp", "context": "none", "use_cross_residual": True},
    "release": {"core": "tucker", "context": "batch", "use_cross_residual": False},
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class PetalConfig:
    """Mode approximation with the scale/shift residual and the batch context of PETAL.

    r                   rank of the shared factors.
    variant             "paper" (the published formulas) or "release" (what the authors' code does);
                        it fills `core`, `context` and `use_cross_residual` where they are None.
    core                "cp" (a vector lambda) or "tucker" (a full R x R x R core).
    dropout             on the r-wide middle, one mask per mode.
    scale               factor s of every update.
    target_modules      which projections get a mode, as PEFT names them: a list of names (a
                        module's path or its end) or one regular expression over the whole path;
                        None: all that the model's table lists.
    modules_to_save     modules trained whole and stored with the adapter (names as above).
    context             "batch" adds the batch mean of the first query to the cross-attention output
                        (outputs then depend on the batch), "none" does not.
    scale_shift         the per-layer scale/shift residual.
    use_cross_residual  a second residual from the cross-attention output. Where variant is
                        "release" and it is off, its vectors are stored, frozen, for every layer.
    adapter_dtype       "float32" (default) or "bfloat16": storage of the adapter's parameters.
    """

    r: int = 64
    variant: Literal["paper", "release"] = "paper"
    core: Literal["cp", "tucker"] | None = None
    dropout: float = 0.1
    scale: float = 1.0
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    context: Literal["none", "batch"] | None = None
    scale_shift: bool = True
    use_cross_residual: bool | None = None
    adapter_dtype: str = "float32"

    def __post_init__(self) -> None:
        _want(type(self.r) is int and self.r >= 1, "r", "an integer >= 1", self.r)
        _one_of("variant", self.variant, VARIANTS)
        for name, value in _VARIANT_DEFAULTS[self.variant].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        _one_of("core", self.core, ("cp", "tucker"))
        _one_of("context", self.context, ("none", "batch"))
        for name in ("scale_shift", "use_cross_residual"):
            _want(isinstance(getattr(self, name), bool), name, "a bool", getattr(self, name))
        ok = _is_number(self.dropout) and 0.0 <= self.dropout < 1.0
        _want(ok, "dropout", "a number with 0 <= dropout < 1", self.dropout)
        ok = _is_number(self.scale) and abs(self.scale) < float("inf")
        _want(ok, "scale", "a finite number", self.scale)
        if isinstance(self.adapter_dtype, torch.dtype):
            self.adapter_dtype = str(self.adapter_dtype).removeprefix("torch.")
        _one_of("adapter_dtype", self.adapter_dtype, tuple(_DTYPES))
        if not isinstance(self.target_modules, str):
            self.target_modules = _names("target_modules", self.target_modules)
        self.modules_to_save = _names("modules_to_save", self.modules_to_save)

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.adapter_dtype]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PetalConfig:
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"PetalConfig: want keys among {known}, got unknown {unknown}")
        return cls(**values)


def _want(ok: bool, name: str, want: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{name}: want {want}, got {got!r}")


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    _want(value in choices, name, f"one of {choices}", value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _names(name: str, value: object) -> list[str] | None:
    if value is None:
        return None
    ok = isinstance(value, (list, tuple, set, frozenset)) and len(value) > 0
    ok = ok and all(isinstance(item, str) for item in value)  # type: ignore[attr-defined]
    _want(ok, name, "None or a non-empty list of module names", value)
    return sorted(value) if isinstance(value, (set, frozenset)) else list(value)  # type: ignore[call-overload]
