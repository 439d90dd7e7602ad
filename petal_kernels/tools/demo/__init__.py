"""The demo: a small InstructBLIP learns a new instruction through fused PETAL layers (`app.main`)."""

from petal_kernels.tools.demo.app import main

__all__ = ["main"]
