"""The command `petal-kernels`: a table of subcommands, each a module with `main(arguments) -> exit
code`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from petal_kernels.tools import exits


@dataclass(frozen=True)
class Command:
    """One subcommand; its module is imported only when it is asked for."""

    module: str
    summary: str
    needs: tuple[str, ...] = ()
    extra: str = ""

    def missing(self) -> list[str]:
        """Packages that the command needs and that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


COMMANDS: dict[str, Command] = {
    "bench": Command(
        "petal_kernels.tools.bench",
        "time operators, layers and whole models against their eager forms and other packages",
    ),
    "demo": Command(
        "petal_kernels.tools.demo",
        "teach a small vision-language model a new instruction through fused PETAL layers",
        needs=("transformers", "safetensors", "mlxtend", "matplotlib"),
        extra="demo",
    ),
    "doctor": Command(
        "petal_kernels.tools.doctor",
        "versions, devices, backends, and a self-check of every kernel that can run here",
    ),
    "memory": Command(
        "petal_kernels.tools.memory",
        "what a training step keeps for backward, per module and over time; 7B models on a laptop",
        needs=("transformers", "safetensors"),
        extra="hf",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code, of `exits`' table."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return exits.run(lambda: _main(words), "petal-kernels")


def _main(arguments: list[str]) -> int:
    listing = "\n".join(f"  {name:<10}{command.summary}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="petal-kernels",
        description="Fused adapter layers for vision-language models.",
        epilog=f"commands:\n{listing}\n\nHelp on one: petal-kernels COMMAND --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    parser.add_argument("command", nargs="?", choices=list(COMMANDS), metavar="COMMAND")
    # Whatever follows the command belongs to it, --help included.
    at = next((i for i, word in enumerate(arguments) if not word.startswith("-")), len(arguments))
    options = parser.parse_args(arguments[: at + 1])
    if options.version:
        from petal_kernels import __version__

        print(f"petal-kernels {__version__}")
        return 0
    if options.command is None:
        parser.print_help()
        return 2
    command = COMMANDS[options.command]
    if missing := command.missing():
        parser.error(
            f"{options.command} needs {', '.join(missing)}: "
            f"pip install 'petal-kernels[{command.extra}]'"
        )
    return int(importlib.import_module(command.module).main(arguments[at + 1 :]))


if __name__ == "__main__":
    sys.exit(main())
