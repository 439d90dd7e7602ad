"""The tensors of an attachment: its parameters, its state, and its files."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from petal_kernels.hf import files, formats, hub, pair, peft_files, ranks, tensors
from petal_kernels.hf.config import AdapterConfig
from petal_kernels.hf.formats import FORMATS
from petal_kernels.hf.merging import ALL, NAME, Merged
from petal_kernels.hf.names import prefixes_of
from petal_kernels.hf.released import load as released
from petal_kernels.hf.tensors import gathered
from petal_kernels.hf.walk import parent_of
from petal_kernels.hf.whole import Copies, offloaded
from petal_kernels.nn.arguments import check_choice

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from petal_kernels.hf.installed import Installed
    from petal_kernels.hf.method import Method


class Stored:
    """What an attachment holds and stores."""

    model: nn.Module
    method: Method
    config: AdapterConfig
    adapter: nn.Module
    shapes: dict[str, torch.Size]
    implementation: str
    installed: Installed
    _merged: Merged | None
    only_adapter: bool = False  # a Trainer's checkpoints leave the base out (trainer.py)

    @abstractmethod
    def named_whole(self) -> list[str]:
        """The paths of what `modules_to_save` means."""

    @abstractmethod
    def used_again(self) -> list[str]:
        """The paths of adapted linears that the model uses in several places."""

    @abstractmethod
    def _need_attached(self, what: str) -> None:
        """RuntimeError where it was detached."""

    @abstractmethod
    def _check_places(self, what: str) -> None:
        """RuntimeError where a module that was adapted is no longer in the model."""

    # -- parameters -------------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable parameters: the adapter's and those of modules trained whole."""
        self._check_places("named_parameters")
        for name, parameter in self.adapter.named_parameters():
            if parameter.requires_grad:
                yield self._stored(name), parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        for _, parameter in self.named_parameters():
            yield parameter

    def state_dict(self) -> dict[str, Tensor]:
        """All stored tensors, shared ones once; the very storages, not copies."""
        state = {
            name.removeprefix(ALL): value
            for name, value in self.adapter.state_dict(prefix=ALL).items()
        }
        for name, value in state.items():
            if value.is_meta:
                state[name] = offloaded(value, *parent_of(self.adapter, name))
        return {self._stored(name): value for name, value in state.items()}

    def copies(self) -> Copies | None:
        """What is trained whole, biases among it; None where nothing is."""
        copies = self.adapter._modules.get(tensors.EXTRA)
        return copies if isinstance(copies, Copies) else None

    def _stored(self, name: str) -> str:
        """A tensor's name in files, from that in the adapter."""
        prefix, _, rest = name.partition(".")
        copies = self.copies()
        if prefix != tensors.EXTRA or copies is None:
            return name
        holder, _, rest = rest.partition(".")
        path = next(path for path, own in copies.paths.items() if own == holder)
        return f"{tensors.EXTRA}.{path}.{rest}"

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copies `state` in; ValueError on any missing, unexpected or mis-shaped tensor."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state: want a dict of tensors, got a {type(state).__name__}")
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.is_meta:
                got = "one on device meta" if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"state: want tensors with values, got {got} as {name!r}")
        own = self._loadable()
        tensors.check_tensors("state_dict", state, own)
        self._copy_in(own, state, from_file=False)

    def _loadable(self) -> dict[str, Tensor]:
        state = self.state_dict()
        tensors.check_loadable("load", state, self.shapes)
        return state

    def _copy_in(
        self, own: dict[str, Tensor], state: Mapping[str, Tensor], *, from_file: bool = True
    ) -> None:
        self._need_attached("load")
        self._check_places("load")
        if self._merged is not None:
            raise RuntimeError("load: the adapter is merged; call unmerge() first")
        tensors.copy_in("load", own, state)
        self.installed.loaded = ranks.digest(state) if from_file else ""

    # -- files ------------------------------------------------------------------------------------

    def signature(self) -> dict[str, Any]:
        """What the adapter needs of its base, as stored with it."""
        return self.method.signature()

    def save(self, directory: str | os.PathLike[str], *, format: str = "petal") -> None:
        """Writes adapter.safetensors and petal_config.json into `directory`, as one step.

        Whatever interrupts it, the directory loads as the adapter that was there or as this one.
        A model under `fully_shard` is gathered: then every process calls this.

        With `format="peft"` it writes what `peft.PeftModel.from_pretrained(base, directory)` loads,
        adapter_model.safetensors and adapter_config.json, of a LoRA adapter (`LoraConfig`) alone.
        What these files cannot say is a ValueError, before anything is written. An interrupted save
        over another adapter may leave a folder without a json, which neither loads.
        """
        check_choice("format", format, FORMATS)
        self._need_attached("save")
        self._check_places("save")
        if format == "peft":
            peft_files.write(directory, self)
            return
        files.write(directory, self.config, self.signature(), self.state_dict(), self.shapes)

    def _writes_alone(self, module: nn.Module) -> bool:
        """Whether a save of that module, with its state given, is one of the adapter alone."""
        return self.only_adapter and module is self.model

    def _write_checkpoint(
        self, directory: str | os.PathLike[str], state: Mapping[str, Tensor] | None
    ) -> None:
        """What Trainer resumes from, with the adapter alone, and what `save` writes. `state`: the
        model's, whole, where an engine has gathered it."""
        from safetensors.torch import save

        front = f"{NAME}."
        if state is None:
            state = gathered("save", self.adapter.state_dict(prefix=front))
        own = {name: value for name, value in state.items() if name.startswith(front)}
        named = {self._stored(name.removeprefix(front)): value for name, value in own.items()}
        files.write(directory, self.config, self.signature(), named, self.shapes)
        whole = {name: value.detach().cpu().contiguous() for name, value in own.items()}
        pair.replace_one(Path(directory), pair.CHECKPOINT, save(whole, metadata={"format": "pt"}))

    def push_to_hub(
        self,
        repo: str,
        *,
        format: str = "petal",
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Uploads what `save` writes, with a model card, to `repo` ("user/name"), which is made
        where there is none; the address of the commit. `attach(model, "user/name")` loads it.
        """
        options = {
            "private": private,
            "token": token,
            "commit_message": commit_message,
            "create_pr": create_pr,
        }
        return hub.push(self, repo, format=format, options=options)

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Loads a saved adapter of the same configuration, in either format."""
        saved = formats.read(directory)
        saved.check_config(self.config, self.model)
        saved.check_base(self.signature())
        self._load(saved)

    def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Loads a state dict (`.pth`) that the method's authors trained with their own code.

        The config has to be of variant "release". Every tensor of the adapter must be there and
        fit, none that looks like an adapter's may be left, and what the file holds of the base must
        be this model's; else ValueError, and nothing is changed. No code of a pickle runs.
        """
        files.path_of(path, "path")
        released.check_config(self.config)
        own = self._loadable()
        self._copy_in(own, released.values_of(path, self.method, self.model, own))

    def _load(self, saved: files.Saved | peft_files.PeftSaved) -> None:
        own = self._loadable()
        copies = self.copies()
        if isinstance(saved, peft_files.PeftSaved) and copies is not None:
            saved = saved.once(copies.other_names(self.model))
        prefixes = prefixes_of(self.model)
        self._copy_in(own, saved.tensors_for(own, prefixes, mirrors=self.method.mirrors))

    # -- processes --------------------------------------------------------------------------------

    def check_ranks(self, group: ProcessGroup | None = None) -> None:
        """RuntimeError, in every process of the group (None: of all), unless all hold one adapter.

        Compared are config, base, tensors, their values where they are whole, and what was loaded
        last; of an adapter that waits, nothing. Call it in every process before
        DistributedDataParallel or `fully_shard`: DDP trains rank 0's values and looks at shapes
        alone, `fully_shard` makes one adapter of every process's pieces. After sharding it still
        sees another config or file. `AdapterCheckpoint` calls it. Without a process group, or with
        one process, there is nothing to compare.
        """
        self._need_attached("check_ranks")
        self._check_places("check_ranks")
        ranks.check(self._held, group)

    def _held(self) -> ranks.Held:
        """What this process says of its adapter to others."""
        return ranks.held(
            self.state_dict(),
            self.shapes,
            settings={
                "method": self.config.method,
                "implementation": self.implementation,
                "merged": self._merged is not None,
                "config": self.config.to_dict(),
                "base": self.signature(),
            },
            trained=[name for name, _ in self.named_parameters()],
            loaded=self.installed.loaded,
        )
