"""What is profiled: a preset, a config, a script of one's own; with the options that it heeds."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

from petal_kernels.tools.exits import Refusal
from petal_kernels.tools.memory import configs, script
from petal_kernels.tools.memory.options import Options
from petal_kernels.tools.memory.presets import (
    DEMO,
    DEMO_HEEDS,
    HEEDED,
    PRESETS,
    Step,
    prepare,
    prepare_config,
)

# How a model of a config is tuned where nothing else is said: LoRA on all linears of its decoder.
CONFIG_DEFAULTS: dict[str, Any] = {
    "method": "lora", "targets": "all-linear", "rank": 16, "batch": 1
}  # fmt: skip
CONFIG_METHODS = ("lora", "peft-lora", "adapter", "experts", "routing", "petal", "full")


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is profiled: how it is called, its options, which of them it heeds, and how it is
    built with others."""

    title: str
    who: str  # for a sentence on what it has not
    options: Options
    heeded: Collection[str]
    build: Callable[[Options], Step]


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given."""
    names = [f.name for f in dataclasses.fields(Options)]
    return {name: v for name in names if (v := getattr(args, name)) is not None}


def refuse(args: argparse.Namespace, what: str, names: Sequence[str]) -> None:
    """Options that would go unheeded."""
    given = [name for name in names if getattr(args, name) not in (None, ())]
    if given:
        raise Refusal(f"{what}: has no --{given[0].replace('_', '-')}")


def aside(args: argparse.Namespace) -> contextlib.AbstractContextManager[Any]:
    """Where a script prints: not into JSON that goes to the terminal."""
    quiet = str(args.json) == "-"
    return contextlib.redirect_stdout(sys.stderr) if quiet else contextlib.nullcontext()


def subject(args: argparse.Namespace, method: str | None = None) -> Subject:
    """What the command line names; with `method` in place of its own where one is given."""
    given = given_options(args)
    if method is not None:  # one of several: what it does not heed is for the others
        heeded = HEEDED[method] | {"images", "image_size"}
        given = {k: v for k, v in given.items() if k in heeded} | {"method": method}
    if args.script:
        with aside(args):
            own = script.load(args.script, given)
        said = "".join(f", {name} {value}" for name, value in given.items())
        who = f"{args.script}'s function"
        return Subject(args.script + said, who, own.options, own.known, own.build)
    if args.config is not None:
        found = _of_config(args, given)
    elif args.model == "demo":
        found = _demo(given)
    else:
        found = _preset(args.model, given)
    unheeded = [name for name in given if name not in found.heeded]
    refuse(args, found.who, [name for name in unheeded if name != "method"])
    return found


def _demo(given: dict[str, Any]) -> Subject:
    options = Options(**{**DEMO, **given})
    if options.method != "petal" or options.device != "cpu" or options.dtype != "float32":
        raise Refusal("--model demo: want method petal and float32 on the CPU")
    title = _title("demo", options, DEMO_HEEDS)
    return Subject(title, "--model demo", options, DEMO_HEEDS, lambda o: prepare("demo", o))


def _preset(name: str, given: dict[str, Any]) -> Subject:
    preset = PRESETS[name]
    options = Options(**{"method": preset.methods[0], **preset.defaults, **given})
    if options.method not in preset.methods:
        raise Refusal(
            f"--method: want one of {', '.join(preset.methods)} for {name}, got {options.method}"
        )
    heeded = HEEDED[options.method]
    title = _title(name, options, heeded)
    return Subject(title, f"method {options.method}", options, heeded, lambda o: prepare(name, o))


def _of_config(args: argparse.Namespace, given: dict[str, Any]) -> Subject:
    try:
        source = configs.read(args.config)
    except ValueError as error:
        raise Refusal(str(error)) from error
    defaults = dict(CONFIG_DEFAULTS)
    if given.get("method") not in (None, "lora", "peft-lora"):
        del defaults["targets"]  # names of LoRA's
    options = Options(**{**defaults, **given})
    if options.method not in CONFIG_METHODS:
        raise Refusal(
            f"--method: want one of {', '.join(CONFIG_METHODS)} for a config, got {options.method}"
        )
    heeded = (HEEDED[options.method] - {"device"}) | (
        {"images", "image_size"} if source.sees else set()
    )
    title = _title(source.name, options, heeded)
    return Subject(
        title, f"method {options.method}", options, heeded, lambda o: prepare_config(source, o)
    )


def _title(name: str, options: Options, heeded: Collection[str]) -> str:
    kind = f"real tensors on {options.device}" if options.device else "fake tensors"
    return f"{name}: {options.describe(heeded)}, {options.dtype}, {kind}"
