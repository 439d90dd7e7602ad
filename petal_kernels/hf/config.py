"""What to attach: one config per method. Plain data, checked at construction, stored as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch

from petal_kernels.nn.gated_adapter import ACTIVATIONS, GATES, INITS, ROUTES

VARIANTS = ("paper", "release")
_VARIANT_DEFAULTS: dict[str, dict[str, Any]] = {
    "paper": {"core": "cp", "context": "none", "use_cross_residual": True},
    "release": {"core": "tucker", "context": "batch", "use_cross_residual": False},
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


Config = TypeVar("Config", bound="AdapterConfig")


@dataclass
class AdapterConfig:
    """What the configs of all methods share."""

    method: ClassVar[str] = ""
    r: int = 64
    variant: str = "paper"
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    adapter_dtype: str = "float32"

    def __post_init__(self) -> None:
        _want(type(self.r) is int and self.r >= 1, "r", "an integer >= 1", self.r)
        _one_of("variant", self.variant, VARIANTS)
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
    def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"{cls.__name__}: want keys among {known}, got unknown {unknown}")
        return cls(**values)


@dataclass
class PetalConfig(AdapterConfig):
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

    method: ClassVar[str] = "petal"
    core: Literal["cp", "tucker"] | None = None
    dropout: float = 0.1
    scale: float = 1.0
    context: Literal["none", "batch"] | None = None
    scale_shift: bool = True
    use_cross_residual: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in _VARIANT_DEFAULTS[self.variant].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        _one_of("core", self.core, ("cp", "tucker"))
        _one_of("context", self.context, ("none", "batch"))
        for name in ("scale_shift", "use_cross_residual"):
            _want(isinstance(getattr(self, name), bool), name, "a bool", getattr(self, name))
        ok = _is_number(self.dropout) and 0.0 <= self.dropout < 1.0
        _want(ok, "dropout", "a number with 0 <= dropout < 1", self.dropout)
        _want(_is_finite(self.scale), "scale", "a finite number", self.scale)


@dataclass
class AuroraConfig(AdapterConfig):
    """Aurora: one set of shared factors for the image encoder and every text stack.

    r                rank of the shared factors.
    variant          "paper" (the published formulas) or "release" (what the authors' code does); it
                     fills `core` where that is None: "cp" and "tucker".
    dropout          on the r-wide middle: after the core in the image encoder, before it in text.
    scale            factor s of every update.
    layout           of the feed-forward modes: "blocks" (one mode per block of outputs or inputs)
                     or "aurora_release" (the authors' code, whose blocks mix the entries of their
                     modes; only for adapters trained so).
    scale_shift      the query transformation: scale/shift residuals of a text layer's self and
                     cross attention, added where the text runs with image features. The paper
                     calls it gated; no gate is published or released, and there is none here.
    context          "batch" allows `with attachment.context(features):`, which adds the mean of
                     text-only features to what the matching head reads; "none" does not.
    target_modules, modules_to_save, adapter_dtype   as in PetalConfig; roles in the report.
    """

    method: ClassVar[str] = "aurora"
    r: int = 32
    core: Literal["cp", "tucker"] | None = None
    dropout: float = 0.1
    scale: float = 1.0
    layout: Literal["blocks", "aurora_release"] = "blocks"
    scale_shift: bool = True
    context: Literal["none", "batch"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.core is None:
            self.core = _VARIANT_DEFAULTS[self.variant]["core"]
        _one_of("core", self.core, ("cp", "tucker"))
        _one_of("layout", self.layout, ("blocks", "aurora_release"))
        _one_of("context", self.context, ("none", "batch"))
        _want(isinstance(self.scale_shift, bool), "scale_shift", "a bool", self.scale_shift)
        ok = _is_number(self.dropout) and 0.0 <= self.dropout < 1.0
        _want(ok, "dropout", "a number with 0 <= dropout < 1", self.dropout)
        _want(_is_finite(self.scale), "scale", "a finite number", self.scale)


@dataclass
class VLPetConfig(AdapterConfig):
    """VL-PET: gated adapters after every encoder block, value adapters in the decoder.

    r, gate_r     ranks of the adapters and of the large gate (default r).
    gate          "large", "middleX", "middleY", "small" or "none".
    value_r       rank of the adapters on the values of cross-attention; 0: none.
    activation    "gelu_tanh" (gelu_new), "gelu", "relu", "silu" or "identity".
    scale         factor s of the gated sum.
    init          "normal" (as on BART), "zero" (as on T5) or "identity" (s * G = 1 at step 0).
    variant       "release": what the authors' code does (`ops/gated_bottleneck/reference.py`).
    train_norms   the encoder's norms are trained whole.
    target_modules, modules_to_save, adapter_dtype   as in PetalConfig; roles in the report.
    """

    method: ClassVar[str] = "vlpet"
    r: int = 96
    gate: str = "large"
    gate_r: int | None = None
    value_r: int = 96
    activation: str = "gelu_tanh"
    scale: float = 1.0
    init: str = "normal"
    train_norms: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("gate", self.gate, GATES)
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("init", self.init, INITS)
        if self.gate_r is None:
            self.gate_r = self.r
        ok = type(self.gate_r) is int and self.gate_r >= 1
        _want(ok, "gate_r", "None or an integer >= 1", self.gate_r)
        _want(
            type(self.value_r) is int and self.value_r >= 0,
            "value_r",
            "an integer >= 0",
            self.value_r,
        )
        _want(_is_finite(self.scale), "scale", "a finite number", self.scale)
        _want(isinstance(self.train_norms, bool), "train_norms", "a bool", self.train_norms)


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
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("init", self.init, INITS[:2])
        _want(isinstance(self.train_norms, bool), "train_norms", "a bool", self.train_norms)


@dataclass
class RoutingConfig(AdapterConfig):
    """Routing functions in low-rank bottlenecks; `function="none"` is plain LoRA or adapters.

    kind          "lora" (query and value projections) or "adapter" (after every block).
    function      "none", "add", "mul", "expand", "gram" or "gram_relu"; all but "none" read the
                  vision features given by `with attachment.vision(features):`.
    alpha         LoRA's scale is alpha / r (default alpha = r).
    groups        "separate" (every projection routes by itself) or "merged" (the released code of
                  GPT-2's fused projections).
    dropout       LoRA: on the input and, independently, on the vision features.
    activation    of the adapters.
    residual      False: the adapter's output replaces its input (the released RoBERTa code).
    share         one adapter per layer, used after each of its blocks (the released GPT-2 code).
    train_bias    LoRA: the biases of the adapted projections are trained.
    train_norms   the norms of the adapted layers are trained whole.
    """

    method: ClassVar[str] = "routing"
    r: int = 128
    kind: str = "lora"
    function: str = "none"
    alpha: float | None = None
    groups: str = "separate"
    dropout: float = 0.0
    activation: str = "gelu_tanh"
    residual: bool = True
    share: bool = False
    train_bias: bool = False
    train_norms: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("kind", self.kind, ("lora", "adapter"))
        _one_of("function", self.function, ROUTES)
        _one_of("groups", self.groups, ("separate", "merged"))
        _one_of("activation", self.activation, ACTIVATIONS)
        ok = _is_number(self.dropout) and 0.0 <= self.dropout < 1.0
        _want(ok, "dropout", "a number with 0 <= dropout < 1", self.dropout)
        ok = self.alpha is None or _is_finite(self.alpha)
        _want(ok, "alpha", "None or a finite number", self.alpha)
        for name in ("residual", "share", "train_bias", "train_norms"):
            _want(isinstance(getattr(self, name), bool), name, "a bool", getattr(self, name))


METHODS: dict[str, type[AdapterConfig]] = {
    config.method: config
    for config in (PetalConfig, AuroraConfig, VLPetConfig, VLAdapterConfig, RoutingConfig)
}


def _want(ok: bool, name: str, want: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{name}: want {want}, got {got!r}")


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    _want(value in choices, name, f"one of {choices}", value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return _is_number(value) and abs(value) < float("inf")  # type: ignore[arg-type]


def _names(name: str, value: object) -> list[str] | None:
    if value is None:
        return None
    ok = isinstance(value, (list, tuple, set, frozenset)) and len(value) > 0
    ok = ok and all(isinstance(item, str) for item in value)  # type: ignore[attr-defined]
    _want(ok, name, "None or a non-empty list of module names", value)
    return sorted(value) if isinstance(value, (set, frozenset)) else list(value)  # type: ignore[call-overload]
