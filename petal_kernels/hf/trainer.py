"""Trainer's checkpoints of an adapted model: the adapter, and not the base beside it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from petal_kernels.hf.attach import attachment


class AdapterCheckpoint(TrainerCallback):
    """A callback for transformers' Trainer and what is built on it: `callbacks=[...]`.

    Every folder that Trainer then writes, checkpoints and `save_model`, holds `model.safetensors`
    with the active adapter's tensors alone, which is what Trainer reads to resume and for
    `load_best_model_at_end`, and the two files of `Attachment.save`: `pk.attach(model, folder)`
    loads it. Trainer logs the base's keys as missing where it loads one; a checkpoint of another
    adapter is an error. Without the callback the base is written too, every time. Of several
    processes each must hold the same adapter when training begins (`Attachment.check_ranks`).
    """

    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Trainer has its model: ValueError where it has no adapter."""
        model: nn.Module = given["model"]
        handle = attachment(model)
        if handle.model is not model:
            raise ValueError(
                f"model: want one that attach has adapted, got a {type(model).__name__} with an "
                f"adapter of its {type(handle.model).__name__}, whose folder would not say so; "
                "attach to the whole model"
            )
        handle.only_adapter = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """RuntimeError unless all processes hold one adapter."""
        attachment(given["model"]).check_ranks()
