"""``python -m benchmarks.gpu``."""

from petal_kernels.tools import exits

# The command itself is imported within, so that an interrupt meanwhile is one too.


def main() -> int:
    """Run the command line; returns the exit code."""
    from benchmarks.gpu import command

    return exits.run(command.main, "python -m benchmarks.gpu")


if __name__ == "__main__":
    raise SystemExit(main())
