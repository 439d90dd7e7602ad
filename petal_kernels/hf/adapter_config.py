"""What the configs of all methods share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch

from petal_kernels._runtime.keywords import check
from petal_kernels.hf.fields import check_pattern, is_size, names, one_of, plain, want

VARIANTS = ("paper", "release")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


Config = TypeVar("Config", bound="AdapterConfig")


@dataclass
class AdapterConfig:
    """What the configs of all methods share."""

    method: ClassVar[str] = ""
    elsewhere: ClassVar[dict[str, str]] = {}  # names that others have, and what to say of them
    r: int = 64
    variant: str = "paper"
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    adapter_dtype: str = "float32"

    def __new__(cls, *_: Any, **values: Any) -> AdapterConfig:
        check(cls.__init__, values, f"{cls.__name__}: got an unknown field", lambda: cls.elsewhere)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, plain(getattr(self, field.name)))
        want(is_size(self.r, 1), "r", "an integer >= 1", self.r)
        one_of("variant", self.variant, VARIANTS)
        if isinstance(self.adapter_dtype, torch.dtype):
            self.adapter_dtype = str(self.adapter_dtype).removeprefix("torch.")
        one_of("adapter_dtype", self.adapter_dtype, tuple(_DTYPES))
        if isinstance(self.target_modules, str):
            check_pattern("target_modules", self.target_modules)
        else:
            self.target_modules = names("target_modules", self.target_modules)
        self.modules_to_save = names("modules_to_save", self.modules_to_save)

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.adapter_dtype]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
        if not isinstance(values, dict):
            raise TypeError(f"values: want a dict, got a {type(values).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        strange = sorted(str(key) for key in set(values) - set(known))
        if strange:
            raise ValueError(
                f"values: want {cls.__name__}'s keys among {known}, got unknown {strange}"
            )
        return cls(**values)
