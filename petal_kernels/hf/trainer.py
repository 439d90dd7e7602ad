"""Trainer's checkpoints of an adapted model: the adapter, and not the base beside it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from petal_kernels.hf.attach import attachment
from petal_kernels.hf.merging import ALL, NAME


class AdapterCheckpoint(TrainerCallback):
    """A callback for transformers' Trainer and what is built on it: `callbacks=[...]`.

    Every folder that Trainer then writes, checkpoints and `save_model`, holds `model.safetensors`
    with the active adapter's tensors alone, which is what Trainer reads to resume and for
    `load_best_model_at_end`, and the two files of `Attachment.save`: `pk.attach(model, folder)`
    loads it. Trainer logs the base's keys as missing where it loads one; a checkpoint of another
    adapter is an error. Without the callback the base is written too, every time.
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
        handle.adapter.register_load_state_dict_pre_hook(_all_of_it)


def _all_of_it(adapter: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Trainer loads whatever fits; an adapter that does not is an error all the same."""
    errors: list[str] = rest[-1]
    got = {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    want = {name.removeprefix(ALL) for name in adapter.state_dict(prefix=ALL)}
    if got and got != want:
        differ = sorted(got ^ want)
        errors.append(
            f"{NAME}: want the tensors of the adapter that is active, got others: {differ[0]} and "
            f"{len(differ) - 1} more differ"
        )
