"""Calls of the model layer and of the profiler that are right: configs, attach and what it gives,
backends, memory."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import torch
from torch import nn

import petal_kernels as pk
from petal_kernels.hf.config import METHODS
from petal_kernels.memory.profile import Profile
from tests.hf import fused, released, tiny_blip, tiny_text
from tests.hf.test_hub import Hub
from tests.hf.tiny_vlms import VLMS
from tests.malformed.corruptions import Case

EXPERTS = 3
RELEASED = released.CASES["routing-roberta"]

# What is right although a field was changed.
# A path without a folder is a FileNotFoundError (test_files), a batch is the model's to judge.
ELSEWHERE = {
    "load": ("directory: string",),
    "load_checkpoint": ("path: string",),
    "attach": ("config: string", "checkpoint: string"),
    "add": ("config: string", "checkpoint: string"),
    "memory": ("batch: *",),
}
_CONFIG = ("*: one", "scale: negative", "alpha: *", "target_modules: string", "keep: *")
_ROWS = ("features: half", "features: rank-1", "features: size+1@-[23]")
LEGAL: dict[str, tuple[str, ...]] = {
    "report": ("tokens: first zero",),  # a call without rows
    "PetalConfig": ("use_cross_residual: bool", "experts: zero", "mix: negative"),
    "VLPetConfig": ("value_r: zero", "value_scale: negative"),
    "LoraConfig": ("lora_alpha: *", "exclude_modules: string", "*_pattern: dict"),
    "save": ("directory: string",),
    "save_all": ("directory: string",),
    "add": ("name: string",),
    "combine": ("name: string",),
    "vision": _ROWS,
    "context": _ROWS,
    "domains": ("domain: rank-1", "domain: size*", "generated: zero", "image: zero"),
    "image_domains": ("input_ids: size*", "text: zero", "image: zero"),
    "push_to_hub": ("token: string", "token: bool", "private: bool", "commit_message: string"),
    "save_merged": ("directory: string", "surplus: unknown"),  # options are the model's to judge
}
MORE: dict[str, dict[str, Any]] = {
    "dropout": {"above 1": 1.5},
    "lora_dropout": {"above 1": 1.5},
    "layers_to_transform": {"of strings": ["1"], "empty": [], "negative": [-1]},
    "exclude_modules": {"no expression": "(", "empty": [], "of ints": [1]},
    "rank_pattern": {"of zeros": {"q_proj": 0}, "no expression": {"(": 4}, "of ints": {1: 4}},
    "alpha_pattern": {"of strings": {"q_proj": "4"}, "no expression": {"(": 4}},
    "init_lora_weights": {"not supported": "eva", "no number": "pissa_niter_"},
    "trainable_token_indices": {
        "negative": [-1],
        "twice": [1, 1],
        "empty": [],
        "of strings": ["1"],
        "no names": {1: [2]},
        "no lists": {"wte": 3},
    },
    "parts": {"twice": ["vision", "vision"], "unknown": ["audio"]},
    "target_modules": {"no expression": "(", "empty": [], "of ints": [1]},
    "modules_to_save": {"empty": [], "of ints": [1], "string": "head"},
    "top_k": {"beyond": 99, "zero": 0},
    "directory": {"empty": "", "null": "a\0b", "bytes": b"adapter"},
    "path": {"empty": "", "null": "a\0b", "bytes": b"c.pth"},
    "checkpoint": {"empty": "", "null": "a\0b", "bytes": b"c.pth"},
    "repo": {"no owner": "adapter", "deeper": "a/b/c", "a folder": "./a", "an end": "a/b\n"},
    "commit_message": {"bytes": b"x"},
    "token": {"bytes": b"x"},
    "at_most": {"negative": -1},
    "state": {"of lists": {"a": [1.0]}, "empty": {}},
    "parameters": {"of floats": [1.0]},
    "values": {"unknown": {"rank": 4}, "of ints": {1: 2}},
    "domain": {"beyond": torch.full((2, 9), EXPERTS), "below": torch.full((2, 9), -1)},
}


def entered(manager: Callable[..., Any]) -> Callable[..., None]:
    """A context manager entered and left."""

    @functools.wraps(manager)
    def enter(**arguments: Any) -> None:
        with manager(**arguments):
            pass

    return enter


def undone(make: Callable[..., None]) -> Callable[..., None]:
    """An adapter beside the others, made and forgotten."""

    @functools.wraps(make)
    def made(**arguments: Any) -> None:
        make(**arguments)
        make.__self__.remove(arguments["name"])  # type: ignore[attr-defined]

    return made


def removing(attachment: Any) -> Callable[..., None]:
    """The removal of an adapter that is there."""

    @functools.wraps(attachment.remove)
    def remove(**arguments: Any) -> None:
        with torch.random.fork_rng():
            attachment.add("b", pk.LoraConfig(r=2))
        try:
            attachment.remove(**arguments)
        finally:
            if "b" in attachment.names:
                attachment.remove("b")

    return remove


def pushed(push: Callable[..., str]) -> Callable[..., None]:
    """An upload to a folder: nothing reaches a network."""

    @functools.wraps(push)
    def upload(**arguments: Any) -> None:
        with (
            tempfile.TemporaryDirectory() as root,
            mock.patch.object(huggingface_hub, "HfApi", Hub(Path(root)).api),
        ):
            push(**arguments)

    return upload


@functools.cache
def model(family: str = "bart") -> nn.Module:
    if family in tiny_blip.TASKS:
        return tiny_blip.build(family, torch.float32)
    return tiny_text.build(family, torch.float32)


@functools.cache
def attached(method: str) -> Any:
    if method == "aurora":
        built = tiny_blip.build("retrieval", torch.float32)
        return pk.attach(built, pk.AuroraConfig(r=3, context="batch"))
    if method == "image":
        built = VLMS["qwen3-vl"].build()
        return pk.attach(built, pk.ExpertConfig(r=2, experts=EXPERTS, gate="domain"))
    if method == "released":
        return pk.attach(RELEASED.model(), RELEASED.config())
    built = tiny_text.build("llama", torch.float32)
    if method == "experts":
        return pk.attach(built, pk.ExpertConfig(r=2, experts=EXPERTS, gate="domain"))
    if method == "lora":
        return pk.attach(built, pk.LoraConfig(r=2))
    return pk.attach(built, pk.RoutingConfig(r=2, function="add"))


@functools.cache
def routed() -> Any:
    """An attachment with a router, after a forward."""
    built = tiny_text.build("llama", torch.float32)
    attachment = pk.attach(built, pk.ExpertConfig(r=2, experts=EXPERTS))
    built(**tiny_text.batch("llama"))
    return attachment


@functools.cache
def folder() -> Path:
    path = Path(tempfile.mkdtemp()) / "adapter"
    attached("routing").save(path)
    return path


@functools.cache
def checkpoint() -> Path:
    path = Path(tempfile.mkdtemp()) / "c.pth"
    torch.save(RELEASED.tensors(), path)
    return path


@functools.cache
def released_on() -> dict[str, Any]:
    return {"model": RELEASED.model(), "config": RELEASED.config()}


@functools.cache
def peft_block() -> nn.Module:
    block: nn.Module = fused.block(torch.float32)
    return block


@functools.cache
def profiled() -> Profile:
    return pk.memory.profile(nn.Linear(3, 2), torch.ones(2, 3))


def features(width: int) -> torch.Tensor:
    return torch.ones(2, 4, width)


def _case(
    name: str, call: Callable[..., Any], valid: Callable[[], dict[str, Any]], **more: Any
) -> Case:
    given: dict[str, Any] = {"name": name, "call": call, "valid": valid, "more": MORE}
    return Case(**given | more)


def _configs() -> list[Case]:
    found = []
    for cls in METHODS.values():
        legal = (*_CONFIG, *LEGAL.get(cls.__name__, ()))
        found.append(_case(cls.__name__, cls, dict, legal=legal))
        found.append(_case(f"{cls.__name__}.from_dict", cls.from_dict, lambda: {"values": {}}))
    return found


def _several(attachment: Any) -> list[tuple[str, Callable[..., Any], Callable[[], Any], str]]:
    """Calls of adapters by name."""
    second = {"name": "b", "config": pk.LoraConfig(r=2)}
    half = {"name": "b", "weights": {"default": 0.5}}
    return [
        ("add", undone(attachment.add), lambda: dict(second), "lora"),
        ("switch", attachment.switch, lambda: {"name": "default"}, "lora"),
        ("remove", removing(attachment), lambda: {"name": "b"}, "lora"),
        ("combine", undone(attachment.combine), lambda: dict(half), "lora"),
        ("save_all", attachment.save_all, lambda: {"directory": folder()}, "lora"),
        ("check_ranks", attachment.check_ranks, dict, "lora"),
    ]


def _attachments() -> list[Case]:
    methods = ("routing", "aurora", "experts", "image", "lora", "released")
    of = {name: attached(name) for name in methods}
    state = {name: value.clone() for name, value in of["routing"].state_dict().items()}
    width = tiny_text.WIDTH
    domain = torch.ones(2, 9, dtype=torch.int64)
    calls: list[tuple[str, Callable[..., Any], Callable[[], dict[str, Any]], str]] = [
        ("save", of["routing"].save, lambda: {"directory": folder()}, "routing"),
        ("load", of["routing"].load, lambda: {"directory": folder()}, "routing"),
        ("load_state_dict", of["routing"].load_state_dict, lambda: {"state": state}, "routing"),
        ("report", of["routing"].report, lambda: {"tokens": (2, 4)}, "routing"),
        ("vision", entered(of["routing"].vision), lambda: {"features": features(width)}, "routing"),
        (
            "context",
            entered(of["aurora"].context),
            lambda: {"features": features(tiny_blip.WIDTH)},
            "aurora",
        ),
        (
            "domains",
            entered(of["experts"].domains),
            lambda: {"domain": domain, "generated": 2, "image": 1},
            "experts",
        ),
        (
            "image_domains",
            entered(of["image"].image_domains),
            lambda: {"input_ids": domain, "image": 2},
            "image",
        ),
        (
            "load_checkpoint",
            of["released"].load_checkpoint,
            lambda: {"path": checkpoint()},
            "released",
        ),
        ("push_to_hub", pushed(of["lora"].push_to_hub), lambda: {"repo": "me/adapter"}, "lora"),
        (
            "save_merged",
            of["lora"].save_merged,
            lambda: {"directory": folder().with_name("merged")},
            "lora",
        ),
        *_several(of["lora"]),
    ]
    found = []
    for name, call, valid, method in calls:
        watched = (lambda m: lambda: attached(m).model)(method)
        more = {"legal": LEGAL.get(name, ()), "elsewhere": ELSEWHERE.get(name, ())}
        names = ("state_dict",)
        found.append(_case(f"Attachment.{name}", call, valid, names=names, watched=watched, **more))
    legal = ("*: one", "*: negative")
    loss = routed().auxiliary_loss
    return [*found, _case("Attachment.auxiliary_loss", loss, dict, legal=legal)]


def _memory() -> list[Case]:
    def valid() -> dict[str, Any]:
        return {"model": nn.Linear(3, 2), "batch": torch.ones(2, 3)}

    memory, profile = pk.memory, profiled()
    elsewhere = ELSEWHERE["memory"]
    return [
        _case(
            "memory.profile",
            memory.profile,
            valid,
            legal=("cuda_rules: bool", "accumulate: bool"),
            elsewhere=elsewhere,
        ),
        _case(
            "memory.assert_saved_bytes",
            memory.assert_saved_bytes,
            lambda: valid() | {"at_most": 10**6},
            elsewhere=(*elsewhere, "at_most: zero"),  # a budget, and it is not kept
        ),
        _case("memory.fake_tensors", memory.fake_tensors, valid, elsewhere=elsewhere),
        _case("Profile.with_optimizer", profile.with_optimizer, lambda: {"optimizer": "adamw"}),
        _case("Profile.peak_of", profile.peak_of, lambda: {"phase": "forward"}),
        _case("Profile.by", profile.by, lambda: {"attribute": "kind"}),
        _case("Profile.at_peak", profile.at_peak, dict, legal=("count: zero",)),
        _case("Profile.curve", profile.curve, dict),
        _case("Profile.table", profile.table, dict, legal=("limit: zero",)),
    ]


def _fused() -> list[Case]:
    def fuse(**arguments: Any) -> None:
        pk.fuse(**arguments)
        pk.unfuse(arguments["model"])

    more = {"model": {"without layers": nn.Linear(3, 2)}}
    return [
        _case(
            "fuse",
            fuse,
            lambda: {"model": peft_block()},
            legal=("tokens: first zero",),
            more=more,
            watched=peft_block,
            signature_of=pk.fuse,
        ),
        _case("unfuse", pk.unfuse, lambda: {"model": peft_block()}, watched=peft_block),
    ]


def cases() -> list[Case]:
    """Every call of this file."""
    built = tiny_text.build("bart", torch.float32)

    def attach(**arguments: Any) -> None:
        attachment = pk.attach(**arguments)
        attachment.detach()

    return [
        *_configs(),
        _case(
            "attach",
            attach,
            lambda: {"model": built, "config": pk.VLAdapterConfig(r=2)},
            legal=("name: string",),
            elsewhere=ELSEWHERE["attach"],
            watched=lambda: built,
            signature_of=pk.attach,
        ),
        _case(
            "attach-checkpoint",
            attach,
            lambda: {**released_on(), "checkpoint": checkpoint()},
            legal=("name: string",),
            elsewhere=ELSEWHERE["attach"],
            watched=lambda: released_on()["model"],
            signature_of=pk.attach,
        ),
        _case(
            "plan",
            pk.plan,
            lambda: {"model": built, "config": pk.VLAdapterConfig(r=2), "tokens": (2, 9)},
            legal=("tokens: first zero",),
            elsewhere=ELSEWHERE["attach"],
            watched=lambda: built,
        ),
        _case(
            "attachment",
            pk.attachment,
            lambda: {"model": attached("routing").model},
            more={"model": {"without an adapter": built}},
            watched=lambda: attached("routing").model,
        ),
        *_attachments(),
        *_fused(),
        _case("use_backend", entered(pk.use_backend), lambda: {"name": "auto"}, names=("backend",)),
        _case("explain", pk.explain, lambda: {"operator": pk.mode_contract, **_contract()}),
        *_memory(),
    ]


def _contract() -> dict[str, Any]:
    return {"core": torch.ones(2), "modes": torch.ones(3, 2)}
