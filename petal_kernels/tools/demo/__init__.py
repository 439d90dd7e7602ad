"""The demo: a small InstructBLIP learns a new instruction through fused PETAL layers."""

from petal_kernels.tools.demo.app import main

__all__ = ["main"]
