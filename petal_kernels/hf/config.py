"""What to attach: one config per method. Plain data, checked at construction, stored as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from petal_kernels._runtime.numerics import ACTIVATIONS
from petal_kernels.hf.adapter_config import VARIANTS as VARIANTS
from petal_kernels.hf.adapter_config import AdapterConfig as AdapterConfig
from petal_kernels.hf.block_config import CompacterConfig as CompacterConfig
from petal_kernels.hf.block_config import VLAdapterConfig as VLAdapterConfig
from petal_kernels.hf.block_config import VLPetConfig as VLPetConfig
from petal_kernels.hf.fields import is_finite as _is_finite
from petal_kernels.hf.fields import is_number as _is_number
from petal_kernels.hf.fields import is_size as _is_size
from petal_kernels.hf.fields import one_of as _one_of
from petal_kernels.hf.fields import want as _want
from petal_kernels.hf.lora_config import LoraConfig as LoraConfig
from petal_kernels.nn import low_rank_experts as moe
from petal_kernels.nn.gated_adapter import ROUTES

_VARIANT_DEFAULTS: dict[str, dict[str, Any]] = {
    "paper": {
        "core": "cp",
        "context": "none",
        "use_cross_residual": True,
        "gate": "softmax",
        "tokens": "text",
    },
    "release": {
        "core": "tucker",
        "context": "batch",
        "use_cross_residual": False,
        "gate": "mean",
        "tokens": "all",
    },
}


@dataclass
class PetalConfig(AdapterConfig):
    """Mode approximation with the scale/shift residual, the batch context and the experts of PETAL.

    r                   rank of the shared factors.
    variant             "paper" (the published formulas) or "release" (what the authors' code does);
                        it fills `core`, `context`, `use_cross_residual`, `gate` and `tokens` where
                        they are None.
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
    experts, expert_r   how many experts the embeddings of [queries; instruction] pass through (0:
                        none; 6 as published), and their rank.
    gate                "softmax" (a trained router; the paper has no formula) or "mean".
    top_k, router_input, router_noise   of the router, as in ExpertConfig.
    tokens              which embeddings are served: "text" (not the queries) or "all".
    keep, mix           e' = keep e + mix E(e); 0.6 and 0.4 as published, at step 0 about 0.6 e.
    expert_init         "normal" (as published), or "identity": step 0 changes nothing, keep is 1.
    adapter_dtype       "float32" (default) or "bfloat16": storage of the adapter's parameters.
    """

    method: ClassVar[str] = "petal"
    core: Literal["cp", "tucker"] | None = None
    dropout: float = 0.1
    scale: float = 1.0
    context: Literal["none", "batch"] | None = None
    scale_shift: bool = True
    use_cross_residual: bool | None = None
    experts: int = 0
    expert_r: int = 64
    gate: str | None = None
    top_k: int | None = None
    router_input: str = "token"
    router_noise: float = 0.0
    tokens: str | None = None
    keep: float | None = None
    mix: float = 0.4
    expert_init: str = "normal"

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
        _want(_is_size(self.experts, 0), "experts", "an integer >= 0", self.experts)
        _want(_is_size(self.expert_r, 1), "expert_r", "an integer >= 1", self.expert_r)
        _check_router(self, moe.GATES[:2])
        _one_of("tokens", self.tokens, moe.TOKENS)
        _one_of("expert_init", self.expert_init, ("normal", "identity"))
        identity = self.expert_init == "identity"
        ok = self.keep is None or (_is_finite(self.keep) and not (identity and self.keep != 1))
        _want(ok, "keep", "None or 1" if identity else "None or a finite number", self.keep)
        _want(_is_finite(self.mix), "mix", "a finite number", self.mix)


@dataclass
class AuroraConfig(AdapterConfig):
    """Aurora: one set of shared factors for the image encoder and every text stack.

    r                rank of the shared factors.
    variant          "paper" (the published formulas) or "release" (what the authors' code does); it
                     fills `core` and `layout` where they are None: "cp" and "blocks", or "tucker"
                     and "aurora_release".
    dropout          on the r-wide middle: after the core in the image encoder, before it in text.
    scale            factor s of every update.
    layout           of the feed-forward modes: "blocks" (one mode per block of outputs or inputs)
                     or "aurora_release" (the authors' code, whose blocks mix the entries of their
                     modes).
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
    layout: Literal["blocks", "aurora_release"] | None = None
    scale_shift: bool = True
    context: Literal["none", "batch"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.core is None:
            self.core = _VARIANT_DEFAULTS[self.variant]["core"]
        if self.layout is None:
            self.layout = "aurora_release" if self.variant == "release" else "blocks"
        _one_of("core", self.core, ("cp", "tucker"))
        _one_of("layout", self.layout, ("blocks", "aurora_release"))
        _one_of("context", self.context, ("none", "batch"))
        _want(isinstance(self.scale_shift, bool), "scale_shift", "a bool", self.scale_shift)
        ok = _is_number(self.dropout) and 0.0 <= self.dropout < 1.0
        _want(ok, "dropout", "a number with 0 <= dropout < 1", self.dropout)
        _want(_is_finite(self.scale), "scale", "a finite number", self.scale)


@dataclass
class RoutingConfig(AdapterConfig):
    """Routing functions in low-rank bottlenecks; `function="none"` has none (LoRA for its
    own sake: LoraConfig).

    kind          "lora" (query and value projections) or "adapter" (after every block).
    function      "none", "add", "mul", "expand", "gram", "gram_relu" or "xt"; all but "none" read
                  the vision features given by `with attachment.vision(features):`. "xt", and
                  add and mul of several features with variant="release", join token by token
                  and want as many features as the text has tokens.
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


@dataclass
class ExpertConfig(AdapterConfig):
    """Mixtures of LoRA updates or of adapters: `experts` of rank `r` in every place.

    kind          "lora" (query and value projections) or "adapter" (after every block).
    alpha         LoRA's scale is alpha / r (default alpha = r).
    activation, scale   of the adapters; `scale` multiplies their sum.
    gate          "softmax" (a trained router), "mean", or "domain": `with attachment.domains(...):`
                  says which expert serves each token (Context-PEFT: one for image, one for text).
    top_k         softmax: how many experts serve a token (default all).
    router_input  "token", or "pooled": one choice per sample, by the mean of its tokens (without
                  padding). A layer pools what it is given: in cached decoding the new token alone.
    router_noise  standard deviation of the noise on the logits while training.
    shared_down   one down-projection for all experts.
    """

    method: ClassVar[str] = "experts"
    r: int = 8
    experts: int = 4
    kind: str = "lora"
    alpha: float | None = None
    activation: str = "gelu_tanh"
    scale: float = 1.0
    gate: str = "softmax"
    top_k: int | None = None
    router_input: str = "token"
    router_noise: float = 0.0
    shared_down: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _want(_is_size(self.experts, 1), "experts", "an integer >= 1", self.experts)
        _one_of("kind", self.kind, ("lora", "adapter"))
        _one_of("activation", self.activation, ACTIVATIONS)
        lora = self.kind == "lora"
        ok = self.alpha is None or (lora and _is_finite(self.alpha))
        want = "None or a finite number" if lora else "None with kind='adapter'"
        _want(ok, "alpha", want, self.alpha)
        ok = _is_finite(self.scale) and (not lora or self.scale == 1)
        want = "1.0 with kind='lora' (alpha scales it)" if lora else "a finite number"
        _want(ok, "scale", want, self.scale)
        _check_router(self, moe.GATES)
        _want(isinstance(self.shared_down, bool), "shared_down", "a bool", self.shared_down)


METHODS: dict[str, type[AdapterConfig]] = {
    config.method: config
    for config in (
        PetalConfig,
        AuroraConfig,
        VLPetConfig,
        VLAdapterConfig,
        CompacterConfig,
        RoutingConfig,
        ExpertConfig,
        LoraConfig,
    )
}


def _check_router(config: PetalConfig | ExpertConfig, gates: tuple[str, ...]) -> None:
    _one_of("gate", config.gate, gates)
    _one_of("router_input", config.router_input, moe.ROUTER_INPUTS)
    top_k, noise = config.top_k, config.router_noise
    want = f"None or an integer from 1 to experts={config.experts}"
    _want(top_k is None or (_is_size(top_k, 1) and top_k <= config.experts), "top_k", want, top_k)
    _want(_is_finite(noise) and noise >= 0, "router_noise", "a finite number >= 0", noise)
    if config.gate != "softmax":
        for name, default in (("top_k", None), ("router_input", "token"), ("router_noise", 0)):
            value = getattr(config, name)
            _want(value == default, name, f"{default!r} with gate={config.gate!r}", value)
