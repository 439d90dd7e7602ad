"""Two processes that train every row under DistributedDataParallel; run by the engines' tests."""

from __future__ import annotations

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.hf import ranks
from tests.hf.methods import ROWS, Row, around, attached, clear, differences, read, step, values

BY_NAME = {row.name: row for row in ROWS}


def _faults(row: Row, rank: int) -> list[str]:
    """Of this process's gradients against the mean of both batches', computed alone."""
    model, attachment = attached(row)
    alone = step(row, model, attachment, row.given(rank))
    want = {name: value for name, value in alone.items() if name.startswith("grad")}
    for value in want.values():
        if value is not None:
            dist.all_reduce(value)
            value /= ranks.RANKS
    unused = any(gradient is None for gradient in want.values())
    clear(attachment)
    whole = DistributedDataParallel(model.train(), find_unused_parameters=unused)
    given = row.given(rank)
    with around(attachment, given):
        out, loss = read(whole, given.batch)
    loss.backward()
    got = values(attachment, given, out, loss)
    for name in want:
        if want[name] is None and got[name] is not None and not got[name].any():  # type: ignore[union-attr]
            got[name] = None  # what nobody used is reduced as zeros
    return differences({name: got[name] for name in want}, want)


if __name__ == "__main__":
    ranks.main(lambda name, rank: _faults(BY_NAME[name], rank))
