"""The doctor: versions, devices, what is built, and whether every kernel that runs here is right.

`facts` looks, `selfcheck` runs the kernels, `report` writes text and JSON, `command` parses.
"""

from petal_kernels.tools.doctor.command import main

__all__ = ["main"]
