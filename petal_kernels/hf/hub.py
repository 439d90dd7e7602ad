"""Adapters on the Hugging Face Hub, through huggingface_hub: json and safetensors alone."""

from __future__ import annotations

import importlib.metadata
import os
import re
import tempfile
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from petal_kernels.hf import pair, peft_files
from petal_kernels.hf.config import AdapterConfig

# All that a folder of an adapter may hold; whatever else a repository has is not fetched.
FILES = (pair.CONFIG, pair.TENSORS, pair.OLD_CONFIG, peft_files.TENSORS)

_WORD = r"[A-Za-z0-9][\w.-]*"
_REPO = re.compile(rf"{_WORD}/{_WORD}")
_NONE = type(None)
_OPTIONS: dict[str, tuple[type, ...]] = {
    "private": (bool, _NONE),
    "token": (str, bool, _NONE),
    "commit_message": (str, _NONE),
    "create_pr": (bool,),
}
_SAID = ("petal_kernels", "torch", "transformers")  # whose versions a card tells


class Saves(Protocol):
    """What is asked of an attachment."""

    model: nn.Module
    config: AdapterConfig

    def save(self, directory: str | os.PathLike[str], *, format: str = "petal") -> None:
        """Writes the adapter."""

    def parameters(self) -> Any:
        """What it trains."""


def is_repo(name: object) -> bool:
    """Whether it names a repository, and no folder of this machine."""
    return isinstance(name, str) and bool(_REPO.fullmatch(name)) and not os.path.exists(name)


def fetched(repo: str) -> Path:
    """The folder into which an adapter's files were fetched; FileNotFoundError where the Hub, or
    the cache where it is out of reach, has none."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=list(FILES)))
    except (OSError, ValueError) as error:  # of huggingface_hub's own are these, by class
        raise FileNotFoundError(
            f"{repo}: no such directory, and no repository of that name that can be read on the Hub"
            f" ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error


def push(attachment: Saves, repo: str, *, format: str, options: dict[str, Any]) -> str:
    """Uploads the adapter with a card; the address of the commit."""
    if not isinstance(repo, str) or not _REPO.fullmatch(repo):
        raise ValueError(f"repo: want 'user/name', got {repo!r}")
    for name, value in options.items():
        _check_option(name, value)
    from huggingface_hub import HfApi

    token, private = options.get("token"), options.get("private")
    with tempfile.TemporaryDirectory() as folder:
        attachment.save(folder, format=format)  # first: what it refuses makes no repository
        Path(folder, "README.md").write_text(card(attachment, repo, format), encoding="utf-8")
        api = HfApi(token=token)
        found = api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=found.repo_id,
            folder_path=folder,
            commit_message=options.get("commit_message") or "An adapter of petal_kernels",
            create_pr=options.get("create_pr", False),
            allow_patterns=[*FILES, "README.md"],
        )
    return str(done.commit_url)


def _check_option(name: str, value: Any) -> None:
    """TypeError unless `value` is of the types that the option has."""
    kinds = _OPTIONS[name]
    if not isinstance(value, kinds):
        wanted = " or ".join("None" if kind is _NONE else kind.__name__ for kind in kinds)
        raise TypeError(f"{name}: want {wanted}, got a {type(value).__name__}")


def card(attachment: Saves, repo: str, format: str) -> str:
    """The repository's README: the method, its base, the versions, how to load it."""
    config, model = attachment.config, attachment.model
    base = getattr(model, "name_or_path", None)
    known = isinstance(base, str) and is_repo(base)
    library = "peft" if format == "peft" else "petal_kernels"
    front = [f"library_name: {library}", "tags:", f"- {config.method}", "- petal_kernels"]
    front += [f"base_model: {base}"] if known else []
    count = sum(parameter.numel() for parameter in attachment.parameters())
    versions = ", ".join(f"{name} {v}" for name in _SAID if (v := _version(name)))
    load = [
        "import petal_kernels as pk",
        "",
        f"model = {type(model).__name__}.from_pretrained({base!r})" if known else "model = ...",
        f'att = pk.attach(model, "{repo}")',
    ]
    lines = [
        *("---", *front, "---", "", f"# {repo.partition('/')[2]}", ""),
        f"A {type(config).__name__.removesuffix('Config')} adapter (`{config.method}`, variant "
        f"`{config.variant}`, r {config.r}) of a {type(model).__name__}"
        f"{f' ({base})' if known else ''}: {count:,} trained parameters.",
        *("", "```python", *load, "```", "", f"Saved with {versions}.", ""),
    ]
    return "\n".join(lines)


def _version(name: str) -> str:
    if name == "petal_kernels":
        from petal_kernels import __version__

        return __version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
