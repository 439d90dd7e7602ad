"""The command line: what can be asked, and what is wrong with a word before any work is done."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

from petal_kernels.hf.lora_config import ALL_LINEAR, NORMS, PARTS
from petal_kernels.memory.optimizer import Settings, settings_of
from petal_kernels.tools.argument_types import device, listed, positive
from petal_kernels.tools.memory import gpus, quantised, whatif
from petal_kernels.tools.memory.presets import METHODS, NAMES, PRESETS

LAYERS = ("lora-qkv", "lora-layer")  # comparisons on one layer

_EPILOG = """examples:
  petal-kernels memory                                           the demo's model, a real batch
  petal-kernels memory --model instructblip-vicuna-7b --batch 8  7.9 G parameters, on any machine
  petal-kernels memory --model instructblip-vicuna-7b --what-if all --html memory.html
  petal-kernels memory --model llama-7b --what-if peft,recompute-mlp   LoRA on all linears
  petal-kernels memory --model instructblip-vicuna-7b --method lora --targets q_proj,v_proj -r 16
  petal-kernels memory --compare lora-layer                      PEFT's LoRA and ours, by targets
  petal-kernels memory --config Qwen2.5-VL-7B/ --image-size 1024x768 --gpu 4090
                                      does it fit, the largest batch, the cheapest change
  petal-kernels memory --config config.json --compare full,peft-lora,lora --gpu a100-80 --batch 4
  petal-kernels memory --script train.py:build --fail-above 4096 your own model, a budget

A script has a function (default: build) that returns (model, batch), (model, batch, loss) or
(step, batch, loss or None, module): a step is a function of the batch, under autocast for example;
its module is found where it is one that the function refers to. If build takes arguments named like
options (batch, length, rank, checkpointing, attention, device), it gets those that are given here,
and --what-if changes them, from the function's own defaults where none is given.

optimizers: adamw, adam, sgd, adamw8bit, adam8bit (bitsandbytes), with settings after a colon, as in
adamw:fused, adamw:foreach=no, sgd:momentum=0.9,nesterov. Without foreach or fused: foreach, torch's
choice on CUDA.

exit codes: 0; 1 over the budget of --fail-above, or nothing that was asked fits --gpu; 2 wrong
usage, or it cannot run; 130 interrupted; 141 whoever read the output has gone"""


def parser() -> argparse.ArgumentParser:
    """The parser of `petal-kernels memory`."""
    presets = "\n".join(
        f"  {name:<24}{preset.summary} ({', '.join(preset.methods)})"
        for name, preset in PRESETS.items()
    )
    made = argparse.ArgumentParser(
        prog="petal-kernels memory",
        description="What a training step keeps for backward, per module, and what is alive when.",
        epilog=f"models:\n  {'demo':<24}the demo's small InstructBLIP, real pictures (petal)\n"
        f"{presets}\n\n{_EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = made.add_mutually_exclusive_group()
    what.add_argument("--model", choices=NAMES, default="demo", metavar="NAME", help="see below")
    what.add_argument("--script", metavar="FILE[:FUNCTION]", help="your own model; see below")
    what.add_argument(
        "--config",
        type=Path,
        metavar="PATH",
        help="a model of transformers by its config.json, or the folder of it: no weights are read",
    )
    _add_fit(made)
    made.add_argument("--method", choices=METHODS, metavar="NAME", help=", ".join(METHODS))
    _add_batch(made)
    made.add_argument("--implementation", choices=["fused", "published"], help="of the adapter")
    _add_adapter(made)
    made.add_argument(
        "--device", type=device, help="run on real tensors there (default: fake ones)"
    )
    made.add_argument(
        "--optimizer",
        type=optimizer,
        metavar="NAME[:SETTING,...]",
        help="its states and its step on the timeline; see below",
    )
    made.add_argument(
        "--accumulate",
        action="store_const",
        const=True,
        help="gradients of an earlier micro-batch (or of zeros) are there before the step",
    )
    made.add_argument(
        "--what-if",
        type=listed(("all", *whatif.QUESTIONS)),
        default=(),
        metavar="LIST",
        help=f"run again with one change each: all, or some of {','.join(whatif.QUESTIONS)}",
    )
    _add_outputs(made)
    return made


def _add_fit(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--compare",
        type=compared,
        metavar="WHAT",
        help="methods side by side (full,peft-lora,lora,petal), or LoRA on one layer, PEFT's and "
        "ours: lora-qkv, lora-layer",
    )
    made.add_argument(
        "--gpu",
        type=gpus.gpu,
        metavar="NAME",
        help="does it fit, what is the largest batch, what to change: "
        f"{', '.join(gpus.TOTALS)}, or a number of GiB",
    )
    made.add_argument(
        "--reserve",
        type=gpus.gibibytes,
        metavar="GIB",
        help="of the GPU, for the CUDA context and workspaces "
        f"(default: {gpus.RESERVE}, an assumption)",
    )


def _add_batch(made: argparse.ArgumentParser) -> None:
    for name, text in (
        ("batch", "samples"),
        ("length", "words of text per sample"),
    ):
        made.add_argument(f"--{name}", type=positive, metavar="N", help=text)
    made.add_argument("-r", "--rank", type=positive, metavar="N", help="of the adapter")
    made.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the base")
    made.add_argument("--attention", choices=["sdpa", "eager"])
    made.add_argument("--checkpointing", action="store_const", const=True)
    made.add_argument(
        "--input-grads",
        action="store_const",
        const=True,
        help="enable_input_require_grads(), as PEFT calls it of a model that is checkpointed",
    )
    made.add_argument("--images", type=count, metavar="N", help="pictures per sample of a config")
    made.add_argument(
        "--image-size",
        type=image_size,
        metavar="WxH",
        help="of each picture, in pixels (default: the tower's own size)",
    )


def _add_adapter(made: argparse.ArgumentParser) -> None:
    made.add_argument("--part", metavar="PATH", help="put the adapter on this submodule")
    made.add_argument(
        "--targets",
        type=targets,
        metavar="NAMES",
        help="what is adapted: names with commas between, a regular expression or, of lora and "
        "peft-lora, all-linear",
    )
    made.add_argument(
        "--parts",
        type=listed(PARTS),
        metavar="LIST",
        help=f"of a model that sees, for lora and peft-lora: some of {','.join(PARTS)}",
    )
    made.add_argument("--dropout", "--lora-dropout", type=share, metavar="P", help="of the adapter")
    made.add_argument(
        "--recompute-mlp",
        action="store_const",
        const=True,
        help="of lora: an MLP keeps its input alone",
    )
    made.add_argument(
        "--frozen-norms", choices=NORMS, help="of lora: how frozen norms before its linears run"
    )
    made.add_argument("--adapter-dtype", choices=["float32", "bfloat16"])
    made.add_argument(
        "--base",
        choices=quantised.KINDS,
        help="the frozen linears' weights, as of bitsandbytes",
    )


def _add_outputs(made: argparse.ArgumentParser) -> None:
    made.add_argument("--rows", type=positive, metavar="N", help="of the table (default: 16)")
    made.add_argument("--json", type=Path, metavar="FILE", help="'-' for the terminal")
    made.add_argument("--html", type=Path, metavar="FILE")
    made.add_argument("--png", type=Path, metavar="FILE", help="the timeline")
    made.add_argument(
        "--fail-above",
        type=mebibytes,
        metavar="MIB",
        help="exit code 1 if more MiB (2^20 bytes) are saved for backward",
    )


def compared(text: str) -> tuple[str, ...]:
    """One of the comparisons on a layer, or methods."""
    return (text,) if text in LAYERS else listed(METHODS)(text)


def count(text: str) -> int:
    """A whole number, none included."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"want a number >= 0, got {text}")
    return int(text)


def image_size(text: str) -> tuple[int, int]:
    """`WxH`, or one number for both."""
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    sides = [int(side) for side in (found.groups() if found else ()) if side]
    if not sides or min(sides) < 1 or max(sides) > 65535:
        raise argparse.ArgumentTypeError(f"want WIDTHxHEIGHT in pixels, got {text}")
    return sides[0], sides[-1]


def targets(text: str) -> str | tuple[str, ...]:
    """Names (or ends of paths) with commas between, all-linear, or a regular expression."""
    if text.lower() == ALL_LINEAR:
        return ALL_LINEAR
    if re.fullmatch(r"[\w.]+(,[\w.]+)*", text):
        return tuple(text.split(","))
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f"want a regular expression, got {text!r}: {error}"
        ) from error
    return text


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def share(text: str) -> float:
    """A probability below one."""
    if not 0.0 <= _number(text) < 1.0:
        raise argparse.ArgumentTypeError(f"want a number with 0 <= P < 1, got {text}")
    return float(text)


def mebibytes(text: str) -> float:
    """A size; none is above infinity or what is no number, so neither would be a bound."""
    if not 0.0 <= _number(text) < math.inf:
        raise argparse.ArgumentTypeError(f"want a number of MiB >= 0, got {text}")
    return float(text)


_WORDS = {"yes": True, "true": True, "no": False, "false": False}


def optimizer(text: str) -> Settings:
    """`NAME[:SETTING[=VALUE],...]`; a setting without a value is yes."""
    name, _, rest = text.partition(":")
    settings: dict[str, bool | float] = {}
    for word in filter(None, rest.split(",")):
        setting, equals, value = word.partition("=")
        if not equals:
            settings[setting] = True
        elif value.lower() in _WORDS:
            settings[setting] = _WORDS[value.lower()]
        elif math.isfinite(_number(value)):
            settings[setting] = float(value)
        else:
            raise argparse.ArgumentTypeError(
                f"want {setting}=yes, no or a number, got {setting}={value}"
            )
    try:
        return settings_of(name, **settings)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
