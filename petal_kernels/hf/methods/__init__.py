"""The methods, one file each: what is a method's own. The table maps a config to its method."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from petal_kernels.hf.config import AdapterConfig

if TYPE_CHECKING:
    from petal_kernels.hf.method import Method

METHODS: dict[str, tuple[str, str]] = {
    "petal": ("petal", "Petal"),
    "aurora": ("aurora", "Aurora"),
    "vlpet": ("vlpet", "VLPet"),
    "vladapter": ("vladapter", "VLAdapter"),
    "compacter": ("compacter", "Compacter"),
    "routing": ("routing", "Routing"),
    "experts": ("experts", "Experts"),
    "lora": ("lora", "Lora"),
}


def method_of(config: AdapterConfig) -> type[Method]:
    """The description of a config's method; its module is imported when it is first used."""
    module, name = METHODS[config.method]
    found: type[Method] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return found
