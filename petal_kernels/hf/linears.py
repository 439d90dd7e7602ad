"""Finding the linears that LoRA adapts, by PEFT's names, in any model, and the part each is in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from petal_kernels._runtime.keywords import closest
from petal_kernels.hf.lora_config import PARTS, LoraConfig
from petal_kernels.hf.whole import extra_modules
from petal_kernels.nn.routed_lora import linear_features

# The sub-configs of a model that sees, by the part that they describe.
_CONFIGS = {
    "language": ("text_config", "language_config", "llm_config"),
    "vision": ("vision_config",),
}
# Torch's modules that read a child's weight and do not call it, always or in evaluation.
_READERS: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (nn.MultiheadAttention, ("out_proj",)),
    (nn.TransformerEncoderLayer, ("linear1", "linear2")),
)


@dataclass
class Seen:
    """A module of the model, and the part that it is in."""

    path: str
    module: nn.Module
    part: str
    parent: nn.Module
    saved: bool = False  # it is trained whole, or inside of what is

    @property
    def name(self) -> str:
        """Its name in its parent."""
        return self.path.rpartition(".")[2]

    @property
    def why_not(self) -> str:
        """Why it cannot be adapted; empty where it can."""
        if not is_linear(self.module):
            return "it is no linear"
        if self.saved:
            return "modules_to_save trains it whole"
        return self.read_by

    @property
    def read_by(self) -> str:
        """The module that reads its weight without calling it, in words; empty where none does."""
        for reader, names in _READERS:
            if isinstance(self.parent, reader) and self.name in names:
                return f"torch's {reader.__name__} reads its weight and does not call it"
        if self.name == "lm_head" and _code_of(self.parent).startswith("liger_kernel."):
            return (
                "Liger's forward reads its weight and does not call it; apply Liger with "
                "fused_linear_cross_entropy=False"
            )
        return ""

    def __str__(self) -> str:
        return f"{self.path}, a {type(self.module).__name__}"


def _code_of(module: nn.Module) -> str:
    """The Python module in which the forward was written that runs it."""
    forward = module.__dict__.get("forward", getattr(type(module), "forward", None))
    return getattr(forward, "__module__", None) or ""


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear, transformers' Conv1D, or called like one, as quantised ones are."""
    if isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd)):
        return False
    try:
        sizes = linear_features(module)
    except ValueError:
        return False
    return min(sizes) > 0 and all(p.dim() < 3 for p in module._parameters.values() if p is not None)


def walk(model: nn.Module) -> Iterator[Seen]:
    """Every module below `model`, once, with its part: that of the nearest module around it whose
    config is the model's for its decoder or its tower. What is in neither is "projector"; of a
    model without a tower all is "language"."""
    seen = {id(model)}
    heads = {id(head) for head in output_heads(model)}

    def inside(parent: nn.Module, path: str, part: str, known: _Known) -> Iterator[Seen]:
        for name, child in parent._modules.items():
            if child is None or id(child) in seen:
                continue
            seen.add(id(child))
            own, more = _part_of(child, part, known)
            shown = "language" if id(child) in heads and own == "projector" else own
            where = f"{path}.{name}" if path else name
            yield Seen(where, child, shown, parent)
            yield from inside(child, where, own, more)

    yield from inside(model, "", *_part_of(model, "language", ()))


_Known = Sequence[tuple[Any, str]]  # sub-configs and their parts


def _part_of(module: nn.Module, part: str, known: _Known) -> tuple[str, _Known]:
    config = getattr(module, "config", None)
    if config is None:
        return part, known
    for each, name in known:
        if each is config:
            return name, known
    own = [
        (each, name)
        for name, keys in _CONFIGS.items()
        for each in (getattr(config, key, None) for key in keys)
        if each is not None
    ]
    if any(name == "vision" for _, name in own):
        return "projector", own
    kind = getattr(config, "model_type", None)
    for each, name in known:  # a copy of it
        if kind is not None and getattr(each, "model_type", None) == kind:
            return name, known
    return part, known


def output_heads(model: nn.Module) -> list[nn.Module]:
    """The output embeddings of the model and of the models in it."""
    found = []
    for module in model.modules():
        try:
            head = module.get_output_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(head, nn.Module):
            found.append(head)
    return found


def embeddings_of(model: nn.Module) -> dict[int, str]:
    """The paths of the embeddings by their weight: a linear of the same weight is tied to them."""
    return {
        id(module._parameters.get("weight")): path
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }


def _is_router(seen: Seen) -> bool:
    """A linear that chooses experts."""
    above = seen.path.split(".")[-2:]
    if any("router" in name.lower() for name in above):
        return True
    beside = any("expert" in name.lower() for name in seen.parent._modules)
    return seen.name == "gate" and beside


# -- names ----------------------------------------------------------------------------------------


def is_named(path: str, names: Sequence[str] | str) -> bool:
    """Whether one expression matches all of a path, or one of the names its end."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def above(path: str) -> list[str]:
    """The paths of the modules around one, from the outermost."""
    names = path.split(".")
    return [".".join(names[:count]) for count in range(1, len(names))]


def ends_like(name: str, found: Sequence[Seen]) -> list[str]:
    """The ends of the paths that have as many names as `name` has."""
    count = name.count(".") + 1
    return list(dict.fromkeys(".".join(seen.path.split(".")[-count:]) for seen in found))


def in_layers(path: str, config: LoraConfig) -> bool:
    """Whether `layers_to_transform` has the path's layer. As in PEFT the number stands behind a
    name, `layers_pattern` or any, that has something before it."""
    wanted, patterns = config.layers_to_transform, config.layers_pattern
    if wanted is None or path in (config.target_modules or ()):
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns or ["[^.]*"]
    found = (re.match(rf".*\.{pattern}\.(\d+)\.", path) for pattern in patterns)
    number = next((int(match[1]) for match in found if match), None)
    return number is not None and number in ([wanted] if isinstance(wanted, int) else wanted)


def of_pattern(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a path."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


# -- choosing -------------------------------------------------------------------------------------


class Chosen:
    """The linears that a config names in a model, and what is left though a user may think
    otherwise."""

    def __init__(self, model: nn.Module, config: LoraConfig, table: Sequence[str] | None) -> None:
        """`table`: the paths that are meant where `target_modules` is None."""
        self.model, self.config = model, config
        self.notes: list[str] = []
        self.outside: list[str] = []  # what `parts` leaves out, in words
        self.every = list(walk(model))
        whole = extra_modules(model, config.modules_to_save, ()).values()
        saved = {id(child) for module in whole for child in module.modules()}
        for seen in self.every:
            seen.saved = id(seen.module) in saved
        if config.is_all_linear:
            found = self._all()
        elif table is not None:
            found = [s for s in self.every if s.path in table and not s.why_not]
        else:
            found = self._named()
        self.linears = self._kept(found)
        self._note_tied()

    def _all(self) -> list[Seen]:
        """Every linear but heads, tied ones and routers."""
        heads = {id(head) for head in output_heads(self.model)}
        tied = embeddings_of(self.model)
        found: list[Seen] = []
        read: list[Seen] = []
        for seen in self._linears():
            if id(seen.module) in heads or seen.saved or _is_router(seen):
                continue
            if id(seen.module._parameters.get("weight", seen)) in tied:
                continue
            (read if seen.read_by else found).append(seen)
        read = self._parts(read)
        if read:
            self.notes.append(
                f"left as they are: {len(read)} linears, {read[0]} first: {read[0].read_by}"
            )
        self._note_outside(found)
        return self._parts(found)

    def _linears(self) -> Iterator[Seen]:
        """The linears that are in no other."""
        around = ""
        for seen in self.every:
            if is_linear(seen.module) and not (around and seen.path.startswith(around)):
                around = f"{seen.path}."
                yield seen

    def _parts(self, found: list[Seen]) -> list[Seen]:
        return [seen for seen in found if seen.part in self.config.parts]

    def _named(self) -> list[Seen]:
        """What the names, or the one expression, match; an error for each that matches nothing
        that can be adapted."""
        wanted = self.config.target_modules
        groups: list[list[str] | str] = [[n] for n in wanted or ()]
        if isinstance(wanted, str):
            groups = [wanted]
        hits = [[s for s in self.every if is_named(s.path, group)] for group in groups]
        missing = [group for group, hit in zip(groups, hits, strict=True) if not hit]
        if missing:
            names = missing[0] if isinstance(wanted, str) else [g[0] for g in missing]
            raise ValueError(
                f"target_modules: {names} match nothing; want names of linears{self._meant(names)}"
            )
        chosen = {id(s): s for hit in hits for s in self._adaptable(hit)}
        return [seen for seen in self.every if id(seen) in chosen]

    def _meant(self, names: list[str] | str) -> str:
        """What names that match nothing may mean: linears in `parts` first."""
        every = [seen for seen in self._linears() if not seen.why_not]
        inside = self._parts(every)
        some = [seen.path for seen in inside or every][:2]
        where = "" if len(inside) == len(every) else f" in parts={self.config.parts}"
        said = f"{where}, or ends of their paths, such as {some}"
        if isinstance(names, str):
            meant = [name.strip() for name in names.split(",")]
            if all(any(is_named(seen.path, [name]) for seen in every) for name in meant):
                said += f"; a string is one expression for whole paths: want a list, {meant}"
            return said
        for name in names:
            near = closest(name, ends_like(name, inside))
            if near:
                said += f"; did you mean {near!r}?"
                continue
            near = closest(name, ends_like(name, every))
            if near:
                other = next(seen for seen in every if is_named(seen.path, [near]))
                said += f"; {near!r} is in {self._with(other.part)}"
        return said

    def _with(self, part: str) -> str:
        """A part that is left out, and the option that has it."""
        wanted = tuple(each for each in PARTS if each in (*self.config.parts, part))
        return f"the part {part!r}: want it in parts, as in parts={wanted}"

    def _adaptable(self, hit: list[Seen]) -> list[Seen]:
        """Of what one name matches, what is adapted; ValueError where it is nothing."""
        linears = [seen for seen in hit if not seen.why_not]
        if not linears:
            raise ValueError(
                f"target_modules: want linears, got {hit[0]}, which LoRA does not adapt "
                f"({hit[0].why_not})"
            )
        found = self._parts(linears)
        if not found:
            raise ValueError(
                f"target_modules: {linears[0]} is in {self._with(linears[0].part)}, got "
                f"{self.config.parts}"
            )
        beside = [s for s in linears if s not in found]
        others = [s for s in hit if s.why_not and (s.saved or s.module._parameters)]
        for left, why in ((beside, f"parts={self.config.parts}"), (others, "")):
            if left:
                self.notes.append(
                    f"named by target_modules and not adapted ({why or left[0].why_not}): "
                    f"{len(left)} modules, {left[0]} first"
                )
        return found

    def _kept(self, found: list[Seen]) -> list[Seen]:
        """Without what `exclude_modules` and `layers_to_transform` leave out."""
        config, without = self.config, self.config.exclude_modules
        kept = [seen for seen in found if not (without and is_named(seen.path, without))]
        if without and len(kept) == len(found):
            self.notes.append(f"exclude_modules={without!r} leaves out nothing")
        self._note_patterns(found)
        kept = [seen for seen in kept if in_layers(seen.path, config)]
        if not kept:
            left = f"none is left of {len(found)}" if found else f"got none in {self._what()}"
            raise ValueError(
                f"model: want linears that LoRA can adapt (target_modules="
                f"{config.target_modules!r}, exclude_modules={without!r}, layers_to_transform="
                f"{config.layers_to_transform!r}, parts={config.parts}), {left}"
            )
        return kept

    def _note_patterns(self, found: list[Seen]) -> None:
        """Patterns that no linear's path ends with: what they ask for is nowhere."""
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self.config, name):
                if not any(of_pattern({pattern: True}, seen.path, False) for seen in found):
                    self.notes.append(f"{name}: {pattern!r} matches no linear that is adapted")

    def _what(self) -> str:
        return f"the {len(self.every)} modules of a {type(self.model).__name__}"

    def _note_outside(self, found: list[Seen]) -> None:
        """A line for each module all of whose linears are in parts that are left out."""
        shared = {path for seen in self._parts(found) for path in above(seen.path)}
        layers = {seen.path for seen in self.every if isinstance(seen.parent, nn.ModuleList)}
        left: dict[str, list[str]] = {}
        for seen in found:
            if seen.part not in self.config.parts:
                paths = [*above(seen.path), seen.path]
                root = next(path for path in paths if path not in shared)
                left.setdefault(root, []).append(seen.path)
        for root, paths in left.items():
            held = [next((p for p in above(path) if p in layers), "") for path in paths]
            count = len(set(filter(None, held)))
            where = f" in {count} layer{'s'[: count - 1]}" if count else ""
            self.outside.append(
                f"{root}: left out by parts={self.config.parts}, {len(paths)} linears{where}"
            )

    def _note_tied(self) -> None:
        tied = embeddings_of(self.model)
        for seen in self.linears:
            other = tied.get(id(seen.module._parameters.get("weight", seen)))
            if other is not None:
                self.notes.append(
                    f"{seen.path} has the weight of {other}: the update is its own, and merging "
                    "unties the two"
                )
