"""The formats of an adapter on disk: this package's own, of every method, and PEFT's, of LoRA."""

from __future__ import annotations

import os

from petal_kernels.hf import files, hub, peft_files
from petal_kernels.hf.files import Saved
from petal_kernels.hf.peft_files import PeftSaved

FORMATS = ("petal", "peft")


def read(directory: str | os.PathLike[str]) -> Saved | PeftSaved:
    """Reads and checks an adapter of either format, told by its files: a directory's or, where
    there is none of that name, a repository's on the Hub."""
    if hub.is_repo(directory):
        directory = hub.fetched(str(directory))
    return peft_files.read(directory) if peft_files.is_peft(directory) else files.read(directory)
