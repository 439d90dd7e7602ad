"""``python -m petal_kernels.tools.gpu``."""

from petal_kernels.tools.gpu.command import main

if __name__ == "__main__":
    raise SystemExit(main())
