"""Planted faults: each entry changes one text in one source file, and the suite must turn red."""
