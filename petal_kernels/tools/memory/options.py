"""What can be chosen of a profiled step."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Options:
    """What can be chosen, and asked "what if" about."""

    method: str = "petal"
    batch: int = 8
    length: int = 128
    rank: int = 64
    dtype: str = "bfloat16"
    attention: str = "sdpa"
    checkpointing: bool = False
    implementation: str = "fused"
    part: str = ""
    targets: str | tuple[str, ...] | None = None
    parts: tuple[str, ...] = ("language",)
    recompute_mlp: bool = False
    frozen_norms: str = "module"
    adapter_dtype: str = "float32"
    base: str = "full"  # its linears' weights: full, int8 or nf4
    input_grads: bool = False  # enable_input_require_grads(), as PEFT's recipes call it
    images: int = 1  # per sample, of a config
    image_size: tuple[int, int] | None = None  # width, height
    dropout: float | None = None
    device: str = ""  # empty: fake tensors

    def describe(self, heeded: Collection[str]) -> str:
        """The options in a line, those only that decide anything."""
        rank = f" r={self.rank}" if "rank" in heeded else ""
        parts = [f"{self.method}{rank}", f"batch {self.batch}"]
        parts += [f"{self.length} words"] if "length" in heeded else []
        parts += [self.attention]
        parts += ["checkpointing"] if self.checkpointing else []
        parts += ["published layers"] if self.implementation == "published" else []
        if "targets" in heeded and self.targets is not None:
            parts += [self.targets if isinstance(self.targets, str) else " ".join(self.targets)]
        if "dropout" in heeded and self.dropout is not None:
            parts += [f"dropout {self.dropout:g}"]
        if "parts" in heeded and self.parts != ("language",):
            parts += [f"parts {', '.join(self.parts)}"]
        parts += ["MLPs recomputed"] if self.recompute_mlp else []
        parts += [f"frozen norms {self.frozen_norms}"] if self.frozen_norms != "module" else []
        parts += [f"{self.adapter_dtype} adapters"] if self.adapter_dtype != "float32" else []
        parts += [f"base in {self.base}"] if self.base != "full" else []
        parts += ["inputs that require grad"] if self.input_grads else []
        parts += [f"on {self.part}"] if self.part else []
        return ", ".join(parts)
