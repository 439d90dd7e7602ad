"""LoRA as PEFT users write it: a config with PEFT's names and meanings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from petal_kernels.hf.adapter_config import AdapterConfig
from petal_kernels.hf.fields import (
    check_pattern,
    is_finite,
    is_number,
    is_size,
    names,
    one_of,
    plain,
    want,
)
from petal_kernels.nn.lora_init import check_init

PARTS = ("language", "projector", "vision")
BIASES = ("none", "all", "lora_only")
NORMS = ("module", "fused", "folded")
ALL_LINEAR = "all-linear"
# Of PEFT's config, what says where it comes from, or what is read from the base's class here.
SAYS_NOTHING = (
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("peft_version", "fan_in_fan_out", "runtime_config"),
)


@dataclass
class LoraConfig(AdapterConfig):
    """LoRA on any linear of any model; fields as in PEFT's config of this name.

    r, lora_alpha, use_rslora   rank, and the scale of an update: lora_alpha / r, or / sqrt r.
    lora_dropout         on the input, for the update only.
    target_modules       a list of names (a module's path, or its end behind a dot), one regular
                         expression for whole paths, or "all-linear": every linear but output heads,
                         tied ones and routers of experts. None: the query and value projections of
                         a model that the package knows (of InstructBLIP the Q-Former's).
    exclude_modules      names, or an expression, of what is left out.
    layers_to_transform, layers_pattern   the numbers of the layers that names match in, and the
                         name of the list of these layers where a path has several.
    rank_pattern, alpha_pattern   {ends of paths, as regular expressions: r or lora_alpha}.
    bias                 "all" trains every bias of the model, "lora_only" those of adapted linears.
    modules_to_save      names of modules that are trained whole; nothing in them is adapted.
    init_lora_weights    True, False (the update is not zero at step 0) or "gaussian"; "pissa",
                         "pissa_niter_N" or "olora": A and B are taken out of the weight, which is
                         not written: their first values are kept beside them, in files too.
    use_dora             a trained magnitude of every output, of the base and the update together.
    trainable_token_indices   numbers of tokens whose rows of the input embeddings are trained, or
                         {names of embeddings: numbers}; a tied head reads the same rows.
    recompute_mlp        an MLP that runs in one call keeps its input alone for backward, and forms
                         the outputs of gate and up again.
    frozen_norms         how the frozen norms in front of adapted linears run: "module", as they
                         stand; "fused", keeping their input and a number or two of each row; or
                         "folded": the linears that read a norm's output keep its input too, in
                         place of the output, which backward forms again.
    parts                of a vision-language model, which are searched: "language" (its decoder),
                         "vision" (its tower) and "projector", all that is in neither. Without it
                         the decoder alone; all three where PEFT's own config is given.
    adapter_dtype        as in PetalConfig.
    """

    method: ClassVar[str] = "lora"
    elsewhere: ClassVar[dict[str, str]] = dict.fromkeys(
        (*SAYS_NOTHING, "inference_mode"),
        "a field of peft.LoraConfig that says nothing here: leave it out",
    )
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    init_lora_weights: bool | str = True
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    recompute_mlp: bool = False
    frozen_norms: str = "module"
    parts: tuple[str, ...] = ("language",)

    def __post_init__(self) -> None:
        super().__post_init__()
        want(self.variant == "paper", "variant", "'paper', LoRA has no other", self.variant)
        want(is_finite(self.lora_alpha), "lora_alpha", "a finite number", self.lora_alpha)
        ok = is_number(self.lora_dropout) and 0.0 <= self.lora_dropout < 1.0
        want(ok, "lora_dropout", "a number with 0 <= lora_dropout < 1", self.lora_dropout)
        if isinstance(self.exclude_modules, str):
            check_pattern("exclude_modules", self.exclude_modules)
        else:
            self.exclude_modules = names("exclude_modules", self.exclude_modules)
        self._check_layers()
        self.rank_pattern = _patterns("rank_pattern", self.rank_pattern, _is_rank, "integers >= 1")
        self.alpha_pattern = _patterns("alpha_pattern", self.alpha_pattern, is_finite, "numbers")
        for name in ("use_rslora", "use_dora", "recompute_mlp"):
            want(isinstance(getattr(self, name), bool), name, "a bool", getattr(self, name))
        self.trainable_token_indices = _tokens(self.trainable_token_indices)
        one_of("bias", self.bias, BIASES)
        one_of("frozen_norms", self.frozen_norms, NORMS)
        check_init("init_lora_weights", self.init_lora_weights)
        ok = isinstance(self.parts, (list, tuple, set, frozenset)) and len(self.parts) > 0
        ok = ok and all(isinstance(part, str) and part in PARTS for part in self.parts)
        ok = ok and len(set(self.parts)) == len(self.parts)
        want(ok, "parts", f"a non-empty list of names among {PARTS}, each once", self.parts)
        self.parts = tuple(part for part in PARTS if part in self.parts)
        ok = self.target_modules is not None or self.parts == PARTS[:1]
        want(ok, "parts", f"{PARTS[:1]} where target_modules is None", self.parts)

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if isinstance(layers, (list, tuple, set, frozenset)):
            layers = self.layers_to_transform = [plain(layer) for layer in layers]
        ok = layers is None or is_size(layers, 0)
        if isinstance(layers, list):
            ok = len(layers) > 0 and all(is_size(layer, 0) for layer in layers)
        want(ok, "layers_to_transform", "None, a layer's number or a list of them", layers)
        if isinstance(self.layers_pattern, str):
            check_pattern("layers_pattern", self.layers_pattern)
        else:
            self.layers_pattern = names("layers_pattern", self.layers_pattern)
            for pattern in self.layers_pattern or ():
                check_pattern("layers_pattern", pattern)
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                value = getattr(self, name)
                want(value is None, name, "None where target_modules is one string", value)
        elif layers is None:
            name = "layers_pattern"
            want(
                self.layers_pattern is None,
                name,
                "None without layers_to_transform",
                self.layers_pattern,
            )

    @property
    def is_all_linear(self) -> bool:
        """Whether target_modules means all linears."""
        wanted = self.target_modules
        return isinstance(wanted, str) and wanted.lower() == ALL_LINEAR


def _tokens(value: Any) -> list[int] | dict[str, list[int]] | None:
    """Numbers of tokens, or a dictionary of them."""
    if value is None:
        return None
    if not isinstance(value, dict):
        return _numbers(value, value)
    ok = bool(value) and all(isinstance(key, str) for key in value)
    want(ok, "trainable_token_indices", _TOKENS, value)
    return {str(key): _numbers(tokens, value) for key, tokens in value.items()}


_TOKENS = "None, a non-empty list of tokens >= 0, each once, or a dict of names and such lists"


def _numbers(tokens: Any, value: object) -> list[int]:
    ok = isinstance(tokens, (list, tuple, set, frozenset)) and len(tokens) > 0
    own = [plain(token) for token in tokens] if ok else []
    ok = ok and all(is_size(token, 0) for token in own) and len(set(own)) == len(own)
    want(ok, "trainable_token_indices", _TOKENS, value)
    return sorted(own) if isinstance(tokens, (set, frozenset)) else own


def _is_rank(value: object) -> bool:
    return is_size(value, 1)


def _patterns(name: str, value: Any, fits: Any, kind: str) -> dict[str, Any]:
    """A dictionary of regular expressions, for ends of paths."""
    ok = isinstance(value, dict) and all(isinstance(key, str) for key in value)
    want(ok, name, f"a dict of names and {kind}", value)
    found = {str(key): plain(each) for key, each in value.items()}
    want(all(fits(each) for each in found.values()), name, f"a dict of names and {kind}", value)
    for key in found:
        check_pattern(name, key)
    return found
