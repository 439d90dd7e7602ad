"""The page of every refusal, by area: its words from the source, beside what to do about it.

``python docs/tools/refusals.py`` prints it; ``mkdocs`` puts it in the place of ``MARK``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # mkdocs runs it as a file
from messages import GAP, Message, messages

MARK = "<!-- refusals -->"
# What holds for any argument stands once, under the checks that all share.
SHARED = ("petal_kernels._runtime.checks", "petal_kernels.nn.arguments")


@dataclass(frozen=True)
class Area:
    """Modules by the beginnings of their names, and what to do where they refuse."""

    title: str
    modules: tuple[str, ...]
    advice: str


AREAS = (
    Area(
        "Any argument",
        ("_runtime.checks", "nn.arguments", "_runtime.philox", "hf.fields"),
        "The first word is the argument's name, then what it may be, then what came. Nothing was "
        "computed or changed: correct that argument and call again.",
    ),
    Area(
        "Configs",
        ("hf.config", "hf.adapter_config", "hf.block_config", "hf.lora_config", "hf.peft_config"),
        "The first word is the field. Its values are in the config's docstring, on the page of its "
        "method and in the [API](api.md).",
    ),
    Area(
        "Attaching, and finding the layers",
        ("hf.",),
        "The model is as it was. `pk.plan(model, config)` shows what would be adapted without "
        "touching it; what cannot be told from a model's code is better named in `target_modules`.",
    ),
    Area(
        "Several processes",
        ("hf.ranks",),
        "Every process gets the same message. Give all of them one config and one file, or one "
        "seed before `pk.attach`, and call `att.check_ranks()` again.",
    ),
    Area(
        "What a call is given beside its input",
        ("hf.blocks", "hf.tokens", "hf.routing", "hf.dropped_mask"),
        "A block (`with att.vision(...)`, `att.domains(...)`, `att.context(...)`) belongs around "
        "the model's call, with one entry for each sample of that call.",
    ),
    Area(
        "Files: save and load",
        ("hf.stored", "hf.files", "hf.formats", "hf.hub", "hf.peft_files", "hf.tensors"),
        "A file that does not fit is never loaded in part. Check that the base is the one that the "
        "adapter was trained on, and that the two files of a folder were saved together.",
    ),
    Area(
        "The authors' checkpoints",
        ("hf.released",),
        'They load into a config with `variant="release"`, with the sizes that they were trained '
        "with; the message names the first tensor that does not fit.",
    ),
    Area(
        "Merging and plain models",
        ("hf.unloading", "hf.merging"),
        "`att.merge()` says what can be folded and what stays. Where something stays, save the "
        "adapter with `att.save(folder)`.",
    ),
    Area(
        "fuse: models of PEFT's",
        ("hf.fuse", "hf.peft_layers"),
        "`print(pk.fuse(model))` says of every layer how it runs. What is not covered runs PEFT's "
        "own forward; only the call itself can be refused.",
    ),
    Area(
        "Modules",
        ("nn.",),
        "Modules check what they are built with and what they are given, in the order of their "
        "arguments.",
    ),
    Area(
        "Operators and backends",
        ("ops.", "_runtime."),
        "`pk.explain(op, *inputs)` prints which backend runs these inputs and why the others do "
        "not. A *reason* is only an error where the backend was named; without a name the next one "
        "runs.",
    ),
    Area(
        "memory",
        ("memory.",),
        "The profiler runs one step of the model that it is given; `fake_tensors` needs a model "
        "that is built inside of it.",
    ),
    Area(
        "Commands",
        ("tools.",),
        "A command ends with 2 where it was used wrongly or cannot run here, with 1 where a bound "
        "that was asked for is broken. `--help` of every command lists its options.",
    ),
)

# What to do about single ones, by a part of their words.
HINTS = {
    "already attached? detach it first": "`pk.attachment(model)` is the handle of what is there; "
    "`.detach()` takes it out.",
    "would not know the adapter's parameters; attach first": "Attach to the plain model, then "
    "wrap it: DDP, FSDP and `torch.compile` come last.",
    "parameters of the … that holds this": "Freeze the whole model before you attach to a part.",
    "want places that … adapts": "The message lists the candidates; put one of these names into "
    "`target_modules`.",
    "want a module whose config.model_type is one of": "Attach to the part that has the layers "
    "(`model.language_model`), or take a method that needs no row: [which method](swap/index.md).",
    "match nothing; want names of linears": "`[n for n, _ in model.named_modules()]` lists the "
    "names.",
    "a pickle can run code": "Save with `att.save(folder)`; a state dict of the authors' goes "
    "through `checkpoint=`.",
    "that would load as its base alone": "`att.save(folder)`, or `att.save_merged(folder)`.",
    "fused operators are once_differentiable": "Second derivatives, forward mode and `torch.func` "
    'need the eager form: `pk.attach(..., implementation="published")`.',
    "cannot run here": "Leave the name out, or read the reasons: `pk.explain(op, *inputs)`.",
    "nn.DataParallel runs replicas": "Use `DistributedDataParallel`, one process for each device.",
    "adapted modules were replaced since attach": "Resize embeddings and change heads before you "
    "attach.",
    "needs a CUDA device (or TRITON_INTERPRET=1)": "On a CPU the `native` backend is the fast one.",
    "want a model without an adapter, or with all of it merged": "`att.save(folder)` for the "
    "adapter, `att.save_merged(folder)` for a plain model.",
    "the adapter was trained on a base with": "Load the base that the file names.",
    "on the meta device; give the model its weights first": "Load the weights, then attach.",
    "want a forward since attach": "Run the model once before you read the routing.",
    "want a model with LoRA layers of PEFT's": "`pk.fuse` is for a `PeftModel` with LoRA; "
    "`pk.attach` takes a plain model.",
}


def area_of(module: str) -> Area | None:
    """The area of a module, by the longest beginning of its name."""
    name = module.removeprefix("petal_kernels.")
    found = [(len(m), area) for area in AREAS for m in area.modules if name.startswith(m)]
    return max(found, key=lambda each: each[0])[1] if found else None


def shown(found: Sequence[Message]) -> list[Message]:
    """Without those that say what a shared check says, of an argument of theirs."""
    shared = {m.text for m in found if m.module in SHARED}

    def is_shared(message: Message) -> bool:
        return re.sub(r"^[\w…\[\]]+: ", f"{GAP}: ", message.text) in shared

    return [m for m in found if m.module in SHARED or not is_shared(m)]


def hint_of(message: Message) -> str:
    return " ".join(text for part, text in HINTS.items() if part in message.text)


def page(found: Sequence[Message]) -> str:
    """The areas as markdown, a table each."""
    return "\n".join(line for area in AREAS for line in _section(area, found)) + "\n"


def _section(area: Area, found: Sequence[Message]) -> Iterator[str]:
    rows: dict[tuple[str, str], list[Message]] = {}
    for message in shown(found):
        if area_of(message.module) is area:
            rows.setdefault((message.text, message.kind), []).append(message)
    yield from (f"### {area.title}", "", area.advice, "")
    yield from ("| message | raised as | from |", "|---|---|---|")
    for (text, kind), same in rows.items():
        modules = dict.fromkeys(m.module.removeprefix("petal_kernels.") for m in same)
        where = ", ".join(f"`{name}`" for name in modules)
        hint = hint_of(same[0])
        said = f"`` {_cell(text)} ``" + (f"<br>{hint}" if hint else "")
        yield f"| {said} | {kind} | {where} |"
    yield ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("``", "`")


if __name__ == "__main__":
    print(page(messages()))
