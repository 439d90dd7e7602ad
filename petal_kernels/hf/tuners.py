"""This package's methods as tuners of PEFT's: `peft.get_peft_model(model, RoutingConfig(...))`.

A tuner is a face of an `Attachment`, which does everything: PEFT's model is one to whatever takes a
PeftModel (Trainer, TRL), and `petal_kernels.attachment(peft_model)` is the handle behind it. Files
are PEFT's two, with the adapter's tensors below `base_model.model.petal.`; who loads one imports
this module first, for PEFT knows no method that was not registered in its process.

PEFT has no door for methods from outside: registering adds members to its enum `PeftType`, by what
Python's enum keeps of them (3.11 to 3.13). Source: PEFT 0.21 (`peft.tuners.tuners_utils`,
`peft.peft_model`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from typing import Any, ClassVar

import peft
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType
from torch import Tensor, nn

from petal_kernels._runtime.keywords import check
from petal_kernels.hf import config as own
from petal_kernels.hf.adapter_config import AdapterConfig
from petal_kernels.hf.attach import attach
from petal_kernels.hf.merging import ALL, NAME

_FRONT = f"base_model.model.{NAME}."
# PEFT wraps the heads of the other tasks itself, beside what `modules_to_save` trains here.
_TASKS = (None, "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")


class _Face(peft.PeftConfig):
    """What the configs share; their fields are those of the config that each stands for."""

    own: ClassVar[type[AdapterConfig]]

    def __new__(cls, *_: Any, **values: Any) -> _Face:
        check(cls.__init__, values, f"{cls.__name__}: got an unknown field")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PeftType(type_name(self.own))
        if self.task_type not in _TASKS:
            raise ValueError(
                f"task_type: want one of {_TASKS}, got {str(self.task_type)!r}, whose head PEFT "
                "wraps itself; name the head in modules_to_save"
            )
        made = self.config()
        for field in dataclasses.fields(made):  # as they were checked, and made plain
            setattr(self, field.name, getattr(made, field.name))

    def config(self) -> AdapterConfig:
        """What `attach` takes."""
        names = [field.name for field in dataclasses.fields(self.own)]
        return self.own(**{name: getattr(self, name) for name in names})


def type_name(config: type[AdapterConfig]) -> str:
    """The method's name among PEFT's types."""
    return f"petal_kernels_{config.method}".upper()


class Layer(nn.Module, BaseTunerLayer):
    """What PEFT asks of a tuner's layers: one, without parameters, that speaks for all."""

    tuner: PetalTuner
    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()

    def __init__(self, tuner: PetalTuner) -> None:
        super().__init__()
        self.__dict__["tuner"] = tuner  # no child: it is the parent

    @property
    def active_adapter(self) -> list[str]:
        return self.tuner.active_adapters

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        return self.tuner.active_adapters if self.tuner.attachment._merged is not None else []

    @property
    def _disable_adapters(self) -> bool:  # type: ignore[override]
        return self.tuner.is_off

    def _get_available_adapters(self) -> set[str]:
        return set(self.tuner.attachment.names)

    def get_base_layer(self) -> nn.Module:
        base: nn.Module = self.tuner.model
        return base


class PetalTuner(BaseTuner):
    """An `Attachment` as PeftModel knows tuners: its `base_model`."""

    tuner_layer_cls = Layer
    peft_config: dict[str, Any]

    def __init__(
        self,
        model: nn.Module,
        peft_config: dict[str, Any],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: Any = None,
    ) -> None:
        nn.Module.__init__(self)
        wanted = peft_config[adapter_name]
        self.attachment = attach(model, wanted.config(), name=adapter_name)
        self.peft_config = peft_config
        self.targeted_module_names = [place.path for place in self.attachment.found.places]
        self.targeted_parameter_names: list[str] = []
        self._off: contextlib.AbstractContextManager[None] | None = None
        self._trained: dict[str, list[nn.Parameter]] = {}
        self.prefix = PEFT_TYPE_TO_PREFIX_MAPPING[wanted.peft_type]
        self.model = model
        self.layer = Layer(self)
        self._added(adapter_name)

    def _added(self, name: str) -> None:
        adapter = self.attachment._known(name).adapter
        meta = any(p.is_meta for p in adapter.parameters())
        if meta and not all(p.is_meta for p in self.model.parameters()):
            raise ValueError("low_cpu_mem_usage: want False, got True")
        self._trained[name] = [p for p in adapter.parameters() if p.requires_grad]
        if self.peft_config[name].inference_mode:
            self.set_requires_grad(name, False)

    # -- adapters ---------------------------------------------------------------------------------

    @property
    def active_adapters(self) -> list[str]:
        return [self.attachment.active]

    @property
    def is_off(self) -> bool:
        """Whether `disable_adapter_layers` was called last."""
        return self._off is not None

    def inject_adapter(self, model: nn.Module, adapter_name: str, *_: Any, **options: Any) -> None:
        """Another adapter, of the config that is there by its name."""
        self.attachment.add(adapter_name, self.peft_config[adapter_name].config())
        try:
            self._added(adapter_name)
        except BaseException:
            self.attachment.remove(adapter_name)
            raise

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes one adapter the active one, for every thread."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) != 1:
            raise ValueError(f"adapter_name: want one adapter at a time, got {names}")
        self.attachment.switch(names[0])
        self.set_requires_grad(names, not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forgets an adapter; of the active one the first that is left takes its place."""
        others = [name for name in self.attachment.names if name != adapter_name]
        if not others:
            raise ValueError(
                f"adapter_name: want one of several, got {adapter_name!r} alone; unload() gives "
                "the model back"
            )
        if adapter_name == self.attachment.active:
            warnings.warn(f"{adapter_name} was active; {others[0]} is now", stacklevel=3)
            self.set_adapter(others[0])
        self.attachment.remove(adapter_name)
        del self.peft_config[adapter_name], self._trained[adapter_name]

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """Whether adapters are trained."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            for parameter in self._trained[name]:
                parameter.requires_grad_(requires_grad)

    def disable_adapter_layers(self) -> None:
        """Off for what this thread or task calls, until `enable_adapter_layers`."""
        if self._off is None:
            self._off = self.attachment.disabled()
            self._off.__enter__()

    def enable_adapter_layers(self) -> None:
        """On again."""
        if self._off is not None:
            off, self._off = self._off, None
            off.__exit__(None, None, None)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """The config says which dtype an adapter has."""

    # -- merging ----------------------------------------------------------------------------------

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Folds what weights can hold of the active adapter; the rest stays."""
        self._need_active(adapter_names)
        self.attachment.merge()

    def unmerge_adapter(self) -> None:
        self.attachment.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """The plain model, every update in its weights; ValueError where a part is no update."""
        self._need_active(adapter_names)
        return self.attachment.merge_and_unload()

    def unload(self) -> nn.Module:
        """The model as it came."""
        return self.attachment.detach()

    def _need_active(self, names: list[str] | None) -> None:
        if names is not None and list(names) != self.active_adapters:
            raise ValueError(f"adapter_names: want None or {self.active_adapters}, got {names}")

    # -- files ------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """All of the adapter, active or not; in place of the active one's tensors those of
        `state_dict`, which an engine has gathered."""
        attachment = _tuner(model).attachment
        with attachment._as(adapter_name):
            names = attachment.adapter.state_dict(prefix=ALL)
            found = attachment.state_dict()
            if adapter_name == _tuner(model).active_adapters[0]:
                for name in names:
                    name = name.removeprefix(ALL)
                    given = state_dict.get(_FRONT + name)
                    if given is not None:
                        found[attachment._stored(name)] = given
        return {_FRONT + name: value for name, value in found.items()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key  # it is in none

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Loads here, into whichever adapter, and leaves nothing to PEFT, which would overlook what
        is missing: ValueError on any missing, unexpected or mis-shaped tensor."""
        attachment = _tuner(model).attachment
        with attachment._as(adapter_name):
            attachment.load_state_dict(
                {name.removeprefix(_FRONT): value for name, value in state_dict.items()}
            )
        return {}

    # -- what PEFT asks of those that it injects itself -------------------------------------------

    def _create_and_replace(self, *args: Any, **options: Any) -> None:
        raise NotImplementedError("attach puts adapters into the model")


def _tuner(model: Any) -> PetalTuner:
    tuner: PetalTuner = getattr(model, "_orig_mod", model).base_model
    return tuner


def _add_type(name: str) -> None:
    """A member of PEFT's enum of methods."""
    if name in PeftType.__members__:
        return
    member: Any = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)


def _register(config: type[AdapterConfig]) -> Any:
    """A config of PEFT's with the fields of one of ours, and its method, known to PEFT."""
    name = type_name(config)
    fields = []
    for each in dataclasses.fields(config):
        if each.default_factory is not dataclasses.MISSING:
            default: Any = dataclasses.field(default_factory=each.default_factory)
        else:
            default = dataclasses.field(default=each.default)
        fields.append((each.name, each.type, default))
    words = f"{config.__name__} for peft.get_peft_model, with PEFT's own fields beside it.\n\n"
    space = {"own": config, "__module__": __name__, "__doc__": words + (config.__doc__ or "")}
    made = dataclasses.make_dataclass(config.__name__, fields, bases=(_Face,), namespace=space)
    made.__module__ = __name__
    _add_type(name)
    if PeftType(name) not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=name.lower(), config_cls=made, model_cls=PetalTuner)
    return made


AuroraConfig = _register(own.AuroraConfig)
CompacterConfig = _register(own.CompacterConfig)
ExpertConfig = _register(own.ExpertConfig)
PetalConfig = _register(own.PetalConfig)
RoutingConfig = _register(own.RoutingConfig)
VLAdapterConfig = _register(own.VLAdapterConfig)
VLPetConfig = _register(own.VLPetConfig)
