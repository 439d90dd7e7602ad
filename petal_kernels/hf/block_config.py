"""Configs of the methods that put an adapter after blocks: VL-PET, VL-Adapter, Compacter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from petal_kernels._runtime.numerics import ACTIVATIONS
from petal_kernels.hf.adapter_config import AdapterConfig
from petal_kernels.hf.fields import is_finite, is_number, is_size, one_of, want
from petal_kernels.nn.gated_adapter import GATES, INITS

# What VLPetConfig's modules are given of the fields that are not every module's, and their values
# where they are not read.
_BOTTLENECK = ("gate_r", "activation", "scale", "value_scale", "init")
_OWN = {
    "adapter": _BOTTLENECK,
    "compacter": (*_BOTTLENECK, "division", "factor_r", "share_rule"),
    "lora": ("alpha", "dropout"),
}
_IDLE = {
    "gate_r": None,
    "activation": "gelu_tanh",
    "scale": 1.0,
    "value_scale": 1.0,
    "init": "normal",
    "division": 2,
    "factor_r": None,
    "share_rule": False,
    "alpha": None,
    "dropout": 0.0,
}


@dataclass
class VLPetConfig(AdapterConfig):
    """VL-PET: a module after every encoder block, another on the decoder's values of
    cross-attention.

    r, gate_r     ranks of the modules and of the large gate (default r).
    module        "adapter" (VL-PET's own), "compacter" (projections as CompacterConfig's) or "lora"
                  (an update of the linear that ends a block, and of the values'; these fold).
    gate          "large", "middleX", "middleY", "small" or "none"; default "large", and "none" with
                  another module: VL-PET's designs without its gates. "lora" takes none.
    value_r       rank of the modules on the values of cross-attention; 0: none.
    activation    "gelu_tanh" (gelu_new), "gelu", "relu", "silu" or "identity".
    scale, value_scale   factors of the gated sum, and of the update of the values.
    init          "normal" (as on BART), "zero" (as on T5) or "identity" (s * G = 1 at step 0).
    variant       "release": what the authors' code does (`ops/gated_bottleneck/reference.py`).
    train_norms   the encoder's norms are trained whole.
    division, factor_r, share_rule   of "compacter", as in CompacterConfig.
    alpha, dropout   of "lora": its scale is alpha / rank (default 1); dropout of its input.
    target_modules, modules_to_save, adapter_dtype   as in PetalConfig; roles in the report.
    """

    method: ClassVar[str] = "vlpet"
    r: int = 96
    gate: str | None = None
    gate_r: int | None = None
    value_r: int = 96
    activation: str = "gelu_tanh"
    scale: float = 1.0
    init: str = "normal"
    train_norms: bool = True
    module: str = "adapter"
    division: int = 2
    factor_r: int | None = None
    share_rule: bool = False
    alpha: float | None = None
    dropout: float = 0.0
    value_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("module", self.module, tuple(_OWN))
        for name, idle in _IDLE.items():
            if name not in _OWN[self.module]:
                got = getattr(self, name)
                ok = type(got) in (type(idle), int) and got == idle
                want(ok, name, f"{idle!r} with module={self.module!r}", got)
        if self.gate is None:
            self.gate = "large" if self.module == "adapter" else "none"
        one_of("gate", self.gate, GATES if self.module != "lora" else ("none",))
        one_of("activation", self.activation, ACTIVATIONS)
        one_of("init", self.init, INITS)
        if self.gate_r is None and self.module != "lora":
            self.gate_r = self.r
        ok = self.gate_r is None or is_size(self.gate_r, 1)
        want(ok, "gate_r", "None or an integer >= 1", self.gate_r)
        want(is_size(self.value_r, 0), "value_r", "an integer >= 0", self.value_r)
        for name in ("scale", "value_scale"):
            want(is_finite(getattr(self, name)), name, "a finite number", getattr(self, name))
        for name in ("train_norms", "share_rule"):
            want(isinstance(getattr(self, name), bool), name, "a bool", getattr(self, name))
        if self.module == "compacter":
            check_division(self)
            n = self.division
            want(self.value_r % n == 0, "value_r", f"a multiple of division={n}", self.value_r)
        ok = self.alpha is None or is_finite(self.alpha)
        want(ok, "alpha", "None or a finite number", self.alpha)
        ok = is_number(self.dropout) and 0.0 <= self.dropout < 1.0
        want(ok, "dropout", "a number with 0 <= dropout < 1", self.dropout)


@dataclass
class VLAdapterConfig(AdapterConfig):
    """VL-Adapter: a bottleneck after every block of encoder and decoder; fields as VLPetConfig's.

    train_norms   every norm of the model is trained whole.
    """

    method: ClassVar[str] = "vladapter"
    r: int = 96
    activation: str = "gelu_tanh"
    init: str = "normal"
    train_norms: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("activation", self.activation, ACTIVATIONS)
        one_of("init", self.init, INITS[:2])
        want(isinstance(self.train_norms, bool), "train_norms", "a bool", self.train_norms)


@dataclass
class CompacterConfig(AdapterConfig):
    """Compacter: VL-Adapter's places, with projections that are sums of Kronecker products.

    r             rank; a multiple of `division`, as the model's width must be.
    division      n: down = sum_i kron(A_i, B_i) over n products, A_i n x n; up likewise.
    factor_r      rank of each B_i; None: whole.
    share_rule    one rule A for the whole model; False: one for each projection.
    activation, init, train_norms   as VLAdapterConfig's; `init="normal"` draws B Glorot-uniform
                  with gain sqrt 2 and A from N(0, 0.01^2).

    The defaults are those of VL-Adapter's image-text runs; Compacter's own are `division=4,
    factor_r=1, share_rule=True`. No text of either differs from its code: `variant` decides
    nothing here.
    """

    method: ClassVar[str] = "compacter"
    r: int = 96
    division: int = 2
    factor_r: int | None = None
    share_rule: bool = False
    activation: str = "gelu_tanh"
    init: str = "normal"
    train_norms: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_division(self)
        one_of("activation", self.activation, ACTIVATIONS)
        one_of("init", self.init, INITS[:2])
        for name in ("share_rule", "train_norms"):
            want(isinstance(getattr(self, name), bool), name, "a bool", getattr(self, name))


def check_division(config: CompacterConfig | VLPetConfig) -> None:
    """ValueError unless the Kronecker products of a config are possible."""
    n, factor_r = config.division, config.factor_r
    want(is_size(n, 1), "division", "an integer >= 1", n)
    want(config.r % n == 0, "r", f"a multiple of division={n}", config.r)
    want(factor_r is None or is_size(factor_r, 1), "factor_r", "None or an integer >= 1", factor_r)
