"""``python -m benchmarks.run``: the command ``petal-kernels bench``, from a checkout."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from petal_kernels.tools.bench import app


def main(arguments: Sequence[str] | None = None) -> int:
    """The same program under this name."""
    return app.main(arguments, program="python -m benchmarks.run")


if __name__ == "__main__":
    sys.exit(main())
