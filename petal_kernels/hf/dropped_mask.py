"""BLIP's text cross-attention in transformers does not read `encoder_attention_mask`.

BlipTextLayer hands the mask to BlipTextAttention as `attention_mask`, and that to
BlipTextSelfAttention under the same name; in a cross-attention this one takes the argument
`encoder_attention_mask` instead, which nobody gave. So masked positions of an image, and the
padding of a question that an answering decoder reads, are attended to, adapted or not. The base
stays as it is; a user whose adapters stand there is told.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

LOOKS = 16
_MESSAGE = (
    "encoder_attention_mask: this version of transformers does not read it in BLIP's text "
    "cross-attention, with or without an adapter: masked positions are attended to (of a question, "
    "its padding). Give batches in which nothing is masked there, such as questions of one length"
)


class DroppedMask:
    """Warns once per attachment, at a forward whose mask hides something from a cross-attention.

    Looking at a mask synchronises a GPU: this ends with the warning or after LOOKS masks.
    """

    def __init__(self) -> None:
        self.looks = LOOKS

    def look(self, kwargs: dict[str, Any]) -> None:
        """At what a BlipTextEncoder is called with."""
        mask = kwargs.get("encoder_attention_mask")
        if not self.looks or kwargs.get("encoder_hidden_states") is None:
            return
        if type(mask) is not Tensor or mask.is_meta or torch.compiler.is_compiling():
            return
        if mask.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        self.looks -= 1
        hidden = ~mask if mask.dtype == torch.bool else mask != 0
        if bool(hidden.any()):
            self.looks = 0
            if drops_mask():
                warnings.warn(_MESSAGE, UserWarning, stacklevel=2)


@functools.cache
def drops_mask() -> bool:
    """Whether the installed transformers does so: tried on a model of one layer."""
    import transformers

    config = transformers.BlipTextConfig(
        vocab_size=4,
        hidden_size=4,
        encoder_hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=2,
        initializer_range=1.0,
        bos_token_id=1,
        eos_token_id=2,
        sep_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        torch.manual_seed(0)
        config.is_decoder = True  # which is what gives a layer its cross-attention
        model: Any = transformers.BlipTextModel(config, add_pooling_layer=False)
        model = model.float().eval()
        image, ids = torch.randn(1, 2, 4), torch.ones(1, 1, dtype=torch.long)
        outs = [
            model(
                ids,
                encoder_hidden_states=image,
                encoder_attention_mask=torch.tensor([[1, seen]]),
            ).last_hidden_state
            for seen in (0, 1)
        ]
    return torch.equal(*outs)
