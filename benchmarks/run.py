"""``python -m benchmarks.run``: the command ``petal-kernels bench``, from a checkout."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from petal_kernels.tools import exits
from petal_kernels.tools.bench import app

_PROGRAM = "python -m benchmarks.run"


def main(arguments: Sequence[str] | None = None) -> int:
    """The same program under this name."""
    return exits.run(lambda: app.main(arguments, program=_PROGRAM), _PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
