"""The words of the small model, the instructions it was trained on, the one it has to learn, and
their answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SPECIAL = ("<pad>", "<bos>", "<eos>", "<img>")
DIGIT_WORDS = tuple(str(digit) for digit in range(10))
WORDS = (
    *SPECIAL,
    *DIGIT_WORDS,
    "no",
    "yes",
    "left",
    "right",
    "smaller",
    "larger",
    "digit",
    "even",
    "?",
)
PAD, BOS, EOS, IMAGE = (WORDS.index(word) for word in SPECIAL)
_FIRST_DIGIT, _NO = WORDS.index("0"), WORDS.index("no")


@dataclass(frozen=True)
class Instruction:
    """A question of three words, and the rule that answers it from the two digits of a picture."""

    text: str
    answer: Callable[[Tensor, Tensor], Tensor]

    def ids(self) -> list[int]:
        return [WORDS.index(word) for word in self.text.split()]


def _digit(value: Tensor) -> Tensor:
    return value + _FIRST_DIGIT


def _is_even(value: Tensor) -> Tensor:
    return _NO + (value % 2 == 0).long()


OLD = (
    Instruction("left digit ?", lambda left, right: _digit(left)),
    Instruction("right digit ?", lambda left, right: _digit(right)),
    Instruction("smaller digit ?", lambda left, right: _digit(torch.minimum(left, right))),
    Instruction("left even ?", lambda left, right: _is_even(left)),
    Instruction("right even ?", lambda left, right: _is_even(right)),
)
# The word "larger" is in the table of words, but no picture was ever shown with it.
NEW = Instruction("larger digit ?", lambda left, right: _digit(torch.maximum(left, right)))


def question_ids(instructions: tuple[Instruction, ...]) -> Tensor:
    """Word ids [len(instructions), 3]: all questions have the same length, so nothing is padded."""
    return torch.tensor([instruction.ids() for instruction in instructions])


def answer_table(instructions: tuple[Instruction, ...], left: Tensor, right: Tensor) -> Tensor:
    """Answer word ids [len(instructions), N]."""
    return torch.stack([instruction.answer(left, right) for instruction in instructions])
